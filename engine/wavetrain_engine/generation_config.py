# SPDX-License-Identifier: Apache-2.0
"""generation_config.json: a checkpoint's own sampling defaults and end-of-sequence tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import msgspec

from wavetrain_engine.errors import CheckpointError, InvalidSamplingParams
from wavetrain_engine.gguf.gguf_file import GgufFile
from wavetrain_engine.gguf.model_values import generation_values
from wavetrain_engine.model_location import ModelLocation
from wavetrain_engine.sampling_params import SamplingParams


class GenerationConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What generation_config.json (or, without it, config.json) says; None where it is silent.

    `do_sample: false`, Hugging Face's default, is honoured only through an explicit temperature of 0;
    vLLM, whose defaults we follow, ignores it too.

    Attributes:
        max_new_tokens: the default of max_tokens.
    """

    eos_token_ids: list[int] = []
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None

    @classmethod
    def load(cls, model_dir: Path) -> GenerationConfig:
        """Reads generation_config.json, with config.json's token ids where it has none; or a GGUF file's metadata.

        Raises:
            CheckpointError: a file is there but is not a JSON object, or a value has a wrong type or is one that
                no request could ask for; or there is no model.
        """
        gguf = ModelLocation.find(model_dir).gguf
        values = _values(model_dir) if gguf is None else generation_values(GgufFile.open(gguf))
        eos = values.get("eos_token_id")
        eos_token_ids = [] if eos is None else [eos] if isinstance(eos, int) else eos
        known = {name: values[name] for name in cls.__struct_fields__ if values.get(name) is not None}
        try:
            loaded = msgspec.convert(known | {"eos_token_ids": eos_token_ids}, cls)
            # A negative id is how some checkpoints say that there is none.
            ends = [token_id for token_id in loaded.eos_token_ids if token_id >= 0]
            loaded = msgspec.structs.replace(loaded, eos_token_ids=ends)
            loaded.sampling_defaults()  # refused now, not at the first request
        except (msgspec.ValidationError, InvalidSamplingParams) as error:
            where = "generation_config.json" if gguf is None else f"{gguf.name}, its sampling defaults"
            raise CheckpointError(f"{where}: {error}") from error
        return loaded

    def sampling_defaults(self) -> SamplingParams:
        """Returns SamplingParams with this checkpoint's values where it gives some."""
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        values = {name: getattr(self, name) for name in names} | {"max_tokens": self.max_new_tokens}
        return SamplingParams.from_mapping({name: value for name, value in values.items() if value is not None})


def _values(model_dir: Path) -> dict[str, Any]:
    generation = _read(model_dir / "generation_config.json")
    return _read(model_dir / "config.json") | {key: value for key, value in generation.items() if value is not None}


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values: object = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path.name} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path.name} must hold a JSON object")
    return cast("dict[str, Any]", values)
