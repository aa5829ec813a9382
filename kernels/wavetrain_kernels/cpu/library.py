# SPDX-License-Identifier: Apache-2.0
"""The compiled library: its functions' types, the OpenMP runtime it shares with torch, its scratch memory."""

from __future__ import annotations

import ctypes
import threading
from pathlib import Path
from typing import Any

import torch

from wavetrain_kernels.errors import BuildError

_POINTER = ctypes.c_void_p
_INT64 = ctypes.c_int64
_INT = ctypes.c_int
_FLOAT = ctypes.c_float

# Argument types of every function of source/kernels.cpp, in its order; none returns a value but `enable`.
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "pack_weight": (*[_POINTER] * 2, *[_INT64] * 3, _INT),
    "unpack_rows": (*[_POINTER] * 3, *[_INT64] * 2),
    "linear": (*[_POINTER] * 5, *[_INT64] * 5, _INT, _INT),
    "paged_attention": (*[_POINTER] * 8, *[_INT64] * 9, _FLOAT, _FLOAT),
    "rms_norm": (*[_POINTER] * 5, *[_INT64] * 5, _FLOAT, _FLOAT, _INT),
    "rotate_and_cache": (
        _POINTER,
        *(_POINTER, _INT64, _INT64, _INT64) * 2,
        *(_POINTER, _INT64, _INT64),
        *[_POINTER] * 5,
        *[_INT64] * 4,
        _INT,
    ),
    "sample_greedy": (*[_POINTER] * 3, *[_INT64] * 3),
    "sample": (*[_POINTER] * 5, *[_INT64] * 2),
    "apply_penalties": (*[_POINTER] * 7, *[_INT64] * 3),
    "apply_filters": (*[_POINTER] * 4, *[_INT64] * 2),
    "top_logprobs": (*[_POINTER] * 5, *[_INT64] * 4),
}


class Library:
    """Functions of one compiled library, as attributes: `library.linear(...)`. Addresses and sizes go in as they are.

    Raises:
        BuildError: it cannot be loaded, or the operating system refuses the registers it needs.
    """

    def __init__(self, path: Path) -> None:
        try:
            functions = ctypes.CDLL(str(path))
        except OSError as error:
            raise BuildError(f"the compiled CPU kernels cannot be loaded: {error}") from error
        if not functions.wavetrain_enable():
            raise BuildError("the operating system does not grant the matrix registers that this CPU has")
        for name, types in _SIGNATURES.items():
            function = getattr(functions, f"wavetrain_{name}")
            function.argtypes, function.restype = types, None
            setattr(self, name, function)
        self._scratch = threading.local()

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"the CPU kernels have no function {name!r}")

    def scratch(self, num_bytes: int) -> int:
        """Returns the address of memory for one call. It belongs to the calling thread until its next call."""
        memory: torch.Tensor | None = getattr(self._scratch, "memory", None)
        if memory is None or memory.shape[0] < num_bytes:
            # Grows by half more than asked for, so that a slowly growing context does not allocate at each step.
            memory = torch.empty(num_bytes + num_bytes // 2, dtype=torch.uint8)
            self._scratch.memory = memory
            self._scratch.address = memory.data_ptr()
        return self._scratch.address


def openmp_runtime(maps: Path = Path("/proc/self/maps")) -> Path:
    """Returns the file of the OpenMP runtime that torch has loaded into this process.

    Raises:
        BuildError: there is none.
    """
    for line in maps.read_text(encoding="utf-8").splitlines():
        path = Path(line.split(maxsplit=5)[-1].strip())
        if path.name.startswith(("libgomp", "libiomp", "libomp")):
            return path
    raise BuildError("torch runs here without OpenMP, which the CPU kernels share with it")
