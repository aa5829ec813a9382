# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters: the reference against a dense product for each token, and every check of the public functions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from wavetrain_kernels import ops
from wavetrain_kernels.errors import DtypeError, ShapeError
from wavetrain_kernels.kernel_set import KernelSet

pytestmark = pytest.mark.usefixtures("kernels")

SLOTS = torch.tensor([1, -1, 0, 3, 1, 2, 1, 9], dtype=torch.int32)  # slot 2 is empty, and there is no slot 9
SIZES = (10, 3, 4)


def make_adapters(dtype: torch.dtype = torch.float32) -> ops.LoraAdapters:
    generator = torch.Generator().manual_seed(0)
    return ops.LoraAdapters(
        a=torch.randn(4, 3, 6, 24, generator=generator).to(dtype),
        b=torch.randn(4, sum(SIZES), 6, generator=generator).to(dtype),
        scales=torch.tensor([0.5, 2.0, 1.0, 0.25]),
        ranks=torch.tensor([4, 6, 0, 1], dtype=torch.int32),
        slice_sizes=SIZES,
    )


def apply_to(out: Tensor, x: Tensor, adapters: ops.LoraAdapters, batch: ops.LoraBatch) -> None:
    ops.lora_expand(out, ops.lora_shrink(x, adapters, batch), adapters, batch)


def test_every_token_gets_what_its_own_adapter_adds() -> None:
    adapters, x, out = make_adapters(), torch.randn(8, 24), torch.randn(8, 17)
    expected = out.double()
    for token, slot in enumerate(SLOTS.tolist()):
        if not 0 <= slot < 4:
            continue
        rank = int(adapters.ranks[slot])
        delta = [
            a[:rank].double() @ x[token].double() * adapters.scales[slot].double() for a in adapters.a[slot].unbind()
        ]
        rows = adapters.b[slot, :, :rank].double().split(SIZES)
        expected[token] += torch.cat([row @ part for row, part in zip(rows, delta, strict=True)])
    apply_to(out, x, adapters, ops.sort_by_adapter(SLOTS, 4))
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-4)


def test_what_lies_past_a_rank_is_never_read() -> None:
    adapters, x = make_adapters(), torch.randn(8, 24)
    clean, poisoned = torch.zeros(8, 17), torch.zeros(8, 17)
    batch = ops.sort_by_adapter(SLOTS, 4)
    apply_to(clean, x, adapters, batch)
    for slot, rank in enumerate(adapters.ranks.tolist()):
        adapters.a[slot, :, rank:] = float("nan")
        adapters.b[slot, :, rank:] = float("nan")
    apply_to(poisoned, x, adapters, batch)
    assert torch.equal(poisoned, clean)


def test_tokens_are_sorted_by_slot_in_their_order() -> None:
    batch = ops.sort_by_adapter(SLOTS, 4)
    assert batch.slot_starts.tolist() == [0, 1, 4, 5, 6]
    assert batch.sorted_tokens[:6].tolist() == [2, 0, 4, 6, 5, 3]
    assert (batch.num_tokens, batch.num_slots) == (8, 4)
    empty = ops.sort_by_adapter(SLOTS[:0], 2)
    assert empty.slot_starts.tolist() == [0, 0, 0]


def test_nothing_happens_without_adapters_or_tokens() -> None:
    adapters, x, out = make_adapters(), torch.randn(8, 24), torch.randn(8, 17)
    before = out.clone()
    apply_to(out, x, adapters, ops.sort_by_adapter(torch.full((8,), -1, dtype=torch.int32), 4))
    assert torch.equal(out, before)
    apply_to(out[:0], x[:0], adapters, ops.sort_by_adapter(SLOTS[:0], 4))


def test_sorting_refuses_what_does_not_fit() -> None:
    with pytest.raises(ShapeError, match="token_slots"):
        ops.sort_by_adapter(SLOTS[None], 4)
    with pytest.raises(ShapeError, match="num_slots"):
        ops.sort_by_adapter(SLOTS, 0)
    with pytest.raises(DtypeError, match="int32"):
        ops.sort_by_adapter(SLOTS.long(), 4)
    with pytest.raises(ShapeError, match="contiguous"):
        ops.sort_by_adapter(SLOTS[::2], 4)


def test_adapters_refuse_what_does_not_fit() -> None:
    good = make_adapters()
    for change, message in (
        ({"a": good.a[0]}, "a must be"),
        ({"b": good.b[0]}, "b \\[S, N, R\\]"),
        ({"b": good.b[:, 1:].contiguous()}, "do not fit"),
        ({"b": good.b[..., 1:].contiguous()}, "do not fit"),
        ({"slice_sizes": (10, 7)}, "do not fit"),
        ({"slice_sizes": (10, 7, 0)}, "none of them empty"),
        ({"a": good.a.transpose(2, 3).contiguous().transpose(2, 3)}, "contiguous"),
        ({"scales": good.scales.repeat_interleave(2)[::2]}, "contiguous"),
        ({"ranks": good.ranks.repeat_interleave(2)[::2]}, "contiguous"),
        ({"scales": good.scales[1:]}, "scales"),
        ({"ranks": good.ranks[1:]}, "ranks"),
    ):
        with pytest.raises(ShapeError, match=message):
            replace(good, **change)
    for rank, sizes in ((257, (4,)), (2, (1, 1, 1, 1))):
        with pytest.raises(ShapeError, match="possible"):
            ops.LoraAdapters(
                a=torch.zeros(1, len(sizes), rank, 8),
                b=torch.zeros(1, 4, rank),
                scales=torch.ones(1),
                ranks=torch.zeros(1, dtype=torch.int32),
                slice_sizes=sizes,
            )
    for change, message in (
        ({"a": good.a.half()}, "one floating-point dtype"),
        ({"a": good.a.int(), "b": good.b.int()}, "one floating-point dtype"),
        ({"scales": good.scales.double()}, "scales"),
        ({"ranks": good.ranks.long()}, "ranks"),
    ):
        with pytest.raises(DtypeError, match=message):
            replace(good, **change)


def test_shrink_refuses_what_does_not_fit() -> None:
    adapters, batch, x = make_adapters(), ops.sort_by_adapter(SLOTS, 4), torch.randn(8, 24)
    with pytest.raises(ShapeError, match="x must be"):
        ops.lora_shrink(x[:, 1:], adapters, batch)
    with pytest.raises(ShapeError, match="x must be"):
        ops.lora_shrink(x[1:], adapters, batch)
    with pytest.raises(ShapeError, match="rows of x"):
        ops.lora_shrink(torch.randn(24, 8).T, adapters, batch)
    with pytest.raises(ShapeError, match="rows of x"):
        ops.lora_shrink(torch.randn(1, 48)[:, ::2], adapters, ops.sort_by_adapter(SLOTS[:1], 4))
    with pytest.raises(ShapeError, match="slots"):
        ops.lora_shrink(x, adapters, ops.sort_by_adapter(SLOTS, 5))
    with pytest.raises(DtypeError, match="one dtype"):
        ops.lora_shrink(x.half(), adapters, batch)


def test_expand_refuses_what_does_not_fit(kernels: KernelSet) -> None:
    adapters, batch, out = make_adapters(), ops.sort_by_adapter(SLOTS, 4), torch.randn(8, 17)
    parts = ops.lora_shrink(torch.randn(8, 24), adapters, batch)
    assert parts.shape == (kernels.num_lora_parts(8, 24), 8, 3, 6)
    with pytest.raises(ShapeError, match="out must be"):
        ops.lora_expand(out[:, 1:], parts, adapters, batch)
    with pytest.raises(ShapeError, match="rows of out"):
        ops.lora_expand(torch.randn(17, 8).T, parts, adapters, batch)
    with pytest.raises(ShapeError, match="parts must be"):
        ops.lora_expand(out, parts[:, 1:], adapters, batch)
    with pytest.raises(ShapeError, match="parts must be"):
        ops.lora_expand(out, parts[0], adapters, batch)
    with pytest.raises(ShapeError, match="slots"):
        ops.lora_expand(out, parts, adapters, ops.sort_by_adapter(SLOTS, 5))
    with pytest.raises(DtypeError, match="one dtype"):
        ops.lora_expand(out.half(), parts, adapters, batch)
    with pytest.raises(DtypeError, match="float32"):
        ops.lora_expand(out, parts.half(), adapters, batch)
