# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of Hugging Face's form as GGUF files, written as llama.cpp's converter writes them, by the gguf package.

Nothing here uses our own reader. `write_raw` writes any bytes a test wants a file to have.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file

_WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_MODULES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "mlp.experts.gate_up_proj": "ffn_gate_up",
    "mlp.experts.down_proj": "ffn_down_exps",
}
_GEMMA2_MODULES = _MODULES | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "MixtralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3moe",
    "Gemma2ForCausalLM": "gemma2",
}
_EXPERT_PARTS = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down"}


@dataclass(frozen=True)
class RawTensor:
    """A tensor as a file has it: its shape with the rows first, its blocks' bytes."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    data: np.ndarray


def write_gguf(
    checkpoint: Path,
    path: Path,
    *,
    kind: str = "F32",
    kinds: Mapping[str, str] | None = None,
    pre: str = "gpt-2",
    **metadata: Any,
) -> Path:
    """Writes the checkpoint in directory `checkpoint` as the file `path`, and returns that.

    Args:
        kind: the type of matrices (F32, F16, BF16, Q8_0, ...); vectors and routers are F32.
        kinds: other types, by the end of a tensor's name in the file without its suffix: {"attn_v": "Q6_K"}.
        pre: the name of the pre-tokenizer.
        metadata: keys to add or replace, dots written as __; None removes one.
    """
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    architecture = _ARCHITECTURES[config["architectures"][0]]
    values = _model_values(config, architecture)
    if (checkpoint / "tokenizer.json").is_file():
        values |= _tokenizer_values(checkpoint, config, pre)
    values |= {name.replace("__", "."): value for name, value in metadata.items()}
    writer = GGUFWriter(path, architecture)
    for key, value in values.items():
        if value is not None:
            _add(writer, key, value)
    for name, tensor in _tensors(checkpoint, config, architecture).items():
        wanted = (kinds or {}).get(name.rsplit(".", 2)[-2], kind)
        is_vector = tensor.ndim == 1 or "ffn_gate_inp" in name
        blocks = encode(tensor, "F32" if is_vector else wanted)
        writer.add_tensor(name, blocks.data, raw_shape=blocks.data.shape, raw_dtype=blocks.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def encode(tensor: np.ndarray, kind: str) -> RawTensor:
    """Quantizes a tensor; K types, which the package cannot write, by a plain rounding of our own."""
    dtype = GGMLQuantizationType[kind]
    wide = np.ascontiguousarray(tensor, dtype=np.float32)
    if kind == "BF16":
        data = torch.from_numpy(wide).bfloat16().view(torch.int16).numpy().view(np.uint16).view(np.uint8)
        return RawTensor(tensor.shape, dtype, data)
    packers = {"Q4_K": _q4_k, "Q6_K": _q6_k}
    data = packers[kind](wide) if kind in packers else quantize(wide, dtype)
    return RawTensor(tensor.shape, dtype, data)


def decode(tensor: np.ndarray, kind: str) -> np.ndarray:
    """What a tensor is once it was written as `kind`: the package's own numbers."""
    raw = encode(tensor, kind)
    return dequantize(raw.data, raw.kind).reshape(tensor.shape)


def random_blocks(kind: str, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Returns random bytes [rows, bytes] of blocks whose float16 scales are finite: every bit of a layout in use."""
    block, num_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    data = np.random.default_rng(seed).integers(0, 256, (rows, columns // block, num_bytes), dtype=np.uint8)
    for start in _HALVES.get(kind, ()):
        # The exponent of all ones, infinity and NaN, is out of reach without its highest bit.
        data[..., start + 1] &= 0xBF
    if kind == "MXFP4":
        data[..., 0] &= 0x7F  # its scale is a power of two, by the exponent
    return data.reshape(rows, -1)


# Where the float16 of a type's block begin.
_HALVES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,), "IQ3_S": (0,), "IQ2_XXS": (0,),
}  # fmt: skip


def write_raw(
    path: Path,
    values: Sequence[tuple[str, int, bytes]],
    tensors: Sequence[tuple[str, tuple[int, ...], int, int]],
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> Path:
    """Writes a file byte by byte.

    Args:
        values: key, number of its type, bytes of its value.
        tensors: name, dimensions in the order of the file, number of its type, offset.
        counts: of tensors and of values; None: the true ones.
    """
    num_tensors, num_values = counts or (len(tensors), len(values))
    head = magic + struct.pack("<IQQ", version, num_tensors, num_values)
    for key, kind, value in values:
        head += text(key) + struct.pack("<I", kind) + value
    for name, dimensions, kind, offset in tensors:
        head += text(name) + struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, kind, offset)
    path.write_bytes(head + bytes(-len(head) % 32) + data)
    return path


def text(value: str) -> bytes:
    """A string as the format has it."""
    raw = value.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def _model_values(config: dict[str, Any], architecture: str) -> dict[str, Any]:
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    rope = config.get("rope_parameters") or {}
    values: dict[str, Any] = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
        "rope.freq_base": float(rope.get("rope_theta") or config["rope_theta"]),
        "vocab_size": config["vocab_size"],
    }
    if rope.get("rope_type") in ("linear", "yarn"):
        values |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": float(rope["factor"])}
        if rope["rope_type"] == "yarn":
            values["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    experts = config.get("num_local_experts") or config.get("num_experts")
    if experts:
        values |= {"expert_count": experts, "expert_used_count": config["num_experts_per_tok"]}
        values["expert_feed_forward_length"] = config.get("moe_intermediate_size")
    if architecture == "gemma2":
        values |= {
            "attention.sliding_window": config["sliding_window"],
            "attn_logit_softcapping": float(config["attn_logit_softcapping"]),
            "final_logit_softcapping": float(config["final_logit_softcapping"]),
            "attention.scale": config["query_pre_attn_scalar"] ** -0.5,
        }
    elif config["architectures"][0] == "MistralForCausalLM":
        values["attention.sliding_window"] = config["sliding_window"]
    return {f"{architecture}.{name}": value for name, value in values.items()}


def _tokenizer_values(checkpoint: Path, config: dict[str, Any], pre: str) -> dict[str, Any]:
    """The byte-level or SentencePiece tokenizer of a tokenizer.json."""
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text(encoding="utf-8"))
    settings = json.loads((checkpoint / "tokenizer_config.json").read_text(encoding="utf-8"))
    ids: dict[str, int] = dict(tokenizer["model"]["vocab"])
    added = {token["content"]: token for token in tokenizer["added_tokens"]}
    ids |= {text: token["id"] for text, token in added.items()}
    texts = {index: text for text, index in ids.items()}
    tokens, types, scores = [], [], []
    is_bytes = not tokenizer["model"].get("byte_fallback")
    merged = [
        "".join(merge.split(" ", 1) if isinstance(merge, str) else merge) for merge in tokenizer["model"]["merges"]
    ]
    rank = {text: index for index, text in reversed(list(enumerate(merged)))}
    for index in range(config["vocab_size"]):
        token = texts.get(index, f"[PAD{index}]")
        kind = TokenType.NORMAL if index in texts else TokenType.UNUSED
        if token in added:
            kind = TokenType.CONTROL if added[token]["special"] else TokenType.USER_DEFINED
        elif not is_bytes and token.startswith("<0x"):
            kind = TokenType.BYTE
        if token == settings.get("unk_token"):
            kind = TokenType.UNKNOWN
        tokens.append(token)
        types.append(int(kind))
        scores.append(-float(rank.get(token, len(rank) + index)))
    values: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2" if is_bytes else "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.chat_template": settings.get("chat_template"),
        "tokenizer.ggml.add_bos_token": _adds_bos(tokenizer, settings),
    }
    if is_bytes:
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
        values |= {"tokenizer.ggml.pre": pre, "tokenizer.ggml.merges": merges}
    else:
        values["tokenizer.ggml.scores"] = scores
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        if isinstance(settings.get(f"{name}_token"), str):
            values[f"tokenizer.ggml.{key}_token_id"] = ids[settings[f"{name}_token"]]
    return values


def _adds_bos(tokenizer: dict[str, Any], settings: dict[str, Any]) -> bool | None:
    """As the package's SpecialVocab has it: what is put in front of a text counts, else what the settings say."""
    first = ((tokenizer.get("post_processor") or {}).get("single") or [{}])[0]
    if first.get("SpecialToken", {}).get("id") == settings.get("bos_token"):
        return True
    return settings.get("add_bos_token")


def _tensors(checkpoint: Path, config: dict[str, Any], architecture: str) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    experts: dict[str, dict[int, np.ndarray]] = {}
    modules = _GEMMA2_MODULES if architecture == "gemma2" else _MODULES
    for name, tensor in load_file(checkpoint / "model.safetensors").items():
        values = tensor.float().numpy()
        if name in _WHOLE:
            tensors[_WHOLE[name]] = values + (1 if architecture == "gemma2" and "norm" in name else 0)
            continue
        _, _, layer, module = name.split(".", 3)
        if ".experts." in module:
            _, _, rest = module.partition(".experts.")
            number, part, _ = rest.split(".")
            experts.setdefault(f"blk.{layer}.ffn_{_EXPERT_PARTS[part]}_exps.weight", {})[int(number)] = values
            continue
        module, _, suffix = module.rpartition(".")
        if architecture == "gemma2" and "norm" in module:
            values = values + 1
        if architecture == "llama" and module in ("self_attn.q_proj", "self_attn.k_proj"):
            heads = config["num_attention_heads" if module.endswith("q_proj") else "num_key_value_heads"]
            values = values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
        tensors[f"blk.{layer}.{modules[module]}.{suffix}"] = values
    for name, parts in experts.items():
        tensors[name] = np.stack([parts[index] for index in range(len(parts))])
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type") == "llama3":
        tensors["rope_freqs.weight"] = _llama3_factors(config, rope)
    return tensors


def _llama3_factors(config: dict[str, Any], rope: dict[str, Any]) -> np.ndarray:
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    waves = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
    original, factor = rope["original_max_position_embeddings"], rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = np.clip((original / waves - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _q4_k(wide: np.ndarray) -> np.ndarray:
    groups = wide.reshape(-1, 8, 32)
    low, high = np.minimum(groups.min(-1), 0), np.maximum(groups.max(-1), 0)
    scale, minimum = (high - low) / 15, -low
    d, shares = _shares(scale, 63)
    dmin, minimum_shares = _shares(minimum, 63)
    step = (d * shares)[..., None]
    codes = np.where(step > 0, np.round((groups + (dmin * minimum_shares)[..., None]) / np.where(step > 0, step, 1)), 0)
    codes = codes.clip(0, 15).astype(np.uint8).reshape(-1, 4, 2, 32)
    packed = (codes[:, :, 0] | codes[:, :, 1] << 4).reshape(len(groups), 128)
    s, m = shares.astype(np.uint8), minimum_shares.astype(np.uint8)
    first = s[:, :4] | (s[:, 4:] >> 4) << 6
    second = m[:, :4] | (m[:, 4:] >> 4) << 6
    third = s[:, 4:] & 15 | (m[:, 4:] & 15) << 4
    return _rows(wide, [_half(d), _half(dmin), first, second, third, packed])


def _q6_k(wide: np.ndarray) -> np.ndarray:
    groups = wide.reshape(-1, 16, 16)
    d, shares = _shares(np.abs(groups).max(-1) / 31, 127)
    step = (d * shares)[..., None]
    codes = np.where(step > 0, np.round(groups / np.where(step > 0, step, 1)), 0).clip(-32, 31).astype(np.int8) + 32
    codes = codes.astype(np.uint8).reshape(-1, 2, 4, 32)
    low = np.stack([codes[:, :, i] & 15 | (codes[:, :, i + 2] & 15) << 4 for i in range(2)], axis=2)
    high = sum((codes[:, :, i] >> 4) << 2 * i for i in range(4))
    count = len(groups)
    parts = [low.reshape(count, 128), high.reshape(count, 64), shares.astype(np.int8).view(np.uint8), _half(d)]
    return _rows(wide, parts)


def _shares(values: np.ndarray, largest: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns a float16 scale of each block [N, 1], and each group's whole number of it [N, groups]."""
    d = (values.max(-1, keepdims=True) / largest).astype(np.float16).astype(np.float32)
    return d, np.where(d > 0, np.round(values / np.where(d > 0, d, 1)), 0).clip(0, largest)


def _half(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float16).view(np.uint8)


def _rows(wide: np.ndarray, parts: list[np.ndarray]) -> np.ndarray:
    blocks = np.concatenate(parts, axis=-1)
    return blocks.reshape(*wide.shape[:-1], -1)
