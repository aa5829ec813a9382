# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters, one adapter after the other. Every sum is one part."""

from __future__ import annotations

import torch
from torch import Tensor

from wavetrain_kernels.lora_adapters import LoraAdapters, LoraBatch


def sort_by_adapter(sorted_tokens: Tensor, slot_starts: Tensor, token_slots: Tensor) -> None:
    """Sorts the tokens by slot, those without an adapter last; slots begin where those below have ended."""
    num_slots = slot_starts.shape[0] - 1
    slots = torch.where((token_slots >= 0) & (token_slots < num_slots), token_slots, num_slots)
    sorted_tokens.copy_(torch.argsort(slots, stable=True))
    slot_starts.copy_((slots[:, None] < torch.arange(num_slots + 1, device=slots.device)).sum(dim=0))


def num_lora_parts(_num_tokens: int, _in_features: int) -> int:
    """Returns 1."""
    return 1


def lora_shrink(parts: Tensor, x: Tensor, adapters: LoraAdapters, batch: LoraBatch) -> None:
    """parts [1, T, L, R] = x @ A.T * scale, in float32, for each token's A."""
    for slot, tokens, rank in _groups(adapters, batch):
        a = adapters.a[slot, :, :rank].float()
        product = torch.einsum("th,lrh->tlr", x[tokens].float(), a)
        parts[0, tokens, :, :rank] = product * adapters.scales[slot]


def lora_expand(out: Tensor, parts: Tensor, adapters: LoraAdapters, batch: LoraBatch) -> None:
    """out [T, N] += sum of parts @ B.T, slice by slice, for each token's B."""
    for slot, tokens, rank in _groups(adapters, batch):
        shrunk = parts[:, tokens, :, :rank].sum(dim=0).to(adapters.b.dtype).float()
        rows = adapters.b[slot, :, :rank].float().split(adapters.slice_sizes)
        added = [shrunk[:, index] @ row.T for index, row in enumerate(rows)]
        out[tokens] = (out[tokens].float() + torch.cat(added, dim=1)).to(out.dtype)


def _groups(adapters: LoraAdapters, batch: LoraBatch) -> list[tuple[int, Tensor, int]]:
    """Returns slot, tokens and rank of every adapter in use."""
    starts, ranks = batch.slot_starts.tolist(), adapters.ranks.tolist()
    return [
        (slot, batch.sorted_tokens[starts[slot] : starts[slot + 1]].long(), ranks[slot])
        for slot in range(adapters.num_slots)
        if starts[slot + 1] > starts[slot] and ranks[slot] > 0
    ]
