# SPDX-License-Identifier: Apache-2.0
"""What flows between the layers for all windows of a text, in a file: memory holds what there is room for."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

# W = windows, S = tokens of a window, H = hidden size.


class HiddenStates:
    """Hidden states [W, S, H] that live in a file.

    A file is complete when it has its name: `create` writes beside it, and `commit` moves it there.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int], dtype: torch.dtype, *, is_new: bool) -> None:
        self._path = path
        self._partial = path.with_name(f"{path.name}.partial")
        num_elements = shape[0] * shape[1] * shape[2]
        if num_elements == 0:
            self.values = torch.empty(shape, dtype=dtype)
            if is_new:
                self._partial.touch()
            return
        name = str(self._partial if is_new else path)
        self.values: Tensor = torch.from_file(name, shared=True, size=num_elements, dtype=dtype).view(shape)

    @classmethod
    def create(cls, path: Path, shape: tuple[int, int, int], dtype: torch.dtype) -> HiddenStates:
        """Makes room for states that are yet to be written."""
        path.with_name(f"{path.name}.partial").unlink(missing_ok=True)
        return cls(path, shape, dtype, is_new=True)

    @classmethod
    def open(cls, path: Path, shape: tuple[int, int, int], dtype: torch.dtype) -> HiddenStates:
        """Finds states that were written before."""
        return cls(path, shape, dtype, is_new=False)

    def commit(self) -> None:
        """Gives the file its name."""
        self._partial.replace(self._path)
