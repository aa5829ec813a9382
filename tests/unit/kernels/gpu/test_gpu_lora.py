# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters on the GPU, or interpreted, against the reference: ranks, slices and mixtures of all kinds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wavetrain_kernels.gpu import lora
from wavetrain_kernels.lora_adapters import LoraAdapters, LoraBatch
from wavetrain_kernels.reference import lora as reference

# The interpreter turns arrays of one element into loop bounds, which NumPy frowns upon (Triton 3.6).
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")

# Relative error of a whole result; the products round their operands to dtype.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def make_batch(token_slots: list[int], num_slots: int, device: torch.device) -> LoraBatch:
    slots = torch.tensor(token_slots, dtype=torch.int32, device=device)
    batch = LoraBatch(slots, torch.full_like(slots, -7), torch.full((num_slots + 1,), -7, device=device).int())
    lora.sort_by_adapter(batch.sorted_tokens, batch.slot_starts, slots)
    return batch


def make_adapters(
    ranks: list[int], room: int, in_features: int, sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> LoraAdapters:
    generator = torch.Generator().manual_seed(0)
    num_slots = len(ranks)
    a = torch.randn(num_slots, len(sizes), room, in_features, generator=generator) * in_features**-0.5
    b = torch.randn(num_slots, sum(sizes), room, generator=generator)
    for slot, rank in enumerate(ranks):  # what lies past a rank must not be read
        a[slot, :, rank:] = float("nan")
        b[slot, :, rank:] = float("nan")
    return LoraAdapters(
        a=a.to(device, dtype),
        b=b.to(device, dtype),
        scales=(torch.rand(num_slots, generator=generator) + 0.5).to(device),
        ranks=torch.tensor(ranks, dtype=torch.int32, device=device),
        slice_sizes=sizes,
    )


def both(
    x: Tensor, out: Tensor, adapters: LoraAdapters, batch: LoraBatch, num_parts: int | None = None
) -> tuple[Tensor, Tensor]:
    """Returns what the GPU's functions and the reference make of `out`."""
    results: list[Tensor] = []
    for functions in (lora, reference):
        parts = num_parts if functions is lora and num_parts else functions.num_lora_parts(*x.shape)
        # What is not written must not be read either.
        sums = torch.full((parts, x.shape[0], *adapters.a.shape[1:3]), float("nan"), device=x.device)
        result = out.clone()
        functions.lora_shrink(sums, x, adapters, batch)
        functions.lora_expand(result, sums, adapters, batch)
        results.append(result)
    return results[0], results[1]


def assert_close(result: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    error = (result.double() - expected.double()).norm() / expected.double().norm()
    assert error <= TOLERANCES[dtype], error


@pytest.mark.parametrize(
    ("token_slots", "ranks", "room", "in_features", "sizes"),
    [
        ([0], [16], 16, 64, (32,)),  # one token
        ([2, -1, 0, 1, 2, 2, 0], [16, 3, 8], 16, 100, (40, 24, 24)),  # odd sizes, ranks that differ
        ([1] * 33 + [0] * 2 + [-1] * 5, [5, 20, 0], 24, 72, (65, 17)),  # more tokens than a tile; a slot is empty
        ([3, 0] * 9, [40, 8, 8, 70], 72, 48, (18,)),  # ranks of more than a tile
    ],
)
def test_products_equal_the_reference(token_slots, ranks, room, in_features, sizes, dtype, device):
    batch = make_batch(token_slots, len(ranks), device)
    adapters = make_adapters(ranks, room, in_features, sizes, dtype, device)
    x, out = (torch.randn(len(token_slots), size).to(device, dtype) for size in (in_features, sum(sizes)))
    for num_parts in (1, 3):
        result, expected = both(x, out, adapters, batch, num_parts)
        assert_close(result, expected, dtype)
        untouched = [index for index, slot in enumerate(token_slots) if slot < 0 or ranks[slot] == 0]
        assert torch.equal(result[untouched], out[untouched])


def test_rows_may_be_part_of_wider_ones(dtype, device):
    batch = make_batch([0, 1, 0], 2, device)
    adapters = make_adapters([8, 4], 8, 32, (16, 16), dtype, device)
    x, out = torch.randn(3, 80).to(device, dtype)[:, 16:48], torch.randn(3, 64).to(device, dtype)
    result, expected = out.clone(), out.clone()
    for functions, into in ((lora, result), (reference, expected)):
        sums = torch.empty(1, 3, 2, 8, device=device)
        functions.lora_shrink(sums, x, adapters, batch)
        functions.lora_expand(into[:, 32:], sums, adapters, batch)
    assert_close(result, expected, dtype)
    assert torch.equal(result[:, :32], out[:, :32])


def test_many_tokens_take_the_large_tiles(dtype, device):
    num_tokens = lora._FEW_TOKENS + 3
    batch = make_batch([index % 3 - 1 for index in range(num_tokens)], 2, device)
    adapters = make_adapters([16, 9], 16, 64, (48,), dtype, device)
    x, out = torch.randn(num_tokens, 64).to(device, dtype), torch.randn(num_tokens, 48).to(device, dtype)
    assert_close(*both(x, out, adapters, batch), dtype)


def test_no_tokens(device):
    adapters = make_adapters([4], 4, 8, (8,), torch.float32, device)
    batch = make_batch([], 1, device)
    lora.lora_shrink(torch.empty(1, 0, 1, 4, device=device), torch.empty(0, 8, device=device), adapters, batch)
    lora.lora_expand(torch.empty(0, 8, device=device), torch.empty(1, 0, 1, 4, device=device), adapters, batch)
    assert batch.slot_starts.tolist() == [0, 0]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(-1, 6), max_size=40), st.integers(1, 6))
def test_tokens_are_sorted_as_the_reference_does(token_slots: list[int], num_slots: int) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = make_batch(token_slots, num_slots, device)
    tokens, starts = torch.empty_like(batch.sorted_tokens), torch.empty_like(batch.slot_starts)
    reference.sort_by_adapter(tokens, starts, batch.token_slots)
    assert batch.slot_starts.tolist() == starts.tolist()
    assert batch.sorted_tokens[: starts[-1]].tolist() == tokens[: starts[-1]].tolist()


def test_more_tokens_than_a_block_are_sorted(device):
    token_slots = torch.randint(-1, 3, (lora._SORT_BLOCK + 5,)).tolist()
    batch = make_batch(token_slots, 3, device)
    expected = [index for slot in range(3) for index, found in enumerate(token_slots) if found == slot]
    assert batch.sorted_tokens[: len(expected)].tolist() == expected
    assert batch.slot_starts[-1] == len(expected)


def test_types_without_a_kernel_are_answered_by_the_reference(device):
    batch = make_batch([1, -1, 0], 2, device)
    adapters = make_adapters([4, 2], 4, 8, (8,), torch.float64, device)
    x, out = torch.randn(3, 8, device=device).double(), torch.randn(3, 8, device=device).double()
    for num_parts in (1, 3):
        result, expected = both(x, out, adapters, batch, num_parts)
        torch.testing.assert_close(result, expected)


def test_parts_do_not_depend_on_the_batch_while_it_is_small():
    assert lora.num_lora_parts(1, 4096) == lora.num_lora_parts(lora._FEW_TOKENS, 4096) == 8
    assert lora.num_lora_parts(1, 64) == 1
    assert lora.num_lora_parts(lora._FEW_TOKENS + 1, 4096) == 1
