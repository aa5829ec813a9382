# SPDX-License-Identifier: Apache-2.0
"""Checkpoints whose experts are saved in one tensor a layer, read as if each expert had its own.

    usual       block_sparse_moe.experts.3.w1.weight [I, H]    (Mixtral)    mlp.experts.3.gate_proj.weight (Qwen3-MoE)
    stacked     mlp.experts.gate_up_proj [E, 2 * I, H], mlp.experts.down_proj [E, H, I]

transformers 5 has the second form in memory, and writes it where it is told not to go back to the usual one. An
expert's matrices lie in such a tensor as they would alone, so each is a range of its bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from wavetrain_engine.errors import CheckpointError
from wavetrain_engine.layers.moe import ExpertProjection, MixtureOfExperts
from wavetrain_engine.tensor_entry import TensorEntry
from wavetrain_engine.weights.checkpoint import first_few

# E = experts, I = units of an expert, H = hidden size.


def unstack_experts(tensors: Mapping[str, TensorEntry], model: nn.Module) -> dict[str, TensorEntry]:
    """Returns the tensors of a checkpoint with stacks of experts taken apart, by the names that `model` has for them.

    Raises:
        CheckpointError: a stack has another shape than the model's, or its experts are there one by one too.
    """
    result = dict(tensors)
    for path, module in model.named_modules():
        if isinstance(module, MixtureOfExperts):
            _unstack(result, module, own=f"model.{path}", stacked=f"model.{path.rpartition('.')[0]}.mlp")
    return result


def _unstack(tensors: dict[str, TensorEntry], mixture: MixtureOfExperts, *, own: str, stacked: str) -> None:
    router = f"{stacked}.gate.weight"
    if own != stacked and router in tensors:
        _add(tensors, f"{own}.gate.weight", tensors.pop(router))
    for attribute, name in (("gate_up", "gate_up_proj"), ("down", "down_proj")):
        stack = tensors.pop(f"{stacked}.experts.{name}", None)
        if stack is None:
            continue
        projections = [expert.get_submodule(attribute) for expert in mixture.experts]
        begin = stack.begin
        for index, projection in enumerate(projections):
            assert isinstance(projection, ExpertProjection), "an expert is made of projections"
            rows, columns = projection.weight.shape
            if stack.shape != (len(projections), rows, columns):
                raise CheckpointError(
                    "1 tensors do not have the shape config.json implies: "
                    f"{stack.name} ({list(stack.shape)} instead of {[len(projections), rows, columns]})"
                )
            for part, part_rows in projection.parts.items():
                end = begin + stack.num_bytes // (len(projections) * rows) * part_rows
                name = f"{own}.experts.{index}.{part}.weight"
                _add(tensors, name, replace(stack, name=name, shape=(part_rows, columns), begin=begin, end=end))
                begin = end


def _add(tensors: dict[str, TensorEntry], name: str, entry: TensorEntry) -> None:
    if name in tensors:
        raise CheckpointError(f"the checkpoint has {first_few([name])} twice: alone and in a stack of all experts")
    tensors[name] = replace(entry, name=name)
