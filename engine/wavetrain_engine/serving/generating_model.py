# SPDX-License-Identifier: Apache-2.0
"""What `engine` and `llm` have in common: requests that go to the engine core, each refused or started on its own."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import triton_python_backend_utils as pb_utils  # pyright: ignore[reportMissingImports]

from wavetrain_engine.errors import RequestError, WavetrainError
from wavetrain_engine.facts import EngineFacts
from wavetrain_engine.serving.error_codes import error_response
from wavetrain_engine.serving.generation import Generation
from wavetrain_engine.serving.model_files import ModelFiles
from wavetrain_engine.serving.triton_model import TritonModel

_LOGGER = logging.getLogger(__name__)


class GeneratingModel(TritonModel):
    """A decoupled model on the engine core."""

    _generation: Generation | None = None

    def attach(self, files: ModelFiles) -> EngineFacts:
        """Attaches to the core, starting it where none runs; part of `start`.

        Raises:
            WavetrainError: the core cannot be loaded.
        """
        self._generation = Generation(
            files.core_client(self.core_command), stream_interval=files.config.scheduler.stream_interval
        )
        return self._generation.start()

    @property
    def generation(self) -> Generation:
        """The core's requests; only after `attach`."""
        assert self._generation is not None, "attach comes first"
        return self._generation

    def is_ready(self) -> bool:
        """Triton's readiness hook (servers since 2026; older ones do not ask)."""
        return self._generation is not None and self._generation.is_ready

    def execute(self, requests: Sequence[Any]) -> None:
        """Starts each request and returns; responses come from the thread that hears from the core."""
        for request in requests:
            self.start_or_refuse(request)

    def finalize(self) -> None:
        """Ends the model, and the core if no other model needs it."""
        if self._generation is not None:
            self._generation.close()

    @abstractmethod
    def start_request(self, request: Any, generation: Generation) -> None:
        """Hands a request to the core; what it raises, before anything was handed over, refuses the request."""

    def start_or_refuse(self, request: Any) -> None:
        """Starts a request, or answers it with the error that keeps it from starting; never raises. Thread-safe."""
        try:
            if self._generation is None:
                raise RequestError("the model is not loaded")
            self.start_request(request, self._generation)
        except Exception as error:
            if not isinstance(error, WavetrainError):
                _LOGGER.exception("a request could not be started")
            sender = request.get_response_sender()
            sender.send(error_response(error), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
