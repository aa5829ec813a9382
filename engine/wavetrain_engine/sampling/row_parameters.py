# SPDX-License-Identifier: Apache-2.0
"""The numbers among the sampling parameters, in arrays by the worker's row: a batch is gathered at once, not by row."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wavetrain_engine.sampling_params import SamplingParams

# Below this a temperature is as good as 0, and dividing by it would not be (vLLM's bound).
_MIN_TEMPERATURE = 1e-5
_FIRST_ROWS = 64

# Rows of the two arrays.
_TEMPERATURE, _TOP_P, _MIN_P, _REPETITION, _PRESENCE, _FREQUENCY = range(6)
_SEED, _TOP_K = range(2)
_NO_PENALTIES = np.asarray([[1.0], [0.0], [0.0]], dtype=np.float32)

# N = rows of a batch.


@dataclass(frozen=True, slots=True, eq=False)
class RandomArrays:
    """How each of N rows draws.

    Attributes:
        floats: [3, N] float32: temperature (0 takes the likeliest token), top_p, min_p.
        ints: [2, N] int64: seed, top_k.
        has_filters: some row excludes tokens.
    """

    floats: NDArray[np.float32]
    ints: NDArray[np.int64]
    has_filters: bool


class RowParameters:
    """Sampling parameters by row; the arrays grow as needed."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._floats = np.zeros((6, _FIRST_ROWS), dtype=np.float32)
        self._ints = np.zeros((2, _FIRST_ROWS), dtype=np.int64)

    def set(self, row: int, params: SamplingParams, seed: int) -> bool:
        """Notes a row's parameters, of the seed its low 64 bits; returns whether it takes the likeliest token."""
        if row >= self._floats.shape[1]:
            num_more = max(row + 1, 2 * self._floats.shape[1]) - self._floats.shape[1]
            self._floats = np.pad(self._floats, ((0, 0), (0, num_more)))
            self._ints = np.pad(self._ints, ((0, 0), (0, num_more)))
        is_greedy = params.is_greedy or params.temperature < _MIN_TEMPERATURE
        random = (0.0, 1.0, 0.0) if is_greedy else (params.temperature, params.top_p, params.min_p)
        penalties = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
        self._floats[:, row] = (*random, *penalties)
        self._ints[:, row] = (_to_int64(seed), 0 if is_greedy else max(params.top_k, 0))
        return is_greedy

    def has_penalties(self, row: int) -> bool:
        """True where some penalty changes something."""
        return bool((self._floats[_REPETITION:, row] != _NO_PENALTIES[:, 0]).any())

    def random(self, rows: NDArray[np.int64]) -> RandomArrays | None:
        """Returns how the rows draw; None where all take their likeliest token."""
        # Kernels read each row of these as it lies in memory, and numpy would lay them out the other way round.
        floats = np.ascontiguousarray(self._floats[: _MIN_P + 1, rows])
        ints = np.ascontiguousarray(self._ints[:, rows])
        if not floats[_TEMPERATURE].any():
            return None
        top_k = ints[_TOP_K]
        filters = ((top_k > 0) & (top_k < self._vocab_size)) | (floats[_TOP_P] < 1.0) | (floats[_MIN_P] > 0.0)
        return RandomArrays(floats, ints, bool(filters.any()))

    def penalties(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Returns which of the rows have penalties [P], and repetition, presence and frequency of these [3, P]."""
        found = self._floats[_REPETITION:, rows]
        indices = np.flatnonzero((found != _NO_PENALTIES).any(0))
        return indices, np.ascontiguousarray(found[:, indices])


def _to_int64(seed: int) -> int:
    """The int64 with the low 64 bits of a seed, which may come as signed or unsigned."""
    seed &= 2**64 - 1
    return seed - 2**64 if seed >= 2**63 else seed
