# SPDX-License-Identifier: Apache-2.0
"""From logits to tokens: penalties, filters, seeded sampling, log-probabilities.

Every result of a row depends on that row's arguments alone: never on the other rows, their number or their order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wavetrain_kernels.errors import DtypeError, ShapeError
from wavetrain_kernels.ops.dispatch import implementation

# N = rows, V = vocabulary size, L = tokens of the longest row.


def apply_penalties(
    logits: Tensor,
    token_ids: Tensor,
    output_counts: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
) -> None:
    """Penalizes, in place in logits [N, V], the tokens that occurred in each row.

    A logit is divided (where positive) or multiplied (where not) by `repetition`, then loses `presence` if the token
    is in the output at all and `frequency` times its count there.

    Args:
        token_ids: [N, L] int64, the tokens of prompt and output in any order. One may come again, with the same
            count, and is penalized once; that is how shorter rows are padded.
        output_counts: [N, L] int32, how often each of them occurs in the output; 0 for a token of the prompt only.
        repetition, presence, frequency: [N] float32; 1, 0 and 0 change nothing.

    Raises:
        ShapeError, DtypeError: an argument is not as above.
    """
    num_rows = _check_logits(logits).shape[0]
    if token_ids.dim() != 2 or token_ids.shape[0] != num_rows or output_counts.shape != token_ids.shape:
        raise ShapeError(
            f"token_ids and output_counts must be [{num_rows}, L], "
            f"got {list(token_ids.shape)} and {list(output_counts.shape)}"
        )
    if token_ids.dtype != torch.int64 or output_counts.dtype != torch.int32:
        raise DtypeError(
            f"token_ids must be int64 and output_counts int32, got {token_ids.dtype} and {output_counts.dtype}"
        )
    _check_rows("repetition", repetition, num_rows, torch.float32)
    _check_rows("presence", presence, num_rows, torch.float32)
    _check_rows("frequency", frequency, num_rows, torch.float32)
    implementation(logits.device).apply_penalties(logits, token_ids, output_counts, repetition, presence, frequency)


def filter_thresholds(
    logits: Tensor,
    temperature: Tensor,
    *,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
) -> Tensor:
    """Returns what logits [N, V] / temperature must reach to be kept, [N] float32: by min_p, then top_k, then top_p.

    Each filter works on the distribution that the one before it left. Tokens exactly as likely as the last one kept
    are kept too, so the result does not depend on the order of a sort, and one number says it all. It is -inf in rows
    of temperature 0 and in rows that cannot be sampled from. Logits may have any float dtype.

    Args:
        temperature: [N] float32; 0 or more.
        top_k: [N] int64, how many of the likeliest tokens to keep; 0 or less keeps all.
        top_p: [N] float32 in (0, 1], keep likeliest tokens until their probability reaches it; 1 keeps all.
        min_p: [N] float32 in [0, 1], keep tokens at least this fraction as likely as the likeliest.

    Raises:
        ShapeError, DtypeError: an argument is not as above.
    """
    num_rows = _check_any_logits(logits).shape[0]
    _check_rows("temperature", temperature, num_rows, torch.float32)
    if top_k is not None:
        _check_rows("top_k", top_k, num_rows, torch.int64)
    if top_p is not None:
        _check_rows("top_p", top_p, num_rows, torch.float32)
    if min_p is not None:
        _check_rows("min_p", min_p, num_rows, torch.float32)
    lowest = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    implementation(logits.device).filter_thresholds(lowest, logits, temperature, top_k, top_p, min_p)
    return lowest


def sample(
    logits: Tensor, seeds: Tensor, positions: Tensor, temperature: Tensor, lowest: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Draws a token id [N] int64 from softmax(logits [N, V] / temperature) of each row; returns it, and `best` [N].

    A row of temperature 0 gets its likeliest token. `best`, float32, is the row's largest logit, as `sample_greedy`
    has it: not finite exactly where the row cannot be sampled from; of such a row some token comes out.

    The draw is a function of (logits, temperature, lowest, seed, position): a counter-based generator, see
    `reference/gumbel.py` for the exact numbers. Logits may have any float dtype; they count as float32.

    Args:
        seeds: [N] int64.
        positions: [N] int64, the index in its sequence of the token that is drawn.
        temperature: [N] float32; 0 or more.
        lowest: [N] float32, of `filter_thresholds`: smaller ones of logits / temperature are never drawn. None: any.

    Raises:
        ShapeError, DtypeError: an argument is not as above.
    """
    num_rows = _check_any_logits(logits).shape[0]
    _check_rows("seeds", seeds, num_rows, torch.int64)
    _check_rows("positions", positions, num_rows, torch.int64)
    _check_rows("temperature", temperature, num_rows, torch.float32)
    if lowest is not None:
        _check_rows("lowest", lowest, num_rows, torch.float32)
    token_ids = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    best = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    implementation(logits.device).sample(token_ids, best, logits, seeds, positions, temperature, lowest)
    return token_ids, best


def sample_greedy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the likeliest token id [N] int64 of each row of logits [N, V] (any float dtype), and its logit [N].

    That logit is not finite exactly where the row cannot be sampled from: NaN or +inf among its logits, or all -inf.

    Raises:
        ShapeError, DtypeError: logits are not as above.
    """
    _check_any_logits(logits)
    token_ids = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    best = torch.empty(logits.shape[0], dtype=logits.dtype, device=logits.device)
    implementation(logits.device).sample_greedy(token_ids, best, logits)
    return token_ids, best


def top_logprobs(logits: Tensor, token_ids: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (ids [N, 1 + k] int64, logprobs [N, 1 + k] float32, ranks [N] int64) of log_softmax(logits [N, V]).

    Column 0 is the given token [N] int64, whose rank (1 = likeliest; tokens strictly likelier, plus 1) is returned;
    columns 1 to k are the likeliest tokens in order. Logits may have any float dtype.

    Raises:
        ShapeError: logits are not [N, V] with some V, token_ids not [N], or k not in [0, V].
        DtypeError: logits are not floating point or token_ids not int64.
    """
    num_rows, vocab_size = _check_any_logits(logits).shape
    if not 0 <= k <= vocab_size:
        raise ShapeError(f"k must be between 0 and {vocab_size}, got {k}")
    _check_rows("token_ids", token_ids, num_rows, torch.int64)
    ids = torch.empty((num_rows, 1 + k), dtype=torch.int64, device=logits.device)
    logprobs = torch.empty((num_rows, 1 + k), dtype=torch.float32, device=logits.device)
    ranks = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    implementation(logits.device).top_logprobs(ids, logprobs, ranks, logits, token_ids)
    return ids, logprobs, ranks


def _check_any_logits(logits: Tensor) -> Tensor:
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ShapeError(f"logits must be [N, V], got {list(logits.shape)}")
    if not logits.is_floating_point():
        raise DtypeError(f"logits must be floating point, got {logits.dtype}")
    return logits


def _check_logits(logits: Tensor) -> Tensor:
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ShapeError(f"logits must be [N, V], got {list(logits.shape)}")
    if logits.dtype != torch.float32:
        raise DtypeError(f"logits must be float32, got {logits.dtype}")
    if not logits.is_contiguous():
        raise ShapeError("logits must be contiguous")
    return logits


def _check_rows(name: str, tensor: Tensor, num_rows: int, dtype: torch.dtype) -> None:
    if tensor.dim() != 1 or tensor.shape[0] != num_rows:
        raise ShapeError(f"{name} must be [{num_rows}], got {list(tensor.shape)}")
    if tensor.dtype != dtype:
        raise DtypeError(f"{name} must be {dtype}, got {tensor.dtype}")
    if not tensor.is_contiguous():  # kernels go by addresses: a row would get its neighbour's
        raise ShapeError(f"{name} must be contiguous, its elements are {tensor.stride(0)} apart")
