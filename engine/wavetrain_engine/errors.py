# SPDX-License-Identifier: Apache-2.0
"""Every error the engine raises on purpose, as one tree.

    WavetrainError
    ├── ConfigError                   a bad engine.toml, flag or config.json      at load
    ├── CheckpointError               missing, extra or misshapen weights         at load
    │   └── UnsupportedModelError     an architecture or feature we do not serve
    ├── RequestError                  the caller can fix it
    │   ├── InvalidSamplingParams
    │   ├── PromptTooLong
    │   └── UnknownAdapter
    ├── CapacityError                 try again later
    │   └── QueueFull
    ├── RequestCancelled              the caller gave up
    ├── DeadlineExceeded              the request's own time limit passed
    ├── RequestFailed                 the engine could not finish this one request
    └── EngineDead                    sticky: every later submit raises it

Each class carries the word (`ErrorCode`) that its message starts with on the wire. A message says
what was wrong and what to do; it never shows a path, a stack or a name of shared memory.
"""

from __future__ import annotations

from enum import Enum
from typing import ClassVar


class ErrorCode(str, Enum):
    """The stable first word of an error message on the wire, without its colon."""

    INVALID = "invalid"
    NOT_FOUND = "not_found"
    BUSY = "busy"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    DEAD = "dead"
    INTERNAL = "internal"


class WavetrainError(Exception):
    """Root of the tree. `str(error)` is the message for the caller, without the code's word."""

    code: ClassVar[ErrorCode] = ErrorCode.INTERNAL


class ConfigError(WavetrainError):
    """The configuration is not usable: unknown key, wrong type, value out of range."""

    code = ErrorCode.INVALID


class CheckpointError(WavetrainError):
    """A checkpoint directory lacks a file or a tensor, or holds one that does not fit."""

    code = ErrorCode.INVALID


class UnsupportedModelError(CheckpointError):
    """The checkpoint is sound but asks for an architecture or feature that is not served."""


class RequestError(WavetrainError):
    """The request is wrong and would be wrong again; the caller has to change it."""

    code = ErrorCode.INVALID


class InvalidSamplingParams(RequestError):
    """A sampling parameter is unknown, of the wrong type or out of range."""


class PromptTooLong(RequestError):
    """The prompt leaves no room for an output token within max_model_len."""


class UnknownAdapter(RequestError):
    """The named adapter is not loaded."""

    code = ErrorCode.NOT_FOUND


class CapacityError(WavetrainError):
    """The engine is full; the same request may succeed later."""

    code = ErrorCode.BUSY


class QueueFull(CapacityError):
    """As many requests wait as --max-queue-size allows."""


class RequestCancelled(WavetrainError):
    """The caller cancelled the request, or went away."""

    code = ErrorCode.CANCELLED


class DeadlineExceeded(WavetrainError):
    """The request's own deadline passed before it was finished."""

    code = ErrorCode.DEADLINE


class RequestFailed(WavetrainError):
    """The engine could not finish this one request (NaN logits, say); others are not affected."""

    code = ErrorCode.INTERNAL


class EngineDead(WavetrainError):
    """The engine core died; its running requests are lost. It is restarted by its supervisor."""

    code = ErrorCode.DEAD
