# SPDX-License-Identifier: Apache-2.0
"""Where a Triton model finds its engine: the engine.toml that its config.pbtxt names, and the core behind it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from wavetrain_engine.config import EngineConfig
from wavetrain_engine.errors import ConfigError
from wavetrain_engine.ipc.core_client import CoreClient
from wavetrain_engine.ipc.runtime_dir import RuntimeDir
from wavetrain_engine.text.chat_template import ChatTemplate
from wavetrain_engine.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """A model's engine configuration, as `initialize` is told of it."""

    model_name: str
    engine_config_path: Path
    config: EngineConfig

    @classmethod
    def read(cls, arguments: Mapping[str, str]) -> ModelFiles:
        """Reads the parameter `engine_config`, a path relative to the model's folder, and that file.

        Raises:
            ConfigError: there is no such parameter, or what EngineConfig.load raises.
        """
        parameters = json.loads(arguments["model_config"]).get("parameters", {})
        relative = parameters.get("engine_config", {}).get("string_value")
        if not relative:
            raise ConfigError("config.pbtxt lacks the parameter engine_config, the engine.toml to serve")
        path = (Path(arguments["model_repository"]) / relative).resolve()
        return cls(model_name=arguments["model_name"], engine_config_path=path, config=EngineConfig.load(path))

    def load_tokenizer(self) -> Tokenizer | None:
        """The checkpoint's tokenizer; None where the configuration says to serve token ids only.

        Raises:
            CheckpointError: it is missing or broken.
        """
        return None if self.config.model.skip_tokenizer_init else Tokenizer.load(self.config.model.model)

    def require_tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer.

        Raises:
            ConfigError: the configuration says to serve without one.
            CheckpointError: it is missing or broken.
        """
        tokenizer = self.load_tokenizer()
        if tokenizer is None:
            raise ConfigError(f"the model {self.model_name} needs a tokenizer; unset skip_tokenizer_init")
        return tokenizer

    def load_chat_template(self, tokenizer: Tokenizer, *, timeout_s: float) -> ChatTemplate | None:
        """The checkpoint's chat template; None where it has none.

        Raises:
            CheckpointError: it is broken.
        """
        return ChatTemplate.load(self.config.model.model, tokenizer.named_tokens, timeout_s=timeout_s)

    def core_client(self, core_command: Sequence[str] = ()) -> CoreClient:
        """A client of this server's core for this engine.toml, not started yet.

        Raises:
            ConfigError: there is no private place for the socket.
        """
        server_pid = os.getppid()  # a stub is a child of the server
        runtime_dir = RuntimeDir.of_server(self.engine_config_path, server_pid)
        return CoreClient(
            self.engine_config_path,
            runtime_dir,
            server_pid,
            core_command,
            step_timeout_s=self.config.scheduler.step_timeout_s,
        )
