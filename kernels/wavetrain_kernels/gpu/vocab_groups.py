# SPDX-License-Identifier: Apache-2.0
"""What is known of a row of logits after one pass: the largest of every group of 128 tokens, and the group's weight.

A thousand groups stand for a vocabulary of 128k, and one program holds those of a row in registers. The draw, the
filters and the log-probabilities begin with this pass and read hardly any logit twice: the k largest of a row, say, are
in the k groups with the largest maxima.

Logits are ordered by integers, in which -0 equals 0 and NaN is larger than all: no comparison depends on what a
compiler, a GPU or the interpreter makes of NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from wavetrain_kernels.gpu.aot_case import AotCase
from wavetrain_kernels.gpu.launch import TRITON_TYPES, cdiv, launch, next_power_of_2
from wavetrain_kernels.gpu.workspace import workspace
from wavetrain_kernels.reference.gumbel import GROUP_SIZE

# N = rows, V = vocabulary size, G = groups.

GROUP = tl.constexpr(GROUP_SIZE)
INFINITY = tl.constexpr(float("inf"))
# Below the key of every float.
LOWEST_KEY = tl.constexpr(-(2**31))
_KEY_OF_NAN = tl.constexpr(2**31 - 1)

# Never changed with the number of rows: a group's sum would be added up in another order.
GROUPS_PER_PROGRAM = 16
_NUM_WARPS = 4

# Vocabularies of the checkpoints we serve; what is compiled ahead of time.
AOT_VOCAB_SIZES = (32000, 128256, 151936, 262144)


@dataclass(frozen=True, slots=True, eq=False)
class VocabGroups:
    """The groups of each row; scratch memory, good until the next call of `vocab_groups`.

    Attributes:
        maxima: [N, G] float32, the largest logit; NaN where there is one.
        sums: [N, G] float32, of exp((logit - maximum) / temperature) over the logits that count.
        num_larger: [N, programs of a row] int32, how many of some groups' logits are larger than the given token's.
    """

    maxima: Tensor
    sums: Tensor
    num_larger: Tensor

    @property
    def num_groups(self) -> int:
        """G."""
        return self.maxima.shape[1]


def is_supported(logits: Tensor) -> bool:
    """Returns whether the kernels that read logits take this type."""
    return logits.dtype in TRITON_TYPES


def whole_rows(logits: Tensor) -> Tensor:
    """Returns logits whose rows lie in one piece: these, unless they are cut along the vocabulary in steps."""
    return logits if logits.stride(1) == 1 else logits.contiguous()


def vocab_groups(
    logits: Tensor,
    *,
    temperature: Tensor | None = None,
    lowest: Tensor | None = None,
    token_ids: Tensor | None = None,
) -> VocabGroups:
    """Reads logits [N, V] once.

    Args:
        temperature: [N] float32; None: 1 for all. Where it is 0, sums mean nothing.
        lowest: [N] float32; smaller ones of logits / temperature do not count. None: all count.
        token_ids: [N] int64, whose logits are compared with; None: `num_larger` means nothing.
    """
    num_rows, vocab_size = logits.shape
    num_groups = cdiv(vocab_size, GROUP_SIZE)
    num_programs = cdiv(num_groups, GROUPS_PER_PROGRAM)
    stats = workspace("vocab_groups", (2, num_rows, num_groups), torch.float32, logits.device)
    num_larger = workspace("vocab_larger", (num_rows, num_programs), torch.int32, logits.device)
    launch(
        _vocab_groups_kernel,
        (num_programs, num_rows),
        stats[0],
        stats[1],
        num_larger,
        logits,
        temperature,
        lowest,
        token_ids,
        vocab_size,
        num_groups,
        logits.stride(0),
        HAS_TEMPERATURE=temperature is not None,
        HAS_LOWEST=lowest is not None,
        HAS_TOKEN=token_ids is not None,
        BLOCK_G=GROUPS_PER_PROGRAM,
        num_warps=_NUM_WARPS,
    )
    return VocabGroups(stats[0], stats[1], num_larger)


def group_block(num_groups: int) -> int:
    """Returns how many groups a program holds that holds all of a row."""
    return max(next_power_of_2(num_groups), 32)


@triton.jit
def order_key(x) -> tl.tensor:
    """Returns int32 that are ordered as the float32 are; of NaN the largest."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x != x, _KEY_OF_NAN, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def from_order_key(key) -> tl.tensor:
    """Returns the float32 of a key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def positive(temperature) -> tl.tensor:
    """Returns the temperature to divide by: 1 in place of 0."""
    return tl.where(temperature > 0.0, temperature, 1.0)


@triton.jit(
    do_not_specialize_on_alignment=[
        "maxima_ptr", "sums_ptr", "num_larger_ptr", "temperature_ptr", "lowest_ptr", "token_ids_ptr"
    ]
)  # fmt: skip
def _vocab_groups_kernel(
    maxima_ptr,  # [N, G]
    sums_ptr,  # [N, G]
    num_larger_ptr,  # [N, programs of a row]
    logits_ptr,  # [N, V]
    temperature_ptr,  # [N]
    lowest_ptr,  # [N]
    token_ids_ptr,  # [N]
    vocab_size,
    num_groups,
    stride_xn,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_LOWEST: tl.constexpr,
    HAS_TOKEN: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """BLOCK_G groups of one row."""
    program = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    groups = program * BLOCK_G + tl.arange(0, BLOCK_G)
    columns = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    row_ptr = logits_ptr + row * stride_xn
    x = tl.load(row_ptr + columns, mask=columns < vocab_size, other=-INFINITY).to(tl.float32)
    is_nan = x != x
    x = tl.where(is_nan, -INFINITY, x)
    maxima = tl.max(x, axis=1)
    has_nan = tl.max(is_nan.to(tl.int32), axis=1) > 0
    # Equal infinities have no difference.
    base = tl.where((maxima > -INFINITY) & (maxima < INFINITY), maxima, 0.0)
    differences = x - base[:, None]
    counts = x > -INFINITY
    if HAS_TEMPERATURE:
        temperature = positive(tl.load(temperature_ptr + row))
        # Weights may be off by a rounding, the comparison may not: it decides what is drawn at all.
        if HAS_LOWEST:
            counts = counts & (tl.div_rn(x, temperature + tl.zeros_like(x)) >= tl.load(lowest_ptr + row))
        differences = differences * (1.0 / temperature)
    sums = tl.sum(tl.where(counts, tl.exp(differences), 0.0), axis=1)
    places = row * num_groups + groups
    tl.store(maxima_ptr + places, tl.where(has_nan, float("nan"), maxima), mask=groups < num_groups)
    tl.store(sums_ptr + places, sums, mask=groups < num_groups)
    if HAS_TOKEN:
        own = tl.load(row_ptr + tl.load(token_ids_ptr + row)).to(tl.float32)
        is_larger = (x > own).to(tl.int32)
        tl.store(num_larger_ptr + row * tl.num_programs(0) + program, tl.sum(tl.sum(is_larger, axis=1), axis=0))


def aot_kinds(constant_of: Callable[[int], int]) -> Iterator[tuple[str, int]]:
    """Returns what is compiled ahead of time: a type of logits, and a constant that `constant_of` a vocabulary's size.

    The engine has logits in float32: with each constant. Other types, which the functions take too, with the largest,
    which takes the most registers.
    """
    constants = sorted({constant_of(size) for size in AOT_VOCAB_SIZES})
    for dtype in TRITON_TYPES.values():
        for constant in constants if dtype == "fp32" else constants[-1:]:
            yield dtype, constant


def aot_cases() -> Iterator[AotCase]:
    """See AotCase."""
    for uses in (("temperature",), ("temperature", "lowest"), ("token",)):
        for dtype in TRITON_TYPES.values():
            yield AotCase(
                name=f"vocab_groups/{'+'.join(uses)}/{dtype}",
                kernel=_vocab_groups_kernel,
                signature={
                    "maxima_ptr": "*fp32",
                    "sums_ptr": "*fp32",
                    "num_larger_ptr": "*i32",
                    "logits_ptr": f"*{dtype}",
                    **({"temperature_ptr": "*fp32"} if "temperature" in uses else {}),
                    **({"lowest_ptr": "*fp32"} if "lowest" in uses else {}),
                    **({"token_ids_ptr": "*i64"} if "token" in uses else {}),
                    "vocab_size": "i32:16",
                    "num_groups": "i32",
                    "stride_xn": "i32:16",
                },
                constexprs={
                    **({} if "temperature" in uses else {"temperature_ptr": None}),
                    **({} if "lowest" in uses else {"lowest_ptr": None}),
                    **({} if "token" in uses else {"token_ids_ptr": None}),
                    "HAS_TEMPERATURE": "temperature" in uses,
                    "HAS_LOWEST": "lowest" in uses,
                    "HAS_TOKEN": "token" in uses,
                    "BLOCK_G": GROUPS_PER_PROGRAM,
                },
                num_warps=_NUM_WARPS,
                num_stages=3,
                is_decode=True,
            )
