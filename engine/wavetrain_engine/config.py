# SPDX-License-Identifier: Apache-2.0
"""The engine's configuration: one frozen tree, from engine.toml and command-line flags.

Defaults exist here and nowhere else. What is found out at load goes into EngineFacts, never here.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wavetrain_engine.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

_DTYPES = ("auto", "bfloat16", "float16", "float32")
_DEVICES = ("auto", "cpu", "cuda")
_LOAD_FORMATS = ("auto", "dummy")
_ACTIVATION_DTYPES = ("auto", "model", "int8")
_KV_CACHE_DTYPES = ("auto", "bfloat16", "float16", "float32", "fp8", "fp8_e4m3", "int8")


_MAX_INT32 = 2**31 - 1


def _option(
    default: Any,
    help_text: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] | None = None,
) -> Any:
    return field(default=default, metadata={"help": help_text, "low": low, "high": high, "choices": choices})


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSection:
    """Which checkpoint, and how it is held."""

    model: str = _option("", "checkpoint directory (Hugging Face layout, safetensors)")
    dtype: str = _option(
        "auto",
        "dtype of weights and activations; auto: the checkpoint's, but float16 for bfloat16 on GPUs that lack it",
        choices=_DTYPES,
    )
    activation_dtype: str = _option(
        "auto",
        "what int4 and int8 weights are multiplied with on a CPU, if the checkpoint does not say so: model: what the "
        "model computes in; int8: rounded, each token by itself; auto: int8 where that is multiplied faster",
        choices=_ACTIVATION_DTYPES,
    )
    device: str = _option("auto", "where the model runs; auto: cuda where there is one", choices=_DEVICES)
    cpu_threads: int | None = _option(
        None, "threads that compute on the CPU; default: one for each core this process may use", low=1, high=1024
    )
    # One token would be a prompt without room for an output.
    max_model_len: int | None = _option(
        None, "prompt and output tokens of a request; default: the model's own", low=2, high=_MAX_INT32
    )
    load_format: str = _option(
        "auto",
        "auto: weights from safetensors; dummy: random ones, for measuring without a checkpoint",
        choices=_LOAD_FORMATS,
    )
    enforce_eager: bool = _option(False, "launch each kernel of a step on a GPU, and capture no CUDA graphs")
    skip_tokenizer_init: bool = _option(False, "serve token ids only, from a checkpoint without a tokenizer")


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSection:
    """The paged KV cache."""

    block_size: int = _option(16, "tokens per KV-cache block", low=1, high=4096)
    kv_cache_memory: int | None = _option(
        None, "bytes of KV cache; default: from the memory there is", low=1, high=2**50
    )
    kv_cache_dtype: str = _option(
        "auto",
        "what the KV cache holds; auto: what the model computes in; fp8 (that is fp8_e4m3) or int8: about twice the "
        "blocks in the same memory",
        choices=_KV_CACHE_DTYPES,
    )
    gpu_memory_utilization: float = _option(
        0.9, "share of a GPU's memory to use: weights, working memory, and the KV cache as the rest", low=0.01, high=1.0
    )
    # Block tables are int32.
    num_blocks: int | None = _option(None, "KV-cache blocks, instead of a size in bytes", low=1, high=_MAX_INT32)
    enable_prefix_caching: bool = _option(True, "reuse blocks of equal prompt prefixes")


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerSection:
    """What runs together."""

    max_num_seqs: int = _option(256, "requests in one step at most", low=1, high=65536)
    max_num_batched_tokens: int = _option(
        2048, "tokens in one step at most; longer prompts are chunked", low=1, high=2**20
    )
    max_queue_size: int = _option(
        4096, "waiting requests at most; further ones are refused as busy", low=0, high=_MAX_INT32
    )
    long_prefill_token_threshold: int = _option(
        0, "tokens of one prompt per step at most; 0: only max_num_batched_tokens bounds it", low=0, high=_MAX_INT32
    )
    async_scheduling: bool | None = _option(
        None, "plan a step while the one before it runs; default: on a GPU, which would wait otherwise"
    )
    stream_interval: int | None = _option(
        None,
        "tokens per response of a served stream at least, but for the first and the last; default: 1, and more where "
        "sending each token would take the processors from the engine",
        low=1,
        high=_MAX_INT32,
    )
    step_timeout_s: float = _option(
        300.0,
        "seconds that a step of a served engine may take; then its core counts as hung, is killed and started anew; "
        "0: any time",
        low=0,
        high=1e6,
    )

    def plans_ahead(self, device: str) -> bool:
        """Whether a step is planned while one runs on the device, as EngineFacts name it."""
        return device != "cpu" if self.async_scheduling is None else self.async_scheduling


@dataclass(frozen=True, slots=True, kw_only=True)
class ObservabilitySection:
    """Who is told of requests."""

    otlp_traces_endpoint: str | None = _option(
        None,
        "where spans of requests are sent, by OTLP over HTTP: http://collector:4318/v1/traces; needs the extra otel",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """The whole tree. Build it with `from_mapping`, `load`, or keyword arguments by flag name (`from_flags`)."""

    model: ModelSection = field(default_factory=ModelSection)
    cache: CacheSection = field(default_factory=CacheSection)
    scheduler: SchedulerSection = field(default_factory=SchedulerSection)
    observability: ObservabilitySection = field(default_factory=ObservabilitySection)

    @classmethod
    def load(cls, path: Path) -> EngineConfig:
        """Reads engine.toml; a relative `model.model` is relative to the file's folder.

        Raises:
            ConfigError: no such file, not TOML, an unknown key (the nearest known one is named), a wrong
                type, a value out of range.
        """
        try:
            values: Any = typing.cast("Any", tomllib).loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"cannot read {path.name}: {error.strerror}") from error
        except ValueError as error:
            raise ConfigError(f"{path.name} is not valid TOML: {error}") from error
        config = cls.from_mapping(values)
        if config.model.model and not Path(config.model.model).is_absolute():
            try:
                resolved = str((path.parent / config.model.model).resolve())
            except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a zero byte
                raise ConfigError(f"model.model: {config.model.model!r} is not a usable path") from error
            config = dataclasses.replace(config, model=dataclasses.replace(config.model, model=resolved))
        return config

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> EngineConfig:
        """Builds the tree from nested mappings: section to option to value. Raises ConfigError as `load`."""
        known = {item.name: item.type for item in dataclasses.fields(cls)}
        sections: dict[str, Any] = {}
        for name, options in values.items():
            if name not in known:
                raise ConfigError(_unknown("section", name, known))
            if not isinstance(options, Mapping):
                raise ConfigError(f"{name}: expected a table, got {type(options).__name__}")
            sections[name] = _build_section(SECTIONS[name], name, typing.cast("Mapping[str, Any]", options))
        return cls(**sections)

    @classmethod
    def from_flags(cls, flags: Mapping[str, Any], base: EngineConfig | None = None) -> EngineConfig:
        """Builds the tree from flat option names (vLLM's, with underscores), over `base`.

        Raises:
            ConfigError: as `load`.
        """
        owners = {option: section for section, kind in SECTIONS.items() for option in _options(kind)}
        values: dict[str, dict[str, Any]] = (base or cls()).to_mapping()
        for name, value in flags.items():
            if name not in owners:
                raise ConfigError(_unknown("option", name, owners))
            values[owners[name]][name] = value
        return cls.from_mapping(values)

    def to_mapping(self) -> dict[str, dict[str, Any]]:
        """The inverse of `from_mapping`; options that are None are left out."""
        return {
            section: {k: v for k, v in dataclasses.asdict(getattr(self, section)).items() if v is not None}
            for section in SECTIONS
        }

    def to_toml(self) -> str:
        """The tree as the text of an engine.toml that `load` reads back."""
        lines: list[str] = []
        for section, options in self.to_mapping().items():
            lines += [f"[{section}]", *(f"{name} = {_toml_value(value)}" for name, value in options.items()), ""]
        return "\n".join(lines)


SECTIONS: dict[str, type] = {
    "model": ModelSection,
    "cache": CacheSection,
    "scheduler": SchedulerSection,
    "observability": ObservabilitySection,
}


def engine_options() -> dict[str, dataclasses.Field[Any]]:
    """Every option by name, with `metadata` help, low, high and choices: what command lines are made from."""
    return {name: option for kind in SECTIONS.values() for name, option in _options(kind).items()}


def option_type(name: str) -> type:
    """The plain type (int, float, bool, str) of an option, without its `| None`."""
    kind = next(kind for kind in SECTIONS.values() if name in _options(kind))
    return _plain_type(typing.get_type_hints(kind)[name])[0]


def _options(kind: type) -> dict[str, dataclasses.Field[Any]]:
    return {item.name: item for item in dataclasses.fields(kind)}


def _build_section(kind: type, section: str, values: Mapping[str, Any]) -> Any:
    options, hints = _options(kind), typing.get_type_hints(kind)
    checked: dict[str, Any] = {}
    for name, value in values.items():
        if name not in options:
            raise ConfigError(_unknown("key", name, options, prefix=f"{section}.") + _other_section(name))
        checked[name] = _check(f"{section}.{name}", value, hints[name], options[name].metadata)
    return kind(**checked)


def _check(path: str, value: Any, hint: Any, metadata: Mapping[str, Any]) -> Any:
    kind, is_optional = _plain_type(hint)
    if value is None and is_optional:
        return None
    # By the exact type, since True is an int; and an integer will do for a float.
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise ConfigError(f"{path}: expected {kind.__name__}, got {_shown(value)}")
    low, high, choices = metadata.get("low"), metadata.get("high"), metadata.get("choices")
    # Asked the positive way, so that NaN is out of range.
    if low is not None and not value >= low:
        raise ConfigError(f"{path}: expected {kind.__name__} >= {low:.12g}, got {_shown(value)}")
    if high is not None and not value <= high:
        raise ConfigError(f"{path}: expected {kind.__name__} <= {high:.12g}, got {_shown(value)}")
    if choices is not None and value not in choices:
        raise ConfigError(f"{path}: expected one of {', '.join(choices)}, got {_shown(value)}")
    return typing.cast("Any", kind)(value)


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print integers of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:80]}..."


def _plain_type(hint: Any) -> tuple[type, bool]:
    if isinstance(hint, types.UnionType):
        plain = [item for item in typing.get_args(hint) if item is not types.NoneType]
        return plain[0], True
    return hint, False


def _unknown(what: str, name: str, known: typing.Iterable[str], prefix: str = "") -> str:
    nearest = difflib.get_close_matches(name, list(known), n=1)
    hint = f"; did you mean {prefix}{nearest[0]}?" if nearest else f"; known are {', '.join(sorted(known))}"
    return f"unknown {what} {prefix}{name}{hint}"


def _other_section(name: str) -> str:
    owner = next((section for section, kind in SECTIONS.items() if name in _options(kind)), None)
    return "" if owner is None else f"; it belongs in [{owner}]"


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):  # a JSON string is a TOML string, but for the one control character JSON leaves as it is
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
