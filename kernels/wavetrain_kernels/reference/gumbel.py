# SPDX-License-Identifier: Apache-2.0
"""Sampling with Gumbel noise from a counter-based generator: the numbers that every other implementation reproduces.

Taking the largest of log p(i) + g(i), with independent standard Gumbel g, draws i with probability p(i). It is done in
two stages, which is exact and needs noise for a few hundred numbers instead of the vocabulary: first a group of
GROUP_SIZE consecutive tokens is drawn by the groups' total probabilities, then a token within it.

The noise of counter c in the row (seed, position), all in 64-bit integers that wrap around, is

    key = mix(mix(seed) + position)
    u = (mix(key + (c + 1) * 0x9E3779B97F4A7C15) >> 12, plus 1/2) / 2^52
    g = -log(-log(u))

where mix is the finalizer of splitmix64 (Steele, Lea, Flood 2014, with Stafford's constants). Token i has counter i,
group j has counter -2 - j.
"""

from __future__ import annotations

import torch
from torch import Tensor

# N = rows, V = vocabulary size, G = groups.

GROUP_SIZE = 128


def _signed(value: int) -> int:
    """The int64 with the bits of an unsigned 64-bit value."""
    return value - 2**64 if value >= 2**63 else value


_GAMMA = _signed(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = _signed(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = _signed(0x94D049BB133111EB)


def sample(
    token_ids: Tensor,
    best: Tensor,
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    temperature: Tensor,
    lowest: Tensor | None,
) -> None:
    """token_ids [N] = of each row of logits [N, V] what (seed, position) draw, best [N] = its largest logit."""
    logits = logits.float()
    likeliest = torch.empty_like(token_ids)
    torch.max(logits, dim=-1, out=(best, likeliest))
    is_greedy = temperature == 0
    scaled = logits / temperature.masked_fill(is_greedy, 1.0)[:, None]
    if lowest is not None:
        scaled.masked_fill_(scaled < lowest[:, None], float("-inf"))
    _sample(token_ids, scaled, seeds, positions)
    torch.where(is_greedy, likeliest, token_ids, out=token_ids)


def _sample(out: Tensor, logits: Tensor, seeds: Tensor, positions: Tensor) -> None:
    vocab_size = logits.shape[1]
    probs = torch.softmax(logits, dim=-1)
    keys = _mix(_mix(seeds) + positions)[:, None]
    group_probs = _group_sums(probs)
    groups = torch.arange(group_probs.shape[1], device=logits.device)
    group = _draw(group_probs, keys, -2 - groups[None, :])
    token_ids = group[:, None] * GROUP_SIZE + torch.arange(GROUP_SIZE, device=logits.device)
    # The last group may be short: what lies past the vocabulary is given no probability.
    token_probs = probs.gather(1, token_ids.clamp(max=vocab_size - 1)).masked_fill_(token_ids >= vocab_size, 0.0)
    within = _draw(token_probs, keys, token_ids)
    torch.add(group * GROUP_SIZE, within, out=out)
    out.clamp_(max=vocab_size - 1)  # only a row that is all NaN could end past it


def _group_sums(probs: Tensor) -> Tensor:
    """Returns [N, G], the sums of GROUP_SIZE consecutive columns; the last group may be short."""
    num_full = probs.shape[1] // GROUP_SIZE
    sums = probs[:, : num_full * GROUP_SIZE].unflatten(1, (num_full, GROUP_SIZE)).sum(-1) if num_full else None
    if num_full * GROUP_SIZE == probs.shape[1] and sums is not None:
        return sums
    rest = probs[:, num_full * GROUP_SIZE :].sum(-1, keepdim=True)
    return rest if sums is None else torch.cat((sums, rest), dim=1)


def _draw(probs: Tensor, keys: Tensor, counters: Tensor) -> Tensor:
    """Returns [N], the column of the largest log probability plus noise."""
    bits = _mix(keys + (counters + 1) * _GAMMA)
    uniform = (_shift_right(bits, 12).double() + 0.5) * 2.0**-52
    return (probs.double().log_() - uniform.log_().neg_().log_()).argmax(-1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MULTIPLIER_1
    x = (x ^ _shift_right(x, 27)) * _MULTIPLIER_2
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, num_bits: int) -> Tensor:
    """Shifts as if unsigned: torch's shift of int64 repeats the sign."""
    return (x >> num_bits) & ((1 << (64 - num_bits)) - 1)
