# SPDX-License-Identifier: Apache-2.0
"""The rest of a layer, in the sizes of an 8B Llama: norms, rotation with the cache write, projections, adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from gpu.contest import Calls, Contest, relative_error
from gpu.timing import num_sets
from wavetrain_kernels import ops

# T = tokens in the step, H = hidden size, D = head dimension, R = rank.

_EPS = 1e-5
_TOLERANCE = 1e-2
_BLOCK_SIZE = 16
_Set = TypeVar("_Set")


@dataclass(frozen=True)
class Sizes:
    """Of a layer, and the numbers of tokens that are tried."""

    hidden: int = 4096
    intermediate: int = 14336
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    steps: tuple[int, ...] = (1, 32, 256, 8192)


DRY_SIZES = Sizes(hidden=64, intermediate=48, num_heads=2, num_kv_heads=1, head_dim=32, steps=(3,))


def layer_contests(dtype: torch.dtype, device: torch.device, *, is_dry_run: bool) -> Iterator[Contest]:
    """Yields the contests of a layer, each with buffers of its own."""
    sizes = DRY_SIZES if is_dry_run else Sizes()
    draw = partial(torch.randn, dtype=dtype, device=device)
    for num_tokens in sizes.steps:
        yield _norm(num_tokens, sizes, draw, device)
        yield _rotation(num_tokens, sizes, draw, device)
        yield _gated_linear(num_tokens, sizes, draw, device)
        yield _linear(num_tokens, sizes, draw, device)


def _sets(make: Callable[[], _Set], set_bytes: int, device: torch.device) -> list[_Set]:
    return [make() for _ in range(num_sets(set_bytes, device))]


def _norm(num_tokens: int, sizes: Sizes, draw: Callable[..., Tensor], device: torch.device) -> Contest:
    weight = draw(sizes.hidden)
    num_bytes = 4 * num_tokens * sizes.hidden * weight.itemsize + weight.nbytes
    sets = _sets(lambda: (draw(num_tokens, sizes.hidden), draw(num_tokens, sizes.hidden)), num_bytes, device)

    def by_torch(x: Tensor, residual: Tensor) -> Tensor:
        return F.rms_norm(x + residual, (sizes.hidden,), weight, _EPS)

    return Contest(
        group="add + rms norm",
        case=f"{num_tokens} x {sizes.hidden}",
        num_bytes=num_bytes,
        num_flops=0,
        ours=[partial(lambda x, r: ops.add_rms_norm(x, r, weight, _EPS)[0], *pair) for pair in sets],
        error=lambda out: relative_error(out, _norm_in_double(*sets[0], weight)),
        tolerance=_TOLERANCE,
        peers={"torch": lambda: [partial(by_torch, *pair) for pair in sets]},
    )


def _norm_in_double(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    total = (x + residual).double()
    return total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + _EPS) * weight.double()


@dataclass
class _Rotation:
    """One set of inputs: heads of a fused projection, a table, a cache with scattered slots."""

    query: Tensor
    key: Tensor
    value: Tensor
    positions: Tensor
    table: Tensor
    cache: ops.KVCache
    slots: Tensor

    def ours(self) -> Tensor:
        return ops.rotate_and_cache(
            self.query, self.key, self.value, self.positions, self.table, self.cache, self.slots
        )

    def by_torch(self) -> Tensor:
        cos, sin = self.table[self.positions].unsqueeze(2).unbind(1)
        rotated = [_rotated(heads, cos, sin) for heads in (self.query, self.key)]
        blocks, offsets = self.slots // _BLOCK_SIZE, self.slots % _BLOCK_SIZE
        for held, heads in ((self.cache.key, rotated[1]), (self.cache.value, self.value)):
            held[blocks, :, offsets] = heads
        return rotated[0]


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = heads.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _rotation(num_tokens: int, sizes: Sizes, draw: Callable[..., Tensor], device: torch.device) -> Contest:
    heads = (sizes.num_heads, sizes.num_kv_heads, sizes.num_kv_heads)
    num_blocks = -(-num_tokens // _BLOCK_SIZE) + 2
    table = draw(4096, 2, sizes.head_dim // 2)

    def make() -> _Rotation:
        fused = draw(num_tokens, sum(heads) * sizes.head_dim).view(num_tokens, sum(heads), sizes.head_dim)
        query, key, value = fused.split(heads, dim=1)
        cache = ops.KVCache(*(draw(num_blocks, sizes.num_kv_heads, _BLOCK_SIZE, sizes.head_dim) for _ in range(2)))
        slots = torch.randperm(num_blocks * _BLOCK_SIZE, device=device)[:num_tokens]
        positions = torch.randint(4096, (num_tokens,), device=device)
        return _Rotation(query, key, value, positions, table, cache, slots)

    num_bytes = (2 * sum(heads) + 1) * num_tokens * sizes.head_dim * table.itemsize
    sets = _sets(make, num_bytes, device)
    return Contest(
        group="rope + kv write",
        case=f"{num_tokens} tokens",
        num_bytes=num_bytes,
        num_flops=0,
        ours=[one.ours for one in sets],
        error=lambda out: relative_error(out, sets[0].by_torch()),
        tolerance=_TOLERANCE,
        peers={"torch": lambda: [one.by_torch for one in sets]},
    )


def _gated_linear(num_tokens: int, sizes: Sizes, draw: Callable[..., Tensor], device: torch.device) -> Contest:
    scale = sizes.hidden**-0.5
    shape = (2 * sizes.intermediate, sizes.hidden)
    num_bytes = (shape[0] * shape[1] + num_tokens * (sizes.hidden + sizes.intermediate)) * 2
    sets = _sets(lambda: (draw(num_tokens, sizes.hidden), draw(*shape) * scale), num_bytes, device)

    def by_torch(x: Tensor, weight: Tensor) -> Tensor:
        gate, up = F.linear(x, weight).chunk(2, dim=-1)
        return F.silu(gate) * up

    packed = [(x, ops.pack_weight(weight.clone(), is_gated=True)) for x, weight in sets]
    return Contest(
        group="gated linear",
        case=f"{num_tokens} x {shape[1]} x {shape[0]}",
        num_bytes=num_bytes,
        num_flops=2 * num_tokens * shape[0] * shape[1],
        ours=[partial(ops.gated_linear, x, weight, "silu") for x, weight in packed],
        error=lambda out: relative_error(out, by_torch(*(part.float() for part in sets[0]))),
        tolerance=_TOLERANCE,
        peers={"torch": lambda: [partial(by_torch, *pair) for pair in sets]},
    )


def _linear(num_tokens: int, sizes: Sizes, draw: Callable[..., Tensor], device: torch.device) -> Contest:
    scale = sizes.hidden**-0.5
    num_outputs = (sizes.num_heads + 2 * sizes.num_kv_heads) * sizes.head_dim
    num_bytes = (num_outputs * sizes.hidden + num_tokens * (sizes.hidden + num_outputs)) * 2
    sets = _sets(lambda: (draw(num_tokens, sizes.hidden), draw(num_outputs, sizes.hidden) * scale), num_bytes, device)
    packed = [(x, ops.pack_weight(weight.clone())) for x, weight in sets]
    return Contest(
        group="linear",
        case=f"{num_tokens} x {sizes.hidden} x {num_outputs}",
        num_bytes=num_bytes,
        num_flops=2 * num_tokens * num_outputs * sizes.hidden,
        ours=[partial(ops.linear, x, weight) for x, weight in packed],
        error=lambda out: relative_error(out, F.linear(*(part.float() for part in sets[0]))),
        tolerance=_TOLERANCE,
        peers={"cublas": lambda: [partial(F.linear, *pair) for pair in sets]},
    )


def lora_contests(dtype: torch.dtype, device: torch.device, *, is_dry_run: bool) -> Iterator[Contest]:
    """Yields the contests of low-rank adapters: a fused projection of queries, keys and values."""
    if is_dry_run:
        yield _lora(5, 2, 4, 32, (16, 8, 8), dtype, device)
        return
    for num_tokens, num_slots, rank in ((1, 8, 16), (32, 8, 16), (256, 8, 16), (256, 64, 64), (8192, 8, 16)):
        yield _lora(num_tokens, num_slots, rank, 4096, (4096, 1024, 1024), dtype, device)


@dataclass
class _Adapted:
    """One set of inputs."""

    x: Tensor
    out: Tensor
    adapters: ops.LoraAdapters
    batch: ops.LoraBatch

    def ours(self) -> Tensor:
        """Adds to `out`, which grows with every call; a copy of it would be timed too."""
        ops.lora_expand(self.out, ops.lora_shrink(self.x, self.adapters, self.batch), self.adapters, self.batch)
        return self.out

    def by_torch(self, groups: Sequence[tuple[int, Tensor]]) -> Tensor:
        """Adds the products of each adapter, one after the other."""
        for slot, tokens in groups:
            shrunk = torch.einsum("th,lrh->ltr", self.x[tokens], self.adapters.a[slot]) * self.adapters.scales[slot]
            rows = self.adapters.b[slot].split(self.adapters.slice_sizes)
            added = [part.to(self.x.dtype) @ row.T for part, row in zip(shrunk, rows, strict=True)]
            self.out.index_add_(0, tokens, torch.cat(added, dim=1))
        return self.out

    def groups(self) -> list[tuple[int, Tensor]]:
        """Returns the tokens of each adapter in use."""
        slots = self.batch.token_slots
        found = [(slot, (slots == slot).nonzero()[:, 0]) for slot in range(self.batch.num_slots)]
        return [(slot, tokens) for slot, tokens in found if len(tokens)]

    def delta(self) -> Tensor:
        """Returns what a call adds to `out`, computed alone."""
        zeros = torch.zeros_like(self.out)
        return _Adapted(self.x, zeros, self.adapters, self.batch).by_torch(self.groups())


def _lora(
    num_tokens: int,
    num_slots: int,
    rank: int,
    in_features: int,
    sizes: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> Contest:
    slots = (torch.arange(num_tokens, device=device) * 5 % num_slots).to(torch.int32)
    draw = partial(torch.randn, dtype=dtype, device=device)

    def make() -> _Adapted:
        adapters = ops.LoraAdapters(
            a=draw(num_slots, len(sizes), rank, in_features) * in_features**-0.5,
            b=draw(num_slots, sum(sizes), rank),
            scales=torch.full((num_slots,), 0.5, device=device),
            ranks=torch.full((num_slots,), rank, dtype=torch.int32, device=device),
            slice_sizes=sizes,
        )
        batch = ops.sort_by_adapter(slots, num_slots)
        out = torch.zeros(num_tokens, sum(sizes), dtype=dtype, device=device)
        return _Adapted(draw(num_tokens, in_features), out, adapters, batch)

    used = min(num_tokens, num_slots)
    weights = used * rank * (len(sizes) * in_features + sum(sizes))
    num_bytes = (weights + num_tokens * (in_features + 2 * sum(sizes))) * dtype.itemsize
    sets = _sets(make, num_bytes, device)
    expected = sets[0].delta()
    return Contest(
        group="lora shrink + expand",
        case=f"{num_tokens} tokens, {num_slots} adapters of rank {rank}",
        num_bytes=num_bytes,
        num_flops=2 * num_tokens * rank * (len(sizes) * in_features + sum(sizes)),
        ours=[one.ours for one in sets],
        error=lambda out: relative_error(out, expected),
        tolerance=_TOLERANCE,
        peers={"torch, adapter by adapter": lambda: _torch_calls(sets)},
        reset=sets[0].out.zero_,
    )


def _torch_calls(sets: Sequence[_Adapted]) -> Calls:
    groups = sets[0].groups()  # the same in every set
    return [partial(one.by_torch, groups) for one in sets]
