# SPDX-License-Identifier: Apache-2.0
"""The compiled library: its functions' types, the OpenMP runtime it shares with torch, its scratch memory."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from wavetrain_kernels.errors import BuildError

_POINTER = ctypes.c_void_p
_INT64 = ctypes.c_int64
_INT = ctypes.c_int
_FLOAT = ctypes.c_float

# Argument types of every function of source/kernels.cpp, in its order.
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "program_new": (_INT64,),
    "program_free": (_POINTER,),
    "program_record": (_POINTER,),
    "program_is_sound": (_POINTER,),
    "program_run": (*[_POINTER] * 2,),
    "pack_weight": (*[_POINTER] * 2, *[_INT64] * 3, _INT),
    "embedding": (*[_POINTER] * 3, *[_INT64] * 2, _FLOAT, _INT),
    "select_rows": (*[_POINTER] * 3, *[_INT64] * 2),
    "linear": (*[_POINTER] * 5, *[_INT64] * 5, _INT, _INT),
    "quantized_bytes": (_POINTER,),
    "quantized_workspace": (_POINTER, _INT64),
    "pack_quantized": (*[_POINTER] * 5, _INT64),
    "quantized_linear": (*[_POINTER] * 9, *[_INT64] * 3, _INT, _INT),
    "route_experts": (*[_POINTER] * 3, *[_INT64] * 3, _INT),
    "fused_moe": (*[_POINTER] * 7, *[_INT64] * 6, _INT),
    "quantized_moe": (*[_POINTER] * 7, *[_INT64] * 6, _INT),
    "paged_attention": (*[_POINTER] * 6, _INT, *[_POINTER] * 4, *[_INT64] * 10, _FLOAT, _FLOAT),
    "rms_norm": (*[_POINTER] * 5, *[_INT64] * 5, _FLOAT, _FLOAT, _INT),
    "rotate_and_cache": (
        _POINTER,
        *(_POINTER, _INT64, _INT64, _INT64) * 2,
        *(_POINTER, _INT64, _INT64),
        *[_POINTER] * 6,
        _INT,
        *[_POINTER] * 3,
        *[_INT64] * 4,
        _FLOAT,
        _INT,
    ),
    "sample_greedy": (*[_POINTER] * 3, *[_INT64] * 3),
    "sample": (*[_POINTER] * 8, *[_INT64] * 3),
    "apply_penalties": (*[_POINTER] * 7, *[_INT64] * 3),
    "filter_thresholds": (*[_POINTER] * 6, *[_INT64] * 3),
    "top_logprobs": (*[_POINTER] * 5, *[_INT64] * 4),
}


# What they return, where it is something.
_RESULTS: dict[str, Any] = {
    "program_new": _POINTER,
    "program_is_sound": _INT,
    "quantized_bytes": _INT64,
    "quantized_workspace": _INT64,
}


class Recorder(Protocol):
    """What takes the place of a thread's memory while its calls are recorded."""

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Returns an uninitialised tensor for a result."""
        ...

    def scratch(self, num_bytes: int) -> None:
        """Is told that a call needs this much scratch memory, which it gets when it is run."""
        ...


class _ThreadState(threading.local):
    """Of each thread that calls: its scratch memory, and who records it, if somebody does."""

    memory: torch.Tensor | None = None
    recorder: Recorder | None = None


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
            function.argtypes, function.restype = types, _RESULTS.get(name)
            setattr(self, name, function)
        self._thread = _ThreadState()

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"the CPU kernels have no function {name!r}")

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Returns an uninitialised tensor for a result."""
        recorder = self._thread.recorder
        return torch.empty(shape, dtype=dtype, device=device) if recorder is None else recorder.empty(shape, dtype)

    def scratch(self, num_bytes: int) -> int | None:
        """Returns the address of memory for one call. It belongs to the calling thread until its next call."""
        state = self._thread
        if state.recorder is not None:
            state.recorder.scratch(num_bytes)
            return None
        if state.memory is None or state.memory.shape[0] < num_bytes:
            # Grows by half more than asked for, so that a slowly growing context does not allocate at each step.
            state.memory = torch.empty(num_bytes + num_bytes // 2, dtype=torch.uint8)
        return state.memory.data_ptr()

    @contextmanager
    def recorded_by(self, recorder: Recorder, program: int) -> Generator[None]:
        """Within it this thread's calls are recorded in the program, and not run."""
        self._thread.recorder = recorder
        self.program_record(program)
        try:
            yield
        finally:
            self.program_record(None)
            self._thread.recorder = None


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
