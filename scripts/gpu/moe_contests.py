# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts, in the sizes of Mixtral 8x7B and Qwen3-30B-A3B: all experts of a step in one grouped product.

Quantized ones are beside the same experts in 16 bits: ours, and torch's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from gpu.contest import Calls, Contest, relative_error
from gpu.quantized_contests import random_weight
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
_SCHEMES = {
    "w4a16 g128": ops.QuantizationScheme(values="int4", group_size=128),
    "fp8 128 x 128": ops.QuantizationScheme(
        values="fp8", group_size=128, block_rows=128, inputs="fp8", input_group_size=128
    ),
}
_DRY_SIZES = (Sizes("tiny", 4, 2, 32, 16, (3,)),)


@dataclass
class Buffers:
    """One set of inputs. The experts' weights are kept as they are too, for the peers."""

    x: Tensor
    gate_up: Tensor
    down: Tensor
    dense: tuple[ops.PackedExperts, ops.PackedExperts]
    packed: tuple[ops.PackedExperts, ops.PackedExperts]
    weights: Tensor
    expert_ids: Tensor

    @classmethod
    def random(
        cls,
        sizes: Sizes,
        num_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        scheme: ops.QuantizationScheme | None = None,
    ) -> Buffers:
        """Draws inputs; of quantized experts all of a projection have the same weight, each in memory of its own."""
        shapes = (
            (sizes.num_experts, 2 * sizes.num_units, sizes.hidden),
            (sizes.num_experts, sizes.hidden, sizes.num_units),
        )
        if scheme is None:
            raw = [torch.randn(shape, dtype=dtype, device=device) * shape[2] ** -0.5 for shape in shapes]
            quantized = []
        else:
            quantized = [random_weight(scheme, *shape[1:], device) for shape in shapes]
            raw = [ops.dequantize(weight).to(dtype).repeat(sizes.num_experts, 1, 1) for weight in quantized]
        dense = [
            ops.empty_experts(*shape, dtype=dtype, device=device, is_gated=index == 0)
            for index, shape in enumerate(shapes)
        ]
        for experts, matrices in zip(dense, raw, strict=True):
            for expert, matrix in enumerate(matrices):
                ops.pack_expert(experts, expert, matrix)
        packed = [_pack(sizes.num_experts, weight, dtype, index == 0) for index, weight in enumerate(quantized)]
        logits = torch.randn(num_tokens, sizes.num_experts, device=device)
        x = torch.randn(num_tokens, sizes.hidden, dtype=dtype, device=device)
        routed = ops.route_experts(logits, sizes.top_k, renormalize=True)
        plain = (dense[0], dense[1])
        return cls(x, raw[0], raw[1], plain, (packed[0], packed[1]) if packed else plain, *routed)

    def ours(self) -> Tensor:
        """Returns [T, H]."""
        return ops.fused_moe(self.x, *self.packed, self.weights, self.expert_ids, "silu")

    def ours_in_16_bits(self) -> Tensor:
        """The same of experts that are not quantized."""
        return ops.fused_moe(self.x, *self.dense, self.weights, self.expert_ids, "silu")

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


def _pack(num_experts: int, weight: ops.QuantizedWeight, dtype: torch.dtype, is_gated: bool) -> ops.PackedExperts:
    experts = ops.empty_quantized_experts(num_experts, weight, dtype=dtype, is_gated=is_gated)
    for expert in range(num_experts):
        ops.pack_expert(experts, expert, weight)
    return experts


def moe_contests(dtype: torch.dtype, device: torch.device, *, is_dry_run: bool) -> Iterator[Contest]:
    """Yields the contests of mixtures, each with buffers of its own."""
    for sizes in _DRY_SIZES if is_dry_run else _SIZES:
        for num_tokens in sizes.steps:
            yield _contest(sizes, num_tokens, dtype, device)
    sizes = _DRY_SIZES[0] if is_dry_run else _SIZES[-1]
    for name, scheme in _SCHEMES.items():
        for num_tokens in sizes.steps:
            yield _contest(sizes, num_tokens, dtype, device, name, scheme)


def _contest(
    sizes: Sizes,
    num_tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    name: str | None = None,
    scheme: ops.QuantizationScheme | None = None,
) -> Contest:
    values = 3 * sizes.hidden * sizes.num_units
    # Scales are a fortieth of the rest, at most.
    bits = 8 * dtype.itemsize if scheme is None else 4 if scheme.values == "int4" else 8
    read_bytes, expert_bytes = values * bits // 8, values * dtype.itemsize
    # Two sets of all experts; a set that is read in part leaves the rest cold.
    count = min(
        num_sets(sizes.top_k * expert_bytes, device), max(2, 8 * 10**9 // (2 * sizes.num_experts * expert_bytes))
    )
    sets = [Buffers.random(sizes, num_tokens, dtype, device, scheme) for _ in range(count)]
    used = len(sets[0].expert_ids.unique())
    expected = sets[0].expert_by_expert()

    def grouped() -> Calls:
        return [one.by_grouped_product for one in sets]

    def dense() -> Calls:
        return [one.ours_in_16_bits for one in sets]

    return Contest(
        group="moe",
        case=f"{sizes.name}{f', {name}' if name else ''}, {num_tokens} tokens",
        num_bytes=used * read_bytes + 2 * num_tokens * sizes.hidden * dtype.itemsize,
        num_flops=6 * num_tokens * sizes.top_k * sizes.hidden * sizes.num_units,
        ours=[one.ours for one in sets],
        error=lambda out: relative_error(out, expected),
        tolerance=_TOLERANCE,
        peers={"torch._grouped_mm": grouped, **({} if scheme is None else {"ours in 16 bits": dense})},
    )
