# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts, in the sizes of Mixtral 8x7B and Qwen3-30B-A3B: all experts of a step in one grouped product."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from gpu.contest import Calls, Contest, relative_error
from gpu.timing import num_sets
from wavetrain_kernels import ops

# T = tokens, E = experts, k = experts of a token, H = hidden size, I = units of an expert.

_TOLERANCE = 2e-2


@dataclass(frozen=True)
class Sizes:
    """Of a mixture."""

    name: str
    num_experts: int
    top_k: int
    hidden: int
    num_units: int
    steps: tuple[int, ...]


_SIZES = (
    Sizes("Mixtral", 8, 2, 4096, 14336, (1, 32, 4096)),
    Sizes("Qwen3 MoE", 128, 8, 2048, 768, (1, 32, 4096)),
)
_DRY_SIZES = (Sizes("tiny", 4, 2, 32, 16, (3,)),)


@dataclass
class Buffers:
    """One set of inputs. The experts' weights are kept as they are too, for the peers."""

    x: Tensor
    gate_up: Tensor
    down: Tensor
    packed: tuple[ops.PackedExperts, ops.PackedExperts]
    weights: Tensor
    expert_ids: Tensor

    @classmethod
    def random(cls, sizes: Sizes, num_tokens: int, dtype: torch.dtype, device: torch.device) -> Buffers:
        """Draws inputs."""
        shapes = (
            (sizes.num_experts, 2 * sizes.num_units, sizes.hidden),
            (sizes.num_experts, sizes.hidden, sizes.num_units),
        )
        raw = [torch.randn(shape, dtype=dtype, device=device) * shape[2] ** -0.5 for shape in shapes]
        packed = [
            ops.empty_experts(*shape, dtype=dtype, device=device, is_gated=index == 0)
            for index, shape in enumerate(shapes)
        ]
        for experts, matrices in zip(packed, raw, strict=True):
            for expert, matrix in enumerate(matrices):
                ops.pack_expert(experts, expert, matrix)
        logits = torch.randn(num_tokens, sizes.num_experts, device=device)
        x = torch.randn(num_tokens, sizes.hidden, dtype=dtype, device=device)
        return cls(x, raw[0], raw[1], (packed[0], packed[1]), *ops.route_experts(logits, sizes.top_k, renormalize=True))

    def ours(self) -> Tensor:
        """Returns [T, H]."""
        return ops.fused_moe(self.x, *self.packed, self.weights, self.expert_ids, "silu")

    def by_grouped_product(self) -> Tensor:
        """Sorts, then torch's grouped products, then gathers; torch._grouped_mm takes ends of the groups."""
        num_experts, top_k = self.gate_up.shape[0], self.expert_ids.shape[1]
        order = self.expert_ids.flatten().argsort(stable=True)
        counts = torch.zeros(num_experts, dtype=torch.int32, device=self.x.device)
        counts.index_add_(0, self.expert_ids.flatten(), torch.ones_like(self.expert_ids.flatten()))
        ends = counts.cumsum(0).to(torch.int32)
        rows = self.x[order // top_k]
        multiply: Any = torch._grouped_mm  # pyright: ignore[reportPrivateImportUsage]
        gate, up = multiply(rows, self.gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
        made = multiply(F.silu(gate) * up, self.down.transpose(1, 2), offs=ends)
        out = torch.empty_like(made)
        out[order] = made
        shares = self.weights[..., None].to(made.dtype)
        return (out.view(len(self.x), top_k, -1) * shares).sum(dim=1)

    def expert_by_expert(self) -> Tensor:
        """The plain loop, in float32: the truth."""
        out = torch.zeros_like(self.x, dtype=torch.float32)
        for expert in range(self.gate_up.shape[0]):
            tokens, places = (self.expert_ids == expert).nonzero(as_tuple=True)
            if len(tokens) == 0:
                continue
            gate, up = F.linear(self.x[tokens].float(), self.gate_up[expert].float()).chunk(2, dim=-1)
            made = F.linear(F.silu(gate) * up, self.down[expert].float())
            out.index_add_(0, tokens, made * self.weights[tokens, places][:, None])
        return out


def moe_contests(dtype: torch.dtype, device: torch.device, *, is_dry_run: bool) -> Iterator[Contest]:
    """Yields the contests of mixtures, each with buffers of its own."""
    for sizes in _DRY_SIZES if is_dry_run else _SIZES:
        for num_tokens in sizes.steps:
            yield _contest(sizes, num_tokens, dtype, device)


def _contest(sizes: Sizes, num_tokens: int, dtype: torch.dtype, device: torch.device) -> Contest:
    expert_bytes = 3 * sizes.hidden * sizes.num_units * dtype.itemsize
    # Two sets of all experts; a set that is read in part leaves the rest cold.
    count = min(
        num_sets(sizes.top_k * expert_bytes, device), max(2, 8 * 10**9 // (2 * sizes.num_experts * expert_bytes))
    )
    sets = [Buffers.random(sizes, num_tokens, dtype, device) for _ in range(count)]
    used = len(sets[0].expert_ids.unique())
    expected = sets[0].expert_by_expert()

    def grouped() -> Calls:
        return [one.by_grouped_product for one in sets]

    return Contest(
        group="moe",
        case=f"{sizes.name}, {num_tokens} tokens",
        num_bytes=used * expert_bytes + 2 * num_tokens * sizes.hidden * dtype.itemsize,
        num_flops=6 * num_tokens * sizes.top_k * sizes.hidden * sizes.num_units,
        ours=[one.ours for one in sets],
        error=lambda out: relative_error(out, expected),
        tolerance=_TOLERANCE,
        peers={"torch._grouped_mm": grouped},
    )
