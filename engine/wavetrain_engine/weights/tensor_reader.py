# SPDX-License-Identifier: Apache-2.0
"""From a checkpoint's file into memory: one copy, straight to where the tensor is wanted.

Read, not mapped. Weights in use then stay what they were whatever becomes of the file, a file that is cut off meanwhile
is an error and not a bus error, and it is faster: pages that are there already take 4.5 GB/s, pages that the kernel has
to map first 2.4, and new memory as well 1.4 (processor time, two cores, file in the page cache).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from wavetrain_engine.errors import CheckpointError
from wavetrain_engine.tensor_entry import TensorEntry
from wavetrain_engine.weights.gguf_reader import read_dense
from wavetrain_engine.weights.gguf_tensors import GgufTensor

_DTYPES = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I8": torch.int8, "U8": torch.uint8,
}  # fmt: skip
_CPU = torch.device("cpu")
_PIECE_BYTES = 2**25


class Scratch:
    """Memory for one tensor at a time, used again and again, so that the kernel hands its pages out once."""

    def __init__(self, device: torch.device) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8, device=device)

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Returns an uninitialised tensor; it is the caller's until the next call."""
        num_bytes = math.prod(shape) * dtype.itemsize
        if self._memory.shape[0] < num_bytes:
            device = self._memory.device
            self._memory = torch.empty(0, dtype=torch.uint8, device=device)  # not both at a time
            self._memory = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        return self._memory[:num_bytes].view(dtype).view(shape)

    def let_go(self, tensor: Tensor) -> None:
        """Leaves the memory to `tensor` for good, if it lies there."""
        if tensor.untyped_storage().data_ptr() == self._memory.untyped_storage().data_ptr():
            self._memory = torch.empty(0, dtype=torch.uint8, device=self._memory.device)


class TensorReader:
    """Reads tensors of the supported dtypes.

    Args:
        device: where tensors will be wanted; the CPU's are served too.
    """

    def __init__(self, device: torch.device = _CPU) -> None:
        self.device = device
        self._scratch = Scratch(_CPU)
        self._pieces = None if device.type == "cpu" else Pieces(device)

    def read(self, entry: TensorEntry, out: Tensor) -> None:
        """Fills `out`, of the entry's shape, converting where its dtype is another.

        Raises:
            CheckpointError: the file cannot be read, or is shorter than it was.
        """
        if isinstance(entry, GgufTensor):
            read_dense(entry, out)
            return
        dtype = _DTYPES[entry.dtype]
        if self._pieces is not None and out.device.type != "cpu" and out.is_contiguous():
            self._pieces.read(entry, out.view(-1))
        elif out.dtype == dtype and out.device.type == "cpu" and out.is_contiguous():
            _fill(out, entry)
        else:
            tensor = self._scratch.take(entry.shape, dtype)
            _fill(tensor, entry)
            out.copy_(tensor)

    def read_new(self, entry: TensorEntry) -> Tensor:
        """Returns a tensor on the device, of the entry's own dtype.

        Raises:
            CheckpointError: as `read`.
        """
        tensor = torch.empty(entry.shape, dtype=_DTYPES[entry.dtype], device=self.device)
        self.read(entry, tensor)
        return tensor


class Pieces:
    """Reads for a GPU, piece by piece into two pinned buffers by turns.

    While one is copied to the device, the next piece is read into the other. So a checkpoint of any size passes through
    the same little host memory.
    """

    def __init__(self, device: torch.device, *, num_bytes: int = _PIECE_BYTES) -> None:
        self._device = device
        self._num_bytes = num_bytes
        is_cuda = device.type == "cuda"  # tests have pieces on the CPU
        self._buffers = [torch.empty(num_bytes, dtype=torch.uint8, pin_memory=is_cuda) for _ in range(2)]
        # Each buffer's: when its copy is done. They come at once while nothing was recorded.
        self._events = [torch.cuda.Event() if is_cuda else None for _ in range(2)]

    def read(self, entry: TensorEntry, out: Tensor) -> None:
        """Fills `out`, flat and on the device; the last copies may still be under way.

        Raises:
            CheckpointError: as TensorReader.
        """
        dtype = _DTYPES[entry.dtype]
        for start in range(0, entry.num_bytes, self._num_bytes):
            stop = min(start + self._num_bytes, entry.num_bytes)
            buffer, event = self._buffers[0], self._events[0]
            self._buffers.reverse()
            self._events.reverse()
            if event is not None:
                event.synchronize()
            piece = buffer[: stop - start]
            _fill(piece, entry, start)
            values = piece.view(dtype).to(self._device, non_blocking=True)  # converted there, not on the host
            out[start // dtype.itemsize : stop // dtype.itemsize].copy_(values)
            if event is not None:
                event.record()


def _fill(out: Tensor, entry: TensorEntry, start: int = 0) -> None:
    """Reads what `out` has room for, from byte `start` of the tensor on."""
    view = out.view(-1).view(torch.uint8).numpy().data
    try:
        with entry.file.open("rb") as file:
            file.seek(entry.begin + start)
            num_bytes = file.readinto(view)
    except OSError as error:
        raise CheckpointError(f"cannot read {entry.file.name}: {error.strerror}") from error
    if num_bytes != len(view):
        raise CheckpointError(f"{entry.file.name} became shorter while it was read; load the model again")
