# SPDX-License-Identifier: Apache-2.0
"""Where a tensor lies, whatever the format of its file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor: bytes [begin, end) of a file; `dtype` in the format's own spelling (F32, BF16, Q4_K, ...)."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return self.end - self.begin
