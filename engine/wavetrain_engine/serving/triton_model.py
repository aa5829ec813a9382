# SPDX-License-Identifier: Apache-2.0
"""What the four Python models have in common: a start whose failure is one clear line, and a bounded end."""

from __future__ import annotations

import gc
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import triton_python_backend_utils as pb_utils  # pyright: ignore[reportMissingImports]

from wavetrain_engine.errors import WavetrainError
from wavetrain_engine.serving.error_codes import error_message
from wavetrain_engine.serving.model_files import ModelFiles
from wavetrain_engine.serving.server_log import install_server_log
from wavetrain_engine.serving.server_watch import exit_with_server

_LOGGER = logging.getLogger(__name__)


class TritonModel(ABC):
    """A Triton Python model. Triton calls `initialize`, then `execute` from one thread, then `finalize`.

    Attributes:
        core_command: the core process's command line, where it is not the usual one.
    """

    core_command: ClassVar[Sequence[str]] = ()

    def initialize(self, args: Mapping[str, str]) -> None:
        """Starts the model; returns when it takes requests.

        Raises:
            pb_utils.TritonModelException: it cannot be started; one line says why.
        """
        exit_with_server(os.getppid())
        try:
            install_server_log()
            self.start(ModelFiles.read(args))
        except WavetrainError as error:
            _LOGGER.error("%s cannot be served: %s: %s", args["model_name"], type(error).__name__, error)
            self.finalize()
            raise pb_utils.TritonModelException(error_message(error.code, str(error))) from None
        # What is there now stays. Looking through it for garbage would stop the streams for tens of milliseconds.
        gc.collect()
        gc.freeze()

    @abstractmethod
    def start(self, files: ModelFiles) -> None:
        """Makes the model ready, or raises a WavetrainError."""

    @abstractmethod
    def execute(self, requests: Sequence[Any]) -> list[Any] | None:
        """Takes requests; must not raise, as Triton would show the client our stack."""

    @abstractmethod
    def finalize(self) -> None:
        """Ends the model within a few seconds, whatever state it is in. Triton waits for it without a limit."""
