# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters of many requests in one step: shrink to their ranks, expand onto a projection's output.

The layout, and what of it may change between steps, is in `lora_adapters`. S-LoRA (arXiv 2311.03285) and Punica
(arXiv 2310.18547) have the idea: one product for all adapters, grouped by adapter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wavetrain_kernels.errors import DtypeError, ShapeError
from wavetrain_kernels.lora_adapters import LoraAdapters, LoraBatch
from wavetrain_kernels.ops.dispatch import implementation

# T = tokens in the step, S = slots, L = slices of a projection, R = room for ranks, H = in, N = out, P = parts.


def sort_by_adapter(token_slots: Tensor, num_slots: int) -> LoraBatch:
    """Returns the tokens of a step by adapter, from the slot [T] int32 of each. Waits for nothing on the device.

    Raises:
        ShapeError: the slots are not [T], or num_slots is not positive.
        DtypeError: they are not int32.
    """
    if token_slots.dim() != 1 or num_slots < 1:
        raise ShapeError(f"token_slots must be [T] and num_slots positive, got {list(token_slots.shape)}, {num_slots}")
    if token_slots.dtype != torch.int32:
        raise DtypeError(f"token_slots must be torch.int32, got {token_slots.dtype}")
    if not token_slots.is_contiguous():
        raise ShapeError(f"token_slots must be contiguous, they are {token_slots.stride(0)} apart")
    kernels = implementation(token_slots.device)
    sorted_tokens = kernels.empty(token_slots.shape, torch.int32, token_slots.device)
    slot_starts = kernels.empty((num_slots + 1,), torch.int32, token_slots.device)
    kernels.sort_by_adapter(sorted_tokens, slot_starts, token_slots)
    return LoraBatch(token_slots, sorted_tokens, slot_starts)


def lora_shrink(x: Tensor, adapters: LoraAdapters, batch: LoraBatch) -> Tensor:
    """Returns x [T, H] times its adapter's A, times its scale, as P partial sums [P, T, L, R] in float32.

    How many parts is up to who answers; `lora_expand` adds them. Rows of tokens without an adapter, and entries past
    an adapter's rank, are not written.

    Raises:
        ShapeError: x, adapters and batch do not fit each other, or a row of x is not contiguous.
        DtypeError: x has another dtype than the adapters.
    """
    _check_batch(adapters, batch)
    if x.shape != (batch.num_tokens, adapters.in_features):
        raise ShapeError(f"x must be {[batch.num_tokens, adapters.in_features]}, got {list(x.shape)}")
    _check_rows("x", x, adapters)
    kernels = implementation(x.device)
    _, num_slices, rank, _ = adapters.a.shape
    num_parts = kernels.num_lora_parts(batch.num_tokens, adapters.in_features)
    parts = kernels.empty((num_parts, batch.num_tokens, num_slices, rank), torch.float32, x.device)
    kernels.lora_shrink(parts, x, adapters, batch)
    return parts


def lora_expand(out: Tensor, parts: Tensor, adapters: LoraAdapters, batch: LoraBatch) -> None:
    """Adds to out [T, N], in place, the sum over P of parts [P, T, L, R] times its adapter's B.

    The sum is rounded to the adapters' dtype before that product, which is added in float32. Rows of tokens without an
    adapter stay as they are.

    Raises:
        ShapeError: out, parts, adapters and batch do not fit each other, or a row of `out` is not contiguous.
        DtypeError: `out` has another dtype than the adapters, or parts are not float32.
    """
    _check_batch(adapters, batch)
    if out.shape != (batch.num_tokens, adapters.out_features):
        raise ShapeError(f"out must be {[batch.num_tokens, adapters.out_features]}, got {list(out.shape)}")
    _check_rows("out", out, adapters)
    expected = (batch.num_tokens, *adapters.a.shape[1:3])
    if parts.dim() != 4 or parts.shape[1:] != expected or not parts.is_contiguous():
        raise ShapeError(f"parts must be contiguous [P, {', '.join(map(str, expected))}], got {list(parts.shape)}")
    if parts.dtype != torch.float32:
        raise DtypeError(f"parts must be torch.float32, got {parts.dtype}")
    implementation(out.device).lora_expand(out, parts, adapters, batch)


def _check_batch(adapters: LoraAdapters, batch: LoraBatch) -> None:
    if batch.num_slots != adapters.num_slots:
        raise ShapeError(f"the batch was sorted for {batch.num_slots} slots, the adapters have {adapters.num_slots}")


def _check_rows(name: str, rows: Tensor, adapters: LoraAdapters) -> None:
    if rows.shape[1] > 1 and rows.stride(1) != 1:
        raise ShapeError(f"the rows of {name} must be contiguous, their elements are {rows.stride(1)} apart")
    if rows.dtype != adapters.a.dtype:
        raise DtypeError(f"{name} and the adapters must have one dtype, got {rows.dtype} and {adapters.a.dtype}")
