# SPDX-License-Identifier: Apache-2.0
"""Tensors of a GGUF file by the names a Hugging Face checkpoint has for them, and what was done to them on the way.

llama.cpp's converter stores three things differently: rows of Llama's query and key projections in the order its
rotation wants (the two halves of a head interleaved), Gemma's norms with the 1 that is added to them, and all experts
of a layer in one tensor. Each is undone where the tensor is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from wavetrain_engine.errors import CheckpointError
from wavetrain_engine.gguf.block_types import DENSE_TYPES, can_decode
from wavetrain_engine.gguf.gguf_file import GgufFile
from wavetrain_engine.gguf.metadata import shown
from wavetrain_engine.gguf.model_values import ROPE_FACTORS, architecture_of
from wavetrain_engine.tensor_entry import TensorEntry

_LAYER = re.compile(r"blk\.(\d{1,4})\.(.+)\.(weight|bias)")
_OLD_EXPERT = re.compile(r"ffn_(gate|down|up)\.(\d{1,3})")
_STACK = re.compile(r"ffn_(gate|down|up)_exps")
_WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
}
_GEMMA2_MODULES = _MODULES | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_MIXTRAL_MODULES = _MODULES | {"ffn_gate_inp": "block_sparse_moe.gate"}
_EXPERTS = {"gate": "mlp.experts.{}.gate_proj", "up": "mlp.experts.{}.up_proj", "down": "mlp.experts.{}.down_proj"}
_MIXTRAL_EXPERTS = {
    "gate": "block_sparse_moe.experts.{}.w1",
    "up": "block_sparse_moe.experts.{}.w3",
    "down": "block_sparse_moe.experts.{}.w2",
}


@dataclass(frozen=True, slots=True)
class GgufTensor(TensorEntry):
    """One tensor of a GGUF file, or an expert's part of one; `dtype` in that format's spelling.

    Attributes:
        num_heads: the rows are of so many heads, each with its two halves interleaved; 0: they are in order.
        added: what was added to every value.
    """

    num_heads: int = 0
    added: float = 0.0

    @property
    def is_quantized(self) -> bool:
        """Whether its values are in blocks that share a scale."""
        return self.dtype not in DENSE_TYPES


def gguf_tensors(file: GgufFile) -> dict[str, GgufTensor]:
    """Returns the tensors of `file` by their names in a checkpoint; one that no name is known for keeps its own.

    Raises:
        CheckpointError: a tensor's type is not supported, its rows are no whole heads, or two are the same one.
        UnsupportedModelError: the architecture is not served.
    """
    _check_types(file)
    tensors: dict[str, GgufTensor] = {}
    for stored in file.tensors.values():
        if stored.name == ROPE_FACTORS:
            continue
        for tensor in _renamed(stored, file):
            if tensor.name in tensors:
                raise CheckpointError(f"{file.path.name} has {shown(tensor.name)} twice: alone and in a stack")
            tensors[tensor.name] = tensor
    return tensors


def _check_types(file: GgufFile) -> None:
    first_of = {stored.dtype: stored for stored in reversed(file.tensors.values())}
    for dtype, stored in first_of.items():
        if dtype not in DENSE_TYPES and not can_decode(dtype):
            raise CheckpointError(
                f"{file.path.name}: tensor {shown(stored.name)} is of type {dtype}, which is not supported"
            )


def _renamed(stored: TensorEntry, file: GgufFile) -> Iterator[GgufTensor]:
    """Yields one tensor, or each expert's of a stack."""
    architecture = architecture_of(file.metadata)
    plain = GgufTensor(
        stored.file, _WHOLE.get(stored.name, stored.name), stored.dtype, stored.shape, stored.begin, stored.end
    )
    is_gemma = architecture == "gemma2"
    if is_gemma and stored.name.endswith("norm.weight"):
        plain = replace(plain, added=1.0)
    match = _LAYER.fullmatch(stored.name)
    if match is None:
        yield plain
        return
    layer, module, kind = match.groups()
    is_mixtral = architecture == "llama"
    experts = _MIXTRAL_EXPERTS if is_mixtral else _EXPERTS
    prefix = f"model.layers.{int(layer)}"
    stack, single = _STACK.fullmatch(module), _OLD_EXPERT.fullmatch(module)
    if stack is not None and kind == "weight" and len(stored.shape) == 3:
        yield from _unstacked(plain, f"{prefix}.{experts[stack[1]]}.weight")
        return
    if single is not None:
        yield replace(plain, name=f"{prefix}.{experts[single[1]].format(int(single[2]))}.{kind}")
        return
    modules = _GEMMA2_MODULES if is_gemma else _MIXTRAL_MODULES if is_mixtral else _MODULES
    if module in modules:
        plain = replace(plain, name=f"{prefix}.{modules[module]}.{kind}")
    if architecture == "llama" and module in ("attn_q", "attn_k"):
        plain = replace(plain, num_heads=_num_heads(file, is_key=module == "attn_k"))
        if plain.shape[0] % (2 * plain.num_heads):
            raise CheckpointError(
                f"{file.path.name}: tensor {shown(stored.name)} has {plain.shape[0]} rows, which are no "
                f"{plain.num_heads} heads of an even size"
            )
    yield plain


def _unstacked(stack: GgufTensor, name: str) -> Iterator[GgufTensor]:
    num_experts, *shape = stack.shape
    size = stack.num_bytes // num_experts
    for index in range(num_experts):
        begin = stack.begin + index * size
        yield replace(stack, name=name.format(index), shape=tuple(shape), begin=begin, end=begin + size)


def _num_heads(file: GgufFile, *, is_key: bool) -> int:
    metadata = file.metadata
    keys = ["llama.attention.head_count"]
    if is_key and "llama.attention.head_count_kv" in metadata:
        keys = ["llama.attention.head_count_kv"]
    number = metadata.integers(keys[0])[0] if metadata.is_array(keys[0]) else metadata.integer(keys[0])
    if number < 1:
        raise metadata.wrong(keys[0], f"{number} heads")
    return number
