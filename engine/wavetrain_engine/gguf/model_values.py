# SPDX-License-Identifier: Apache-2.0
"""A GGUF file's metadata in the words of config.json and generation_config.json.

Where a file is silent, what llama.cpp assumes for its architecture is meant. Values are checked, as those of any
config.json are, by whoever reads them: here only their types.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from wavetrain_engine.errors import CheckpointError, UnsupportedModelError
from wavetrain_engine.gguf.gguf_file import GgufFile
from wavetrain_engine.gguf.metadata import Metadata, shown
from wavetrain_engine.gguf.vocabulary import end_token_ids
from wavetrain_engine.tensor_entry import TensorEntry

ROPE_FACTORS = "rope_freqs.weight"
_EMBEDDING = "token_embd.weight"
_ARCHITECTURE = "general.architecture"
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Of the three Gemma 2 models the largest, told by its layers, divides scores by another number than the others.
_GEMMA2_27B_LAYERS = 46
# Settings of llama.cpp's sampler that mean what ours of these names do.
_SAMPLING = {"temperature": "temp", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}


def architecture_of(metadata: Metadata) -> str:
    """Returns general.architecture.

    Raises:
        UnsupportedModelError: it is none that is served.
    """
    name = metadata.string(_ARCHITECTURE)
    if name not in _FAMILIES:
        raise UnsupportedModelError(
            f"{metadata.where}: {_ARCHITECTURE} {shown(name)} is not supported; supported are {', '.join(_FAMILIES)}"
        )
    kind = metadata.string("general.type", "model")
    if kind != "model":
        raise UnsupportedModelError(f"{metadata.where} holds no model: its general.type is {shown(kind)}")
    return name


def config_values(file: GgufFile) -> dict[str, Any]:
    """Returns what config.json would say of the model.

    Raises:
        CheckpointError: a value or tensor that it follows from is missing or of a wrong type.
        UnsupportedModelError: an architecture or feature that is not served.
    """
    metadata = file.metadata
    architecture = architecture_of(metadata)
    embedding = file.tensors.get(_EMBEDDING)
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{metadata.where} lacks the tensor {_EMBEDDING} [vocabulary, hidden size]")

    def key(name: str) -> str:
        return f"{architecture}.{name}"

    num_heads = _same_for_all(metadata, key("attention.head_count"))
    values: dict[str, Any] = {
        "vocab_size": embedding.shape[0],
        "hidden_size": metadata.integer(key("embedding_length")),
        "num_hidden_layers": metadata.integer(key("block_count")),
        "intermediate_size": _same_for_all(
            metadata, key("feed_forward_length"), metadata.optional_integer(key("expert_feed_forward_length"))
        ),
        "num_attention_heads": num_heads,
        "num_key_value_heads": _same_for_all(metadata, key("attention.head_count_kv"), num_heads),
        "head_dim": _head_dim(metadata, key, num_heads),
        "max_position_embeddings": metadata.integer(key("context_length")),
        "rms_norm_eps": metadata.number(key("attention.layer_norm_rms_epsilon")),
        "rope_parameters": _rope(metadata, key),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors,
        "dtype": _dtype(embedding, file),
        "sliding_window": None,
    }
    _refuse_scales(metadata, key)
    return values | _FAMILIES[architecture](file, values)


def generation_values(file: GgufFile) -> dict[str, Any]:
    """Returns what generation_config.json would say.

    Raises:
        CheckpointError: a value is of a wrong type.
    """
    metadata = file.metadata
    values: dict[str, Any] = {"eos_token_id": end_token_ids(metadata)}
    for name, key in _SAMPLING.items():
        if f"general.sampling.{key}" in metadata:
            values[name] = metadata.number(f"general.sampling.{key}")
    if "top_k" in values:
        values["top_k"] = int(values["top_k"])
    return values


def frequency_factors(file: GgufFile) -> tuple[float, ...]:
    """Returns what each pair of dimensions turns slower by; empty where they turn as `rope_parameters` says.

    Raises:
        CheckpointError: they are not float32, or cannot be read.
    """
    tensor = file.tensors.get(ROPE_FACTORS)
    if tensor is None:
        return ()
    if tensor.dtype != "F32" or len(tensor.shape) != 1 or tensor.num_bytes > 2**12:
        raise CheckpointError(
            f"{file.metadata.where}: tensor {ROPE_FACTORS} must be F32 and one for each pair of a head's dimensions, "
            f"not {tensor.dtype} {list(tensor.shape)}"
        )
    try:
        with tensor.file.open("rb") as stream:
            stream.seek(tensor.begin)
            raw = stream.read(tensor.num_bytes)
        factors: tuple[float, ...] = struct.unpack(f"<{tensor.shape[0]}f", raw)
    except (OSError, struct.error) as error:
        raise CheckpointError(f"cannot read tensor {ROPE_FACTORS} of {tensor.file.name}") from error
    if not all(1e-6 < factor < 1e6 for factor in factors):
        raise CheckpointError(f"{file.metadata.where}: tensor {ROPE_FACTORS} holds a value that is no factor")
    return factors


def _llama(file: GgufFile, values: dict[str, Any]) -> dict[str, Any]:
    """Llama, and what has its shape: Mistral, and Mixtral with its experts."""
    metadata = file.metadata
    num_experts = metadata.integer("llama.expert_count", 0)
    if num_experts:
        return {
            "architectures": ["MixtralForCausalLM"],
            "num_local_experts": num_experts,
            "num_experts_per_tok": metadata.integer("llama.expert_used_count"),
        }
    window = metadata.optional_integer("llama.attention.sliding_window")
    if window is not None and not values["attention_bias"] and not values["mlp_bias"]:
        return {"architectures": ["MistralForCausalLM"], "sliding_window": window}
    return {"architectures": ["LlamaForCausalLM"]}


def _qwen2(file: GgufFile, values: dict[str, Any]) -> dict[str, Any]:
    del file, values
    return {"architectures": ["Qwen2ForCausalLM"]}


def _qwen3(file: GgufFile, values: dict[str, Any]) -> dict[str, Any]:
    del file, values
    return {"architectures": ["Qwen3ForCausalLM"]}


def _qwen3_moe(file: GgufFile, values: dict[str, Any]) -> dict[str, Any]:
    layers = range(min(values["num_hidden_layers"], len(file.tensors)))
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": file.metadata.integer("qwen3moe.expert_count"),
        "num_experts_per_tok": file.metadata.integer("qwen3moe.expert_used_count"),
        "moe_intermediate_size": file.metadata.integer("qwen3moe.expert_feed_forward_length"),
        "norm_topk_prob": True,
        "mlp_only_layers": [layer for layer in layers if f"blk.{layer}.ffn_gate_inp.weight" not in file.tensors],
    }


def _gemma2(file: GgufFile, values: dict[str, Any]) -> dict[str, Any]:
    metadata = file.metadata
    scale = metadata.optional_number("gemma2.attention.scale")
    scalar = values["head_dim"]
    if scale is not None and scale > 0:
        scalar = scale**-2
    elif values["num_hidden_layers"] == _GEMMA2_27B_LAYERS:
        scalar = values["hidden_size"] / max(values["num_attention_heads"], 1)
    return {
        "architectures": ["Gemma2ForCausalLM"],
        "sliding_window": metadata.integer("gemma2.attention.sliding_window", 4096),
        "attn_logit_softcapping": metadata.number("gemma2.attn_logit_softcapping", 50.0),
        "final_logit_softcapping": metadata.number("gemma2.final_logit_softcapping", 30.0),
        "query_pre_attn_scalar": scalar,
    }


_FAMILIES: dict[str, Callable[[GgufFile, dict[str, Any]], dict[str, Any]]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3moe": _qwen3_moe,
    "gemma2": _gemma2,
}


def _same_for_all(metadata: Metadata, key: str, default: int | None = None) -> int:
    """Returns a number that a file may give for each layer; all must be one."""
    if not metadata.is_array(key):
        return metadata.integer(key, default)
    numbers = set(metadata.integers(key))
    if len(numbers) != 1:
        raise UnsupportedModelError(f"{metadata.where}: {key} differs between layers, which is not supported")
    return numbers.pop()


def _head_dim(metadata: Metadata, key: Callable[[str], str], num_heads: int) -> int:
    default = metadata.integer(key("embedding_length")) // max(num_heads, 1)
    head_dim = metadata.integer(key("attention.key_length"), default)
    for name in ("attention.value_length", "rope.dimension_count"):
        if metadata.integer(key(name), head_dim) != head_dim:
            raise UnsupportedModelError(
                f"{metadata.where}: {key(name)} {metadata.integer(key(name))} differs from the {head_dim} dimensions "
                "of a key, which is not supported"
            )
    return head_dim


def _rope(metadata: Metadata, key: Callable[[str], str]) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": metadata.number(key("rope.freq_base"), 10000.0)}
    kind = metadata.string(key("rope.scaling.type"), "none")
    # An early name of the factor, for linear scaling.
    old_factor = metadata.optional_number(key("rope.scale_linear"))
    if kind == "none" and (old_factor is None or old_factor == 1):
        return rope
    if kind not in ("none", "linear", "yarn"):
        raise UnsupportedModelError(
            f"{metadata.where}: {key('rope.scaling.type')} {shown(kind)} is not supported, only linear and yarn are"
        )
    rope |= {
        "rope_type": "linear" if kind == "none" else kind,
        "factor": metadata.number(key("rope.scaling.factor"), old_factor),
    }
    if kind == "yarn":
        names = {
            "original_max_position_embeddings": metadata.optional_integer(key("rope.scaling.original_context_length")),
            "beta_fast": metadata.optional_number(key("rope.scaling.yarn_beta_fast")),
            "beta_slow": metadata.optional_number(key("rope.scaling.yarn_beta_slow")),
        }
        rope |= {name: value for name, value in names.items() if value is not None}
    return rope


def _refuse_scales(metadata: Metadata, key: Callable[[str], str]) -> None:
    """Refuses numbers that the families here do not multiply by; other values of them than 1 are of other families."""
    for name in (
        "logit_scale",
        "residual_scale",
        "embedding_scale",
        "rope.scaling.attn_factor",
        "rope.scaling.yarn_attn_factor",
        "rope.scaling.yarn_ext_factor",
    ):
        if metadata.number(key(name), 1.0) != 1.0:
            raise UnsupportedModelError(f"{metadata.where}: {key(name)} is not supported")


def _dtype(embedding: TensorEntry, file: GgufFile) -> str:
    """Returns the dtype to compute in: that of the largest tensors; of quantized ones, the one of widest range."""
    matrices = [tensor.dtype for tensor in file.tensors.values() if len(tensor.shape) > 1]
    usual = max(sorted(set(matrices)), key=matrices.count, default=embedding.dtype)
    return _DTYPES.get(usual, "bfloat16")
