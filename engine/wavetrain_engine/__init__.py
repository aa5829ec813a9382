# SPDX-License-Identifier: Apache-2.0
"""Wavetrain's engine: `from wavetrain_engine import LLM, SamplingParams`.

Names are imported when they are first used, and torch only when a model is loaded: front ends that never
touch a device import this package too.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wavetrain_engine.async_llm import AsyncLLM
    from wavetrain_engine.config import EngineConfig
    from wavetrain_engine.errors import (
        CapacityError,
        CheckpointError,
        ConfigError,
        DeadlineExceeded,
        EngineDead,
        InvalidSamplingParams,
        PromptTooLong,
        QueueFull,
        RequestCancelled,
        RequestError,
        RequestFailed,
        UnknownAdapter,
        UnsupportedModelError,
        WavetrainError,
    )
    from wavetrain_engine.facts import EngineFacts
    from wavetrain_engine.llm import LLM
    from wavetrain_engine.outputs import CompletionOutput, Logprob, RequestOutput
    from wavetrain_engine.sampling_params import SamplingParams
    from wavetrain_engine.stats import EngineStats
    from wavetrain_engine.text.tokenizer import Tokenizer

__all__ = [
    "LLM",
    "AsyncLLM",
    "CapacityError",
    "CheckpointError",
    "CompletionOutput",
    "ConfigError",
    "DeadlineExceeded",
    "EngineConfig",
    "EngineDead",
    "EngineFacts",
    "EngineStats",
    "InvalidSamplingParams",
    "Logprob",
    "PromptTooLong",
    "QueueFull",
    "RequestCancelled",
    "RequestError",
    "RequestFailed",
    "RequestOutput",
    "SamplingParams",
    "Tokenizer",
    "UnknownAdapter",
    "UnsupportedModelError",
    "WavetrainError",
]

_HOMES = {
    "AsyncLLM": "async_llm",
    "CompletionOutput": "outputs",
    "EngineConfig": "config",
    "EngineFacts": "facts",
    "EngineStats": "stats",
    "LLM": "llm",
    "Logprob": "outputs",
    "RequestOutput": "outputs",
    "SamplingParams": "sampling_params",
    "Tokenizer": "text.tokenizer",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_HOMES.get(name, 'errors')}")
    value = globals()[name] = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return __all__
