# SPDX-License-Identifier: Apache-2.0
"""config.json → ModelConfig, by an allow-list of our own, without torch.

Only the keys named here are read, each with its type and range. A key that would change the computation in a
way we do not serve (partial rotation, bidirectional attention) is refused by name; code shipped
with a checkpoint (`auto_map`) is never run, and not needed for the architectures below.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from wavetrain_engine.config_reader import ConfigReader
from wavetrain_engine.errors import CheckpointError, ConfigError, UnsupportedModelError
from wavetrain_engine.gguf.gguf_file import GgufFile
from wavetrain_engine.gguf.model_values import config_values, frequency_factors
from wavetrain_engine.layers.rope_config import RopeConfig
from wavetrain_engine.model_location import ModelLocation
from wavetrain_engine.models.moe_config import MoeConfig, parse_moe
from wavetrain_engine.models.rope_parameters import parse_rope
from wavetrain_engine.quantization.quantization_config import parse_quantization
from wavetrain_engine.quantization.stored_format import QuantizationConfig

# Four times the longest context of these families. It bounds the rotary table, the one allocation whose size no
# tensor of the checkpoint confirms; and float32, which positions are multiplied in, is exact far beyond.
_MAX_POSITIONS = 2**22
_MAX_CONFIG_BYTES = 2**20
_DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Family:
    """What transformers assumes where a family's config.json is silent."""

    model_type: str
    num_kv_heads: int | None = None  # None: as many as attention heads
    head_dim: int | None = None  # None: hidden_size / attention heads
    tie_word_embeddings: bool = False
    max_position_embeddings: int
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    sliding_window: int | None = 4096


_FAMILIES: dict[str, _Family] = {
    "LlamaForCausalLM": _Family(model_type="llama", max_position_embeddings=2048),
    "MistralForCausalLM": _Family(model_type="mistral", num_kv_heads=8, max_position_embeddings=4096 * 32),
    "MixtralForCausalLM": _Family(
        model_type="mixtral",
        num_kv_heads=8,
        max_position_embeddings=4096 * 32,
        rms_norm_eps=1e-5,
        rope_theta=1e6,
        sliding_window=None,
    ),
    "Qwen2ForCausalLM": _Family(model_type="qwen2", max_position_embeddings=32768),
    "Qwen3ForCausalLM": _Family(model_type="qwen3", head_dim=128, max_position_embeddings=32768),
    "Qwen3MoeForCausalLM": _Family(model_type="qwen3_moe", num_kv_heads=4, max_position_embeddings=32768),
    "Gemma2ForCausalLM": _Family(
        model_type="gemma2",
        num_kv_heads=4,
        head_dim=256,
        tie_word_embeddings=True,
        max_position_embeddings=8192,
        hidden_act="gelu_pytorch_tanh",
    ),
}

# Families whose layers all have the window, or none has.
_ONE_WINDOW = ("mistral", "mixtral", "qwen3_moe")

ARCHITECTURES: tuple[str, ...] = tuple(_FAMILIES)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder's shape and arithmetic, complete: nothing is looked up in config.json later.

    Attributes:
        attention_bias: whether the q, k and v projections have a bias.
        attention_output_bias: whether the projection after attention has one.
        sliding_windows: per layer, how many tokens back it sees, its own included; None: all.
        attention_soft_cap: attention scores s become cap * tanh(s / cap); None: as they are.
        logit_soft_cap: the same for the logits.
        query_pre_attn_scalar: attention scores are divided by its square root; usually head_dim.
        moe: of families with mixtures of experts.
        dtype: of the checkpoint: float32, float16 or bfloat16.
        quantization: which layers are quantized, and how; None: none is, or a GGUF file that says so itself.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    attention_output_bias: bool
    mlp_bias: bool
    sliding_windows: tuple[int | None, ...]
    attention_soft_cap: float | None
    logit_soft_cap: float | None
    query_pre_attn_scalar: float
    hidden_act: str
    moe: MoeConfig | None
    dtype: str
    quantization: QuantizationConfig | None

    @classmethod
    def load(cls, model_dir: Path) -> ModelConfig:
        """Reads `model_dir`/config.json, or the metadata of the GGUF file that it is or holds.

        Raises:
            CheckpointError: no such directory or file, or no config.json in it; or a broken GGUF file.
            ConfigError: not JSON; a value is missing, of the wrong type or out of range.
            UnsupportedModelError: an architecture or feature that is not served.
        """
        gguf = ModelLocation.find(model_dir).gguf
        return cls.from_mapping(_read_json(model_dir)) if gguf is None else _from_gguf(GgufFile.open(gguf))

    @classmethod
    def from_mapping(cls, values: dict[str, Any]) -> ModelConfig:
        """Builds it from the content of a config.json. Raises as `load`."""
        config = ConfigReader(values, "config.json")
        architecture = _architecture(config)
        family = _FAMILIES[architecture]
        _refuse_unsupported(config, architecture, family)

        num_layers = config.integer("num_hidden_layers", high=1024)
        hidden_size = config.integer("hidden_size", high=2**17)
        num_heads, num_kv_heads, head_dim = _heads(config, family, hidden_size)
        positions = config.integer("max_position_embeddings", family.max_position_embeddings, high=_MAX_POSITIONS)
        has_attention_bias = family.model_type not in ("mistral", "mixtral", "qwen2") and config.boolean(
            "attention_bias", False
        )
        is_gemma2 = family.model_type == "gemma2"
        return cls(
            architecture=architecture,
            vocab_size=config.integer("vocab_size", high=2**22),
            hidden_size=hidden_size,
            intermediate_size=config.integer("intermediate_size", high=2**20),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=config.number("rms_norm_eps", family.rms_norm_eps, low=0, high=1),
            rope=parse_rope(config, positions, _MAX_POSITIONS, default_theta=family.rope_theta),
            max_position_embeddings=positions,
            tie_word_embeddings=config.boolean("tie_word_embeddings", family.tie_word_embeddings),
            # Qwen2 has the bias on q, k and v only, and no switch for it.
            attention_bias=has_attention_bias or family.model_type == "qwen2",
            attention_output_bias=has_attention_bias,
            mlp_bias=family.model_type == "llama" and config.boolean("mlp_bias", False),
            sliding_windows=_sliding_windows(config, family, num_layers),
            attention_soft_cap=_soft_cap(config, "attn_logit_softcapping", 50.0) if is_gemma2 else None,
            logit_soft_cap=_soft_cap(config, "final_logit_softcapping", 30.0) if is_gemma2 else None,
            query_pre_attn_scalar=(
                config.number("query_pre_attn_scalar", 256, low=0, high=2**20) if is_gemma2 else float(head_dim)
            ),
            hidden_act=family.hidden_act,
            moe=parse_moe(config, family.model_type, num_layers),
            dtype=_dtype(config),
            quantization=parse_quantization(config),
        )

    @property
    def max_model_len(self) -> int:
        """Tokens of a request (prompt and output) that the model serves unless told otherwise.

        Of `dynamic` scaling the length it has without scaling: see `max_model_len_limit`.
        """
        return self.max_position_embeddings if self.rope.rope_type == "dynamic" else self.max_model_len_limit

    @property
    def max_model_len_limit(self) -> int:
        """The longest max_model_len that makes sense: what the scaled positions reach, as vLLM counts it.

        `dynamic` scaling blurs short requests a little wherever max_model_len exceeds
        max_position_embeddings (`layers.rotary` has the reason), so it has to be asked for.
        """
        rope = self.rope
        if rope.rope_type == "yarn":
            reached = max(self.max_position_embeddings, int(rope.original_max_position_embeddings * rope.factor))
        elif rope.rope_type in ("linear", "dynamic"):
            reached = int(self.max_position_embeddings * rope.factor)
        else:
            reached = self.max_position_embeddings
        return min(reached, _MAX_POSITIONS)


def _from_gguf(file: GgufFile) -> ModelConfig:
    try:
        config = ModelConfig.from_mapping(config_values(file))
    except (ConfigError, UnsupportedModelError) as error:
        raise type(error)(f"{file.path.name}, its metadata read as a config.json: {error}") from error
    factors = frequency_factors(file)
    if factors and len(factors) != config.head_dim // 2:
        raise CheckpointError(
            f"{file.path.name}: tensor rope_freqs.weight has {len(factors)} values for heads of {config.head_dim}"
        )
    return replace(config, rope=replace(config.rope, frequency_factors=factors))


def _read_json(model_dir: Path) -> dict[str, Any]:
    path = model_dir / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"{model_dir.name!r} has no config.json: a Hugging Face checkpoint directory or a GGUF file is expected"
        )
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise ConfigError(f"config.json is larger than {_MAX_CONFIG_BYTES} bytes")
        values: object = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read config.json: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"config.json is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError("config.json must hold a JSON object")
    return cast("dict[str, Any]", values)


def _architecture(config: ConfigReader) -> str:
    names = config.strings("architectures")
    for name in names:
        if name in _FAMILIES:
            return name
    model_type = config.string("model_type", "")
    if not names:
        for architecture, family in _FAMILIES.items():
            if family.model_type == model_type:
                return architecture
    if not names and not model_type:
        raise ConfigError(f"config.json: architectures is missing; supported are {', '.join(ARCHITECTURES)}")
    asked = names[0] if names else model_type
    known = ARCHITECTURES if names else tuple(family.model_type for family in _FAMILIES.values())
    nearest = difflib.get_close_matches(asked, known, n=1)
    hint = f"; the nearest is {nearest[0]}" if nearest else ""
    code = "; code shipped with a checkpoint (auto_map) is never run" if config.value("auto_map") else ""
    raise UnsupportedModelError(
        f"architecture {asked[:80]!r} is not supported; supported are {', '.join(ARCHITECTURES)}{hint}{code}"
    )


def _refuse_unsupported(config: ConfigReader, architecture: str, family: _Family) -> None:
    for key in ("is_encoder_decoder", "use_bidirectional_attention", "add_cross_attention"):
        if config.boolean(key, False):
            raise UnsupportedModelError(f"config.json: {key} is not supported: {architecture} is served as a decoder")
    act_key = "hidden_activation" if family.model_type == "gemma2" else "hidden_act"
    hidden_act = config.string(act_key, family.hidden_act)
    if hidden_act != family.hidden_act:
        raise UnsupportedModelError(
            f"config.json: {act_key} {hidden_act[:40]!r} is not supported for {architecture}, "
            f"only {family.hidden_act!r} is"
        )


def _heads(config: ConfigReader, family: _Family, hidden_size: int) -> tuple[int, int, int]:
    """Returns num_heads, num_kv_heads, head_dim."""
    num_heads = config.integer("num_attention_heads", high=1024)
    num_kv_heads = config.integer("num_key_value_heads", family.num_kv_heads or num_heads, high=1024)
    if num_heads % num_kv_heads:
        raise ConfigError(
            f"config.json: num_attention_heads ({num_heads}) must be a multiple of num_key_value_heads ({num_kv_heads})"
        )
    has_own = config.value("head_dim") is not None or family.head_dim is not None
    if not has_own and hidden_size % num_heads:
        raise ConfigError(
            f"config.json: hidden_size ({hidden_size}) must be a multiple of num_attention_heads ({num_heads}) "
            "where head_dim is not given"
        )
    head_dim = config.integer("head_dim", family.head_dim or hidden_size // num_heads or None, high=1024)
    if head_dim % 2:
        raise ConfigError(f"config.json: head_dim must be even, got {head_dim}")
    return num_heads, num_kv_heads, head_dim


def _sliding_windows(config: ConfigReader, family: _Family, num_layers: int) -> tuple[int | None, ...]:
    """Returns each layer's window, by the rules of its family in transformers."""
    if family.model_type == "llama":
        return (None,) * num_layers
    window = _window(config, family)
    kinds = config.strings("layer_types")
    if not kinds:
        kinds = [
            "sliding_attention" if is_sliding else "full_attention"
            for is_sliding in _default_layers(config, family, num_layers, has_window=window is not None)
        ]
    unknown = sorted(set(kinds) - {"sliding_attention", "full_attention"})
    if unknown:
        raise UnsupportedModelError(
            f"config.json: layer_types {unknown[0][:40]!r} is not supported; "
            "supported are full_attention, sliding_attention"
        )
    if family.model_type in _ONE_WINDOW and set(kinds) != {"full_attention" if window is None else "sliding_attention"}:
        # transformers does not look at layer_types there: one of the two would be served wrong.
        raise UnsupportedModelError(
            f"config.json: layer_types of several kinds is not supported for {family.model_type}"
        )
    if len(kinds) != num_layers:
        raise ConfigError(f"config.json: layer_types has {len(kinds)} entries for {num_layers} layers")
    if "sliding_attention" in kinds and window is None:
        raise ConfigError("config.json: layer_types has sliding_attention, but no sliding_window is set")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _window(config: ConfigReader, family: _Family) -> int | None:
    if family.model_type in ("qwen2", "qwen3", "qwen3_moe") and not config.boolean("use_sliding_window", False):
        return None
    if (config.has("sliding_window") or family.sliding_window is None) and config.value("sliding_window") is None:
        return None
    return config.integer("sliding_window", family.sliding_window, high=2**31)


def _default_layers(config: ConfigReader, family: _Family, num_layers: int, *, has_window: bool) -> list[bool]:
    """Returns which layers have the window where layer_types does not say."""
    if family.model_type == "gemma2":
        return [layer % 2 == 0 for layer in range(num_layers)]
    first = 0 if family.model_type in _ONE_WINDOW else config.integer("max_window_layers", 28, low=0, high=2**31)
    return [has_window and layer >= first for layer in range(num_layers)]


def _soft_cap(config: ConfigReader, name: str, default: float) -> float | None:
    if config.has(name) and config.value(name) is None:
        return None
    return config.number(name, default, low=0, high=1e6)


def _dtype(config: ConfigReader) -> str:
    name = config.string("dtype", config.string("torch_dtype", "float32")).removeprefix("torch.")
    if name not in _DTYPES:
        raise UnsupportedModelError(
            f"config.json: dtype {name[:40]!r} is not supported; one of {', '.join(_DTYPES)} is"
        )
    return name
