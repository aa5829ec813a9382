# SPDX-License-Identifier: Apache-2.0
"""min_p, top_k and top_p without a sort: one program a row looks for the lowest logit that they keep.

What a filter keeps is the smallest set of the form "at least v" whose measure reaches a target: as many as k tokens, or
top_p of the weight. After the pass over the logits that finds each group's maximum and weight (vocab_groups.py), v is
bracketed from below by the group maxima alone, as these are logits too. Only groups whose maximum reaches that bound
can matter: a few dozen for any usual k, and for top_p where the distribution has a peak. Among their logits v is found
by dividing the bracket, by value, in each round (FlashInfer does it with pivots, arXiv 2501.01005). A round also finds
the largest logit that is left in the bracket; the search ends when that is v, so at a logit, exactly.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from wavetrain_kernels.gpu.aot_case import AotCase
from wavetrain_kernels.gpu.launch import cdiv, fall_back, launch
from wavetrain_kernels.gpu.vocab_groups import (
    GROUP,
    INFINITY,
    aot_kinds,
    group_block,
    is_supported,
    positive,
    vocab_groups,
    whole_rows,
)
from wavetrain_kernels.gpu.workspace import workspace
from wavetrain_kernels.reference import sampling as reference
from wavetrain_kernels.reference.gumbel import GROUP_SIZE

# N = rows, V = vocabulary size, G = groups.

_GROUPS_PER_STEP = 16
_NUM_WARPS = 8
# Loads of later steps that are under way: a step is short, and waits for its candidates and then for their logits.
_NUM_STAGES = tl.constexpr(4)
# Halvings of the bracket that the group maxima give, in octaves of the distance to the largest logit.
_NUM_HALVINGS = tl.constexpr(10)
_NEAREST = tl.constexpr(2.0**-20)
_FARTHEST = tl.constexpr(128.0)


def filter_thresholds(
    lowest: Tensor,
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
) -> None:
    """See KernelSet."""
    if not is_supported(logits):
        fall_back("filter_thresholds", str(logits.dtype))
        reference.filter_thresholds(lowest, logits, temperature, top_k, top_p, min_p)
        return
    logits = whole_rows(logits)
    groups = vocab_groups(logits, temperature=temperature)
    candidates = workspace("filters", groups.maxima.shape, torch.int32, logits.device)
    launch(
        _threshold_kernel,
        (logits.shape[0],),
        lowest,
        candidates,
        logits,
        groups.maxima,
        groups.sums,
        temperature,
        top_k,
        top_p,
        min_p,
        logits.shape[1],
        groups.num_groups,
        logits.stride(0),
        HAS_TOP_K=top_k is not None,
        HAS_TOP_P=top_p is not None,
        HAS_MIN_P=min_p is not None,
        BLOCK_ROW=group_block(groups.num_groups),
        BLOCK_G=_GROUPS_PER_STEP,
        num_warps=_NUM_WARPS,
    )


@triton.jit
def _bound_from_maxima(maxima, measures, most, temperature, target):
    """Returns a value below which no kept logit lies: the maxima from it on have measure enough; -inf: all have not."""
    near = tl.full([], _NEAREST, tl.float32).to(tl.int32, bitcast=True)
    far = tl.full([], _FARTHEST, tl.float32).to(tl.int32, bitcast=True)
    reaches = tl.sum(tl.where(maxima >= most - _FARTHEST * temperature, measures, 0.0), axis=0) >= target
    for _ in range(_NUM_HALVINGS):
        middle = (near + far) // 2
        bound = most - middle.to(tl.float32, bitcast=True) * temperature
        is_enough = tl.sum(tl.where(maxima >= bound, measures, 0.0), axis=0) >= target
        far = tl.where(is_enough, middle, far)
        near = tl.where(is_enough, near, middle)
    return tl.where(reaches, most - far.to(tl.float32, bitcast=True) * temperature, -INFINITY)


@triton.jit
def _list_candidates(candidates_ptr, maxima, groups, bound):
    """Writes the groups whose maximum reaches the bound; returns how many there are."""
    is_candidate = (maxima >= bound) & (maxima > -INFINITY)
    order = tl.cumsum(is_candidate.to(tl.int32), axis=0)
    tl.debug_barrier()  # all have read the last list
    tl.store(candidates_ptr + order - 1, groups, mask=is_candidate)
    tl.debug_barrier()
    return tl.sum(is_candidate.to(tl.int32), axis=0)


@triton.jit
def _load_candidates(row_ptr, candidates_ptr, start, count, vocab_size, BLOCK_G: tl.constexpr):
    """Returns the logits of BLOCK_G candidates; -inf where there are none."""
    places = start + tl.arange(0, BLOCK_G)
    groups = tl.load(candidates_ptr + places, mask=places < count, other=0)
    columns = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    is_token = (places < count)[:, None] & (columns < vocab_size)
    return tl.load(row_ptr + columns, mask=is_token, other=-INFINITY).to(tl.float32)


@triton.jit
def _mass_from(lowest, row_ptr, candidates_ptr, count, vocab_size, most, temperature, BLOCK_G: tl.constexpr):
    """Returns the weight of the candidates whose logit / temperature reaches `lowest`."""
    mass = tl.zeros([BLOCK_G, GROUP], dtype=tl.float32)
    for start in tl.range(0, count, BLOCK_G, num_stages=_NUM_STAGES):
        x = _load_candidates(row_ptr, candidates_ptr, start, count, vocab_size, BLOCK_G)
        weights = tl.exp((x - most) * (1.0 / temperature))  # pyright: ignore[reportOptionalOperand]
        mass += tl.where(tl.div_rn(x, temperature + tl.zeros_like(x)) >= lowest, weights, 0.0)
    return tl.sum(tl.sum(mass, axis=1), axis=0)


@triton.jit
def _measures_from(
    first, second, third, high, row_ptr, candidates_ptr, count, vocab_size, most, temperature,
    IS_MASS: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Returns the candidates' measures from three values on, and the largest logit below `high`."""
    from_first = tl.zeros([BLOCK_G, GROUP], dtype=tl.float32)
    from_second = tl.zeros([BLOCK_G, GROUP], dtype=tl.float32)
    from_third = tl.zeros([BLOCK_G, GROUP], dtype=tl.float32)
    below = tl.full([BLOCK_G, GROUP], -INFINITY, dtype=tl.float32)
    scale = 1.0 / temperature
    for start in tl.range(0, count, BLOCK_G, num_stages=_NUM_STAGES):
        x = _load_candidates(row_ptr, candidates_ptr, start, count, vocab_size, BLOCK_G)
        # What a logit adds: its weight, or one.
        measure = tl.exp((x - most) * scale) if IS_MASS else tl.full([BLOCK_G, GROUP], 1.0, dtype=tl.float32)  # pyright: ignore
        from_first += tl.where(x >= first, measure, 0.0)
        from_second += tl.where(x >= second, measure, 0.0)
        from_third += tl.where(x >= third, measure, 0.0)
        below = tl.maximum(below, tl.where(x < high, x, -INFINITY))
    return (
        tl.sum(tl.sum(from_first, axis=1), axis=0),
        tl.sum(tl.sum(from_second, axis=1), axis=0),
        tl.sum(tl.sum(from_third, axis=1), axis=0),
        tl.max(tl.max(below, axis=1), axis=0),
    )


@triton.jit
def _search(
    bound, target, row_ptr, candidates_ptr, count, vocab_size, most, temperature,
    IS_MASS: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Returns the largest of the candidates' logits from which on the measure reaches the target; not below `bound`.

    It lies in [low, high). `top` is the largest logit there, if `is_known`: the one tested for being it.
    """
    low = bound
    high = tl.full([], INFINITY, tl.float32)
    top = most
    is_known = True
    reach = 8.0 * temperature
    while (not is_known) | (top > low):
        end = tl.where(is_known, top, high)
        span = tl.where(low > -INFINITY, end - low, reach)
        reach *= 8.0
        first = end - span * 0.75
        second = end - span * 0.5
        third = tl.where(is_known, top, end - span * 0.25)
        # Where rounding leaves nothing in between, the end of the bracket takes its place.
        first = tl.where((first > low) & (first < end), first, end)
        second = tl.where((second > low) & (second < end), second, end)
        third = tl.where((third > low) & (third < end), third, end)
        # pyright takes the call of a kernel's part for one of the kernel, which has no result.
        from_first, from_second, from_third, below = _measures_from(  # pyright: ignore
            first, second, third, high, row_ptr, candidates_ptr, count, vocab_size, most, temperature, IS_MASS, BLOCK_G
        )
        if from_third >= target:
            low = third
        elif from_second >= target:
            low = second
            high = third
        elif from_first >= target:
            low = first
            high = second
        else:
            high = first
        is_known = below < high
        top = below
    return top


@triton.jit(
    do_not_specialize_on_alignment=[
        "lowest_ptr", "maxima_ptr", "sums_ptr", "temperature_ptr", "top_k_ptr", "top_p_ptr", "min_p_ptr"
    ]
)  # fmt: skip
def _threshold_kernel(
    lowest_ptr,  # [N]
    candidates_ptr,  # [N, G]
    logits_ptr,  # [N, V]
    maxima_ptr,  # [N, G]
    sums_ptr,  # [N, G]
    temperature_ptr,  # [N]
    top_k_ptr,  # [N]
    top_p_ptr,  # [N]
    min_p_ptr,  # [N]
    vocab_size,
    num_groups,
    stride_xn,
    HAS_TOP_K: tl.constexpr,
    HAS_TOP_P: tl.constexpr,
    HAS_MIN_P: tl.constexpr,
    BLOCK_ROW: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """One row. Only `lowest` is divided by the temperature: a larger logit is never divided to less."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_xn
    candidates_ptr += row * num_groups
    groups = tl.arange(0, BLOCK_ROW)
    is_group = groups < num_groups
    maxima = tl.load(maxima_ptr + row * num_groups + groups, mask=is_group, other=-INFINITY)
    has_nan = tl.max((maxima != maxima).to(tl.int32), axis=0) > 0
    maxima = tl.where(maxima != maxima, -INFINITY, maxima)
    most = tl.max(maxima, axis=0)
    raw_temperature = tl.load(temperature_ptr + row)
    temperature = positive(raw_temperature)
    scaled_most = tl.div_rn(most, temperature)
    lowest = tl.full([], -INFINITY, tl.float32)
    if (raw_temperature > 0.0) & (not has_nan) & (scaled_most > -INFINITY) & (scaled_most < INFINITY):
        if HAS_MIN_P:
            min_p = tl.load(min_p_ptr + row)
            if min_p > 0.0:
                lowest = scaled_most + tl.log(min_p.to(tl.float64)).to(tl.float32)
        if HAS_TOP_K:
            top_k = tl.load(top_k_ptr + row)
            if (top_k > 0) & (top_k < vocab_size):
                target = top_k.to(tl.float32)
                ones = tl.where(maxima > -INFINITY, 1.0, 0.0)
                bound = _bound_from_maxima(maxima, ones, most, temperature, target)
                count = _list_candidates(candidates_ptr, maxima, groups, bound)
                found = _search(
                    bound, target, row_ptr, candidates_ptr, count, vocab_size, most, temperature, False, BLOCK_G
                )
                lowest = tl.maximum(lowest, tl.div_rn(found, temperature))
        if HAS_TOP_P:
            top_p = tl.load(top_p_ptr + row)
            if top_p < 1.0:
                weights = tl.exp((maxima - most) / temperature)
                if lowest > -INFINITY:
                    # A little lower than it need be: products are rounded.
                    bound = lowest * temperature - tl.abs(lowest * temperature) * 1e-6
                    count = _list_candidates(candidates_ptr, maxima, groups, bound)
                    total = _mass_from(lowest, row_ptr, candidates_ptr, count, vocab_size, most, temperature, BLOCK_G)
                else:
                    sums = tl.load(sums_ptr + row * num_groups + groups, mask=is_group, other=0.0)
                    total = tl.sum(sums * weights, axis=0)
                target = top_p * total
                bound = _bound_from_maxima(maxima, weights, most, temperature, target)
                # What lies below this has not 1 - top_p of the weight, however many they are.
                floor = most + (tl.log((1.0 - top_p) * total / vocab_size) - 0.01) * temperature
                bound = tl.maximum(bound, floor)
                count = _list_candidates(candidates_ptr, maxima, groups, bound)
                found = _search(
                    bound, target, row_ptr, candidates_ptr, count, vocab_size, most, temperature, True, BLOCK_G
                )
                lowest = tl.maximum(lowest, tl.div_rn(found, temperature))
    tl.store(lowest_ptr + row, lowest)


def aot_cases() -> Iterator[AotCase]:
    """See AotCase. With all filters, as the engine calls it: a row has those that its parameters say."""
    for dtype, block in aot_kinds(lambda size: group_block(cdiv(size, GROUP_SIZE))):
        yield AotCase(
            name=f"filters/{dtype}/{block}",
            kernel=_threshold_kernel,
            signature={
                "lowest_ptr": "*fp32",
                "candidates_ptr": "*i32",
                "logits_ptr": f"*{dtype}",
                "maxima_ptr": "*fp32",
                "sums_ptr": "*fp32",
                "temperature_ptr": "*fp32",
                "top_k_ptr": "*i64",
                "top_p_ptr": "*fp32",
                "min_p_ptr": "*fp32",
                "vocab_size": "i32:16",
                "num_groups": "i32",
                "stride_xn": "i32:16",
            },
            constexprs={
                "HAS_TOP_K": True,
                "HAS_TOP_P": True,
                "HAS_MIN_P": True,
                "BLOCK_ROW": block,
                "BLOCK_G": _GROUPS_PER_STEP,
            },
            num_warps=_NUM_WARPS,
            num_stages=3,
            is_decode=True,
        )
