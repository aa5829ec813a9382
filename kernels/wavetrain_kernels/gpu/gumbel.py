# SPDX-License-Identifier: Apache-2.0
"""The seeded draw of `reference/gumbel.py`: one pass over the logits, then one program a row draws group and token.

The largest log p + g, with g = -log(-log u), is where -log(u) / p is smallest: one logarithm instead of three. It is
taken in float64, of a thousand numbers a row, as a float32 near 1 would tell apart only some hundred million u.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from wavetrain_kernels.gpu.aot_case import AotCase
from wavetrain_kernels.gpu.launch import cdiv, fall_back, launch
from wavetrain_kernels.gpu.vocab_groups import (
    GROUP,
    INFINITY,
    LOWEST_KEY,
    aot_kinds,
    from_order_key,
    group_block,
    is_supported,
    order_key,
    positive,
    vocab_groups,
    whole_rows,
)
from wavetrain_kernels.reference import gumbel as reference
from wavetrain_kernels.reference.gumbel import GROUP_SIZE

# N = rows, V = vocabulary size, G = groups.

_NUM_WARPS = 4
_GAMMA = tl.constexpr(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = tl.constexpr(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = tl.constexpr(0x94D049BB133111EB)


def sample(
    token_ids: Tensor,
    best: Tensor,
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    temperature: Tensor,
    lowest: Tensor | None,
) -> None:
    """See KernelSet."""
    if not is_supported(logits):
        fall_back("sample", str(logits.dtype))
        reference.sample(token_ids, best, logits, seeds, positions, temperature, lowest)
        return
    logits = whole_rows(logits)
    groups = vocab_groups(logits, temperature=temperature, lowest=lowest)
    launch(
        _draw_kernel,
        (logits.shape[0],),
        token_ids,
        best,
        logits,
        groups.maxima,
        groups.sums,
        seeds,
        positions,
        temperature,
        lowest,
        logits.shape[1],
        groups.num_groups,
        logits.stride(0),
        HAS_LOWEST=lowest is not None,
        BLOCK_G=group_block(groups.num_groups),
        num_warps=_NUM_WARPS,
    )


@triton.jit
def _mix(x):
    """The finalizer of splitmix64, of uint64."""
    x = (x ^ (x >> 30)) * _MULTIPLIER_1
    x = (x ^ (x >> 27)) * _MULTIPLIER_2
    return x ^ (x >> 31)


@triton.jit
def _draw(weights, counters, key):
    """Returns the place of the smallest -log(u) / weight; the first where no weight is positive."""
    bits = _mix(key + (counters + 1).to(tl.uint64, bitcast=True) * _GAMMA)
    uniform = ((bits >> 12).to(tl.int64, bitcast=True).to(tl.float64) + 0.5) * (2.0**-52)
    is_possible = weights > 0.0
    weights = tl.where(is_possible, weights, 1.0).to(tl.float64)
    return tl.argmin(tl.where(is_possible, -tl.log(uniform) / weights, INFINITY), axis=0, tie_break_left=True)


@triton.jit(
    do_not_specialize_on_alignment=[
        "token_ids_ptr", "best_ptr", "maxima_ptr", "sums_ptr", "seeds_ptr", "positions_ptr", "temperature_ptr",
        "lowest_ptr",
    ]
)  # fmt: skip
def _draw_kernel(
    token_ids_ptr,  # [N]
    best_ptr,  # [N]
    logits_ptr,  # [N, V]
    maxima_ptr,  # [N, G]
    sums_ptr,  # [N, G]
    seeds_ptr,  # [N]
    positions_ptr,  # [N]
    temperature_ptr,  # [N]
    lowest_ptr,  # [N]
    vocab_size,
    num_groups,
    stride_xn,
    HAS_LOWEST: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """One row: its group, then the token within; at temperature 0 the first of the largest logits."""
    row = tl.program_id(0).to(tl.int64)
    groups = tl.arange(0, BLOCK_G)
    is_group = groups < num_groups
    maxima = tl.load(maxima_ptr + row * num_groups + groups, mask=is_group, other=-INFINITY)
    keys = tl.where(is_group, order_key(maxima), LOWEST_KEY)
    best_key = tl.max(keys, axis=0)
    best = from_order_key(best_key)
    raw_temperature = tl.load(temperature_ptr + row)
    temperature = positive(raw_temperature)
    seed = tl.load(seeds_ptr + row).to(tl.uint64, bitcast=True)
    key = _mix(_mix(seed) + tl.load(positions_ptr + row).to(tl.uint64, bitcast=True))
    if raw_temperature == 0.0:
        group = tl.min(tl.where(keys == best_key, groups, num_groups), axis=0)
    else:
        sums = tl.load(sums_ptr + row * num_groups + groups, mask=is_group, other=0.0)
        # A group without a weight may have no finite maximum.
        differences = tl.where((sums > 0.0) & (maxima < best), maxima - best, 0.0) / temperature
        group = _draw(sums * tl.exp(differences), -2 - groups.to(tl.int64), key)
    columns = group * GROUP + tl.arange(0, GROUP)
    is_token = columns < vocab_size
    x = tl.load(logits_ptr + row * stride_xn + columns, mask=is_token, other=-INFINITY).to(tl.float32)
    x_keys = tl.where(is_token, order_key(x), LOWEST_KEY)
    if raw_temperature == 0.0:
        within = tl.min(tl.where(x_keys == best_key, tl.arange(0, GROUP), GROUP), axis=0)
    else:
        counts = (x > -INFINITY) & (x < INFINITY)
        if HAS_LOWEST:
            counts = counts & (tl.div_rn(x, temperature + tl.zeros_like(x)) >= tl.load(lowest_ptr + row))
        most = tl.max(tl.where(counts, x, -INFINITY), axis=0)
        weights = tl.where(counts, tl.exp(tl.where(counts, x - most, 0.0) / temperature), 0.0)
        within = _draw(weights, columns.to(tl.int64), key)
    tl.store(token_ids_ptr + row, (group * GROUP + within).to(tl.int64))
    tl.store(best_ptr + row, best)


def aot_cases() -> Iterator[AotCase]:
    """See AotCase."""
    for dtype, block in aot_kinds(lambda size: group_block(cdiv(size, GROUP_SIZE))):
        for has_lowest in (False, True):
            yield AotCase(
                name=f"gumbel/{dtype}/{block}/{'lowest' if has_lowest else 'all'}",
                kernel=_draw_kernel,
                signature={
                    "token_ids_ptr": "*i64",
                    "best_ptr": "*fp32",
                    "logits_ptr": f"*{dtype}",
                    "maxima_ptr": "*fp32",
                    "sums_ptr": "*fp32",
                    "seeds_ptr": "*i64",
                    "positions_ptr": "*i64",
                    "temperature_ptr": "*fp32",
                    **({"lowest_ptr": "*fp32"} if has_lowest else {}),
                    "vocab_size": "i32:16",
                    "num_groups": "i32",
                    "stride_xn": "i32:16",
                },
                constexprs={
                    **({} if has_lowest else {"lowest_ptr": None}),
                    "HAS_LOWEST": has_lowest,
                    "BLOCK_G": block,
                },
                num_warps=_NUM_WARPS,
                num_stages=3,
                is_decode=True,
            )
