# SPDX-License-Identifier: Apache-2.0
"""The configuration tree: what it accepts, what it refuses and how it says so, and engine.toml there and back."""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wavetrain_engine.config import SECTIONS, EngineConfig, engine_options, option_type
from wavetrain_engine.errors import ConfigError

NUMBERS = [(name, option) for name, option in engine_options().items() if option_type(name) in (int, float)]


def write(folder: Path, text: str) -> Path:
    path = folder / "engine.toml"
    path.write_text(text, encoding="utf-8")
    return path


class TestOptions:
    @pytest.mark.parametrize("name", engine_options())
    def test_every_option_says_what_it_is_and_where_it_ends(self, name: str) -> None:
        option = engine_options()[name]
        assert len(option.metadata["help"]) > 10
        kind = option_type(name)
        assert kind in (int, float, bool, str)
        if kind in (int, float):
            assert option.metadata["low"] is not None
            assert option.metadata["high"] is not None
        if option.metadata["choices"] is not None:
            assert option.default in option.metadata["choices"]

    def test_names_are_unique_across_sections(self) -> None:
        assert len(engine_options()) == sum(len(dataclasses.fields(kind)) for kind in SECTIONS.values())

    def test_the_defaults_are_accepted_by_their_own_checks(self) -> None:
        assert EngineConfig.from_mapping(EngineConfig().to_mapping()) == EngineConfig()

    def test_nothing_can_be_changed(self) -> None:
        with pytest.raises(dataclasses.FrozenInstanceError):
            EngineConfig().cache.block_size = 32  # type: ignore[misc]


class TestFromFlags:
    def test_sorts_flags_into_their_sections(self) -> None:
        config = EngineConfig.from_flags({"block_size": 8, "max_num_seqs": 3, "dtype": "float32"})
        assert (config.cache.block_size, config.scheduler.max_num_seqs, config.model.dtype) == (8, 3, "float32")

    def test_keeps_what_the_base_says(self) -> None:
        base = EngineConfig.from_flags({"block_size": 8, "max_model_len": 64})
        config = EngineConfig.from_flags({"block_size": 4}, base)
        assert (config.cache.block_size, config.model.max_model_len) == (4, 64)
        assert EngineConfig.from_flags({"max_model_len": None}, base).model.max_model_len is None

    def test_names_the_nearest_option(self) -> None:
        with pytest.raises(ConfigError, match="unknown option max_num_seq; did you mean max_num_seqs"):
            EngineConfig.from_flags({"max_num_seq": 1})
        with pytest.raises(ConfigError, match="unknown option zzz; known are activation_dtype, async_scheduling"):
            EngineConfig.from_flags({"zzz": 1})

    @pytest.mark.parametrize(("name", "option"), NUMBERS, ids=[name for name, _ in NUMBERS])
    def test_numbers_have_two_ends(self, name: str, option: Any) -> None:
        low, high = option.metadata["low"], option.metadata["high"]
        for value in (low, high):
            EngineConfig.from_flags({name: option_type(name)(value)})
        step = 1 if option_type(name) is int else 0.001
        with pytest.raises(ConfigError, match=rf"{name}: expected (int|float) >="):
            EngineConfig.from_flags({name: option_type(name)(low - step)})
        with pytest.raises(ConfigError, match=rf"{name}: expected (int|float) <="):
            EngineConfig.from_flags({name: option_type(name)(high + step)})

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("max_num_seqs", "many"),
            ("max_num_seqs", "8"),
            ("max_num_seqs", True),
            ("max_num_seqs", 8.0),
            ("max_num_seqs", None),
            ("max_num_seqs", [8]),
            ("gpu_memory_utilization", True),
            ("gpu_memory_utilization", "0.5"),
            ("gpu_memory_utilization", None),
            ("enable_prefix_caching", 1),
            ("enable_prefix_caching", "true"),
            ("model", 7),
            ("dtype", 32),
            ("max_model_len", "long"),
        ],
    )
    def test_wrong_types_are_named(self, name: str, value: Any) -> None:
        with pytest.raises(ConfigError, match=rf"^\w+\.{name}: expected {option_type(name).__name__}, got "):
            EngineConfig.from_flags({name: value})

    def test_a_share_of_memory_is_a_share(self) -> None:
        for value in (0.0, -1.0, 1.01, float("nan"), float("inf"), 0, 2, 10**400, 10**5000):
            with pytest.raises(ConfigError, match=r"cache\.gpu_memory_utilization: expected float"):
                EngineConfig.from_flags({"gpu_memory_utilization": value})

    def test_an_integer_will_do_for_a_float(self) -> None:
        value = EngineConfig.from_flags({"gpu_memory_utilization": 1}).cache.gpu_memory_utilization
        assert (value, type(value)) == (1.0, float)

    def test_a_choice_is_one_of_the_choices(self) -> None:
        with pytest.raises(ConfigError, match=r"model\.dtype: expected one of auto, bfloat16, .*, got 'int8'"):
            EngineConfig.from_flags({"dtype": "int8"})

    def test_a_long_value_is_cut(self) -> None:
        with pytest.raises(ConfigError) as caught:
            EngineConfig.from_flags({"dtype": "x" * 10_000})
        assert len(str(caught.value)) < 250


class TestEngineToml:
    def test_reads_sections_and_comments(self, tmp_path: Path) -> None:
        path = write(tmp_path, "# ours\n[scheduler]\nmax_num_seqs = 4 # few\n\n[cache]\ngpu_memory_utilization = 0.5\n")
        config = EngineConfig.load(path)
        assert (config.scheduler.max_num_seqs, config.cache.gpu_memory_utilization) == (4, 0.5)
        assert config.model == EngineConfig().model

    def test_an_empty_file_is_all_defaults(self, tmp_path: Path) -> None:
        assert EngineConfig.load(write(tmp_path, "")) == EngineConfig()

    def test_a_relative_model_is_relative_to_the_file(self, tmp_path: Path) -> None:
        path = write(tmp_path, '[model]\nmodel = "demo"\n')
        assert EngineConfig.load(path).model.model == str(tmp_path.resolve() / "demo")
        path = write(tmp_path, '[model]\nmodel = "../demo"\n')
        assert EngineConfig.load(path).model.model == str(tmp_path.resolve().parent / "demo")
        path = write(tmp_path, '[model]\nmodel = "/models/demo"\n')
        assert EngineConfig.load(path).model.model == "/models/demo"

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("[schedule]\n", "unknown section schedule; did you mean scheduler"),
            ("[speculation]\n", "unknown section speculation; known are cache, model, observability, scheduler"),
            ("max_num_seqs = 4\n", "unknown section max_num_seqs"),
            ("cache = 4\n", "cache: expected a table, got int"),
            ("[[cache]]\n", "cache: expected a table, got list"),
            ("[scheduler]\nmax_num_seq = 4\n", r"unknown key scheduler\.max_num_seq; did you mean scheduler\.max_num_"),
            ("[model]\nblock_size = 4\n", r"unknown key model\.block_size; .*; it belongs in \[cache\]"),
            ('[scheduler]\nmax_num_seqs = "many"\n', r"scheduler\.max_num_seqs: expected int, got 'many'"),
            ("[scheduler]\nmax_num_seqs = 0\n", r"scheduler\.max_num_seqs: expected int >= 1, got 0"),
            ("[cache]\ngpu_memory_utilization = nan\n", "expected float >= 0.01, got nan"),
            ("[cache]\nnum_blocks = 2026-11-20\n", "num_blocks: expected int, got datetime"),
            ("[cache\n", "engine.toml is not valid TOML"),
            ("[cache]\n[cache]\n", "engine.toml is not valid TOML"),
            ('[model]\nmodel = "a\\u0000b"\n', "is not a usable path"),
        ],
    )
    def test_says_what_is_wrong(self, tmp_path: Path, text: str, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            EngineConfig.load(write(tmp_path, text))

    def test_a_file_that_cannot_be_read(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"cannot read engine\.toml: No such file") as caught:
            EngineConfig.load(tmp_path / "engine.toml")
        assert str(tmp_path) not in str(caught.value)
        (tmp_path / "engine.toml").write_bytes(b"[model]\nmodel = '\xff'\n")
        with pytest.raises(ConfigError, match=r"engine\.toml is not valid TOML"):
            EngineConfig.load(tmp_path / "engine.toml")

    def test_a_loop_of_links_is_a_bad_path(self, tmp_path: Path) -> None:
        (tmp_path / "loop").symlink_to(tmp_path / "loop")
        path = write(tmp_path, '[model]\nmodel = "loop/model"\n')
        # From Python 3.13 on such links are left as they are; then it is the loader that finds nothing there.
        with suppress(ConfigError):
            assert not Path(EngineConfig.load(path).model.model).is_dir()

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        # A path that begins with / stays as it is; surrogates cannot be in a file of UTF-8.
        model=st.text(st.characters(exclude_categories=["Cs"]), max_size=20).map(lambda text: f"/{text}"),
        block_size=st.integers(1, 4096),
        share=st.floats(0.01, 1.0),
        num_blocks=st.none() | st.integers(1, 2**31 - 1),
        is_async=st.booleans(),
    )
    def test_there_and_back(
        self,
        tmp_path: Path,
        model: str,
        block_size: int,
        share: float,
        num_blocks: int | None,
        is_async: bool,
    ) -> None:
        config = EngineConfig.from_flags(
            {
                "model": model,
                "block_size": block_size,
                "gpu_memory_utilization": share,
                "num_blocks": num_blocks,
                "async_scheduling": is_async,
            }
        )
        assert EngineConfig.load(write(tmp_path, config.to_toml())) == config
