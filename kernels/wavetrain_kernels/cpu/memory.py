# SPDX-License-Identifier: Apache-2.0
"""Memory on pages of 2 MiB, for what is streamed: weights, activations, the KV cache.

A translation then covers 512 times as much, and the processor's prefetchers do not stop every 4 KiB. Only asked for:
where the system declines, everything works as before.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

_PAGE_BYTES = 2 << 20
# Weights of a megabyte would fill no page of their own.
_CHUNK_BYTES = 64 << 20
_ALIGNMENT = 64


def huge_zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Returns zeros at the start of a page; memory is taken where it is first written to.

    Raises:
        MemoryError: there is no room for them.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    try:
        # Private: shared memory, which is the default, gets small pages whatever it is advised.
        mapping = mmap.mmap(-1, num_bytes + _PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise MemoryError(f"no room for {num_bytes} bytes") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        mapping.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(mapping, dtype=torch.uint8)
    start = -whole.data_ptr() % _PAGE_BYTES
    return whole[start : start + num_bytes].view(dtype).view(*shape)


class HugePool:
    """Hands out parts of large chunks, one after the other. A chunk is freed when all its parts are."""

    def __init__(self) -> None:
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def empty(self, num_elements: int, dtype: torch.dtype) -> Tensor:
        """Returns an uninitialised vector.

        Raises:
            MemoryError: there is no room for it.
        """
        num_bytes = num_elements * dtype.itemsize
        if num_bytes > _CHUNK_BYTES // 2:
            return huge_zeros((num_elements,), dtype)
        if self._used + num_bytes > self._chunk.shape[0]:
            self._chunk, self._used = huge_zeros((_CHUNK_BYTES,), torch.uint8), 0
        part = self._chunk[self._used : self._used + num_bytes]
        self._used += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        return part.view(dtype)
