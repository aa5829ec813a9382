# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's own defaults: which file wins, and that a bad value is found at load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from wavetrain_engine.errors import CheckpointError
from wavetrain_engine.generation_config import GenerationConfig
from wavetrain_engine.sampling_params import SamplingParams


def load(folder: Path, config: Any = None, generation: Any = None) -> GenerationConfig:
    for name, values in (("config.json", config), ("generation_config.json", generation)):
        if values is not None:
            text = values if isinstance(values, str) else json.dumps(values)
            (folder / name).write_text(text, encoding="utf-8")
    return GenerationConfig.load(folder)


def test_without_files_nothing_is_known(tmp_path: Path) -> None:
    loaded = load(tmp_path)
    assert loaded == GenerationConfig()
    assert loaded.sampling_defaults() == SamplingParams()


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({"eos_token_id": 2}, None, [2]),
        ({"eos_token_id": 0}, {}, [0]),
        ({"eos_token_id": 2}, {"eos_token_id": [5, 6]}, [5, 6]),
        ({"eos_token_id": [2, 3]}, {"eos_token_id": None}, [2, 3]),
        ({"eos_token_id": None}, None, []),
        ({}, {"eos_token_id": 7}, [7]),
        ({"eos_token_id": -1}, None, []),
        ({}, {"eos_token_id": [7, -1]}, [7]),
    ],
)
def test_end_tokens(tmp_path: Path, config: Any, generation: Any, expected: list[int]) -> None:
    assert load(tmp_path, config, generation).eos_token_ids == expected


def test_sampling_defaults(tmp_path: Path) -> None:
    values = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.1, "repetition_penalty": 1.05}
    loaded = load(tmp_path, {"temperature": 0.9}, {**values, "do_sample": True, "transformers_version": "5"})
    assert loaded.sampling_defaults() == SamplingParams(**values)


def test_the_default_length(tmp_path: Path) -> None:
    assert load(tmp_path, None, {"max_new_tokens": 128}).sampling_defaults() == SamplingParams(max_tokens=128)


def test_a_request_may_ask_for_something_else(tmp_path: Path) -> None:
    defaults = load(tmp_path, None, {"temperature": 0.6, "top_k": 20}).sampling_defaults()
    params = SamplingParams.from_mapping({"temperature": 0}, defaults)
    assert (params.temperature, params.top_k) == (0.0, 20)


@pytest.mark.parametrize(
    ("generation", "message"),
    [
        ("[1]", "must hold a JSON object"),
        ("{", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ({"eos_token_id": "2"}, "generation_config.json: Expected `array`"),
        ({"eos_token_id": [2, "3"]}, "generation_config.json: Expected `int`"),
        ({"eos_token_id": True}, "generation_config.json: Expected `int`"),
        ({"temperature": "hot"}, "generation_config.json: Expected `float"),
        ({"temperature": -1.0}, r"generation_config\.json: temperature must be at least 0"),
        ('{"top_p": NaN}', r"generation_config\.json: top_p must be a finite number"),
        ({"top_k": -5}, "top_k must be between -1"),
        ({"max_new_tokens": 0}, "max_tokens must be between 1"),
    ],
)
def test_a_bad_file_is_found_at_load(tmp_path: Path, generation: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, None, generation)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_bytes(b'{"temperature": "\xff"}')
    with pytest.raises(CheckpointError, match=r"generation_config\.json is not valid JSON"):
        GenerationConfig.load(tmp_path)
