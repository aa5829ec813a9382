# SPDX-License-Identifier: Apache-2.0
"""What launchers know about the device, and how many kernels this process had to make ready.

A kernel that is made ready while requests wait (compiled, or read from the disk cache) stalls all of them. So warm-up
launches every kernel that serving needs, and `compile_count` must stand still from then on.
"""

from __future__ import annotations

import functools
import logging
import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from triton import knobs

_LOG = logging.getLogger(__name__)

KIB = 1024

# The types that our kernels take, as Triton spells them.
TRITON_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True, slots=True)
class DeviceTraits:
    """The numbers of a GPU that launch configurations depend on.

    Attributes:
        capability: major and minor, (9, 0) for sm_90.
        shared_bytes: shared memory that one block may have.
    """

    name: str
    capability: tuple[int, int]
    num_sms: int
    shared_bytes: int
    l2_bytes: int


# What the interpreter pretends to run on, so that tests take the branches of the GPU that we tune for.
H200 = DeviceTraits("NVIDIA H200", (9, 0), 132, 227 * KIB, 50 * KIB * KIB)

# The oldest that the kernels are tuned for at all; what is compiled ahead of time is compiled for both.
A100 = DeviceTraits("NVIDIA A100-SXM4-80GB", (8, 0), 108, 163 * KIB, 40 * KIB * KIB)


@functools.cache
def device_traits(device: torch.device) -> DeviceTraits:
    """Returns the numbers of a device; an H200's where it is no GPU: that is the interpreter."""
    if device.type != "cuda":
        return H200
    found = torch.cuda.get_device_properties(device)
    return DeviceTraits(
        name=found.name,
        capability=(found.major, found.minor),
        num_sms=found.multi_processor_count,
        shared_bytes=found.shared_memory_per_block_optin,
        l2_bytes=found.L2_cache_size,
    )


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Runs a `@triton.jit` kernel on its arguments; does nothing where the grid is empty, as an empty step makes it.

    Args:
        options: constexprs by name, num_warps, num_stages.
    """
    if 0 not in grid:
        kernel[grid](*args, **options)


def cdiv(dividend: int, divisor: int) -> int:
    """Returns the quotient rounded up."""
    return -(-dividend // divisor)


def next_power_of_2(size: int) -> int:
    """Returns the least power of two that is not below `size`: what `tl.arange` can span."""
    return 1 << max(size - 1, 0).bit_length()


@functools.cache
def fall_back(operation: str, reason: str) -> None:
    """Says, once, that the slow reference does something because the kernels cannot."""
    _LOG.warning("%s: no GPU kernel for %s, the reference answers", operation, reason)


@dataclass(slots=True)
class _CompileCounter:
    """Told by Triton of every kernel variant that was not in memory yet."""

    names: list[str] = field(default_factory=list[str])
    lock: threading.Lock = field(default_factory=threading.Lock)
    before: Any = None  # a hook that was there already

    def __call__(self, **facts: Any) -> Any:
        with self.lock:
            self.names.append(str(facts.get("repr", "?")))
        return None if self.before is None else self.before(**facts)


_COUNTER = _CompileCounter()


def count_compilations() -> None:
    """Counts from now on; a second call changes nothing."""
    if knobs.runtime.jit_post_compile_hook is not _COUNTER:
        _COUNTER.before = knobs.runtime.jit_post_compile_hook
        knobs.runtime.jit_post_compile_hook = _COUNTER


def compile_count() -> int:
    """Returns how many kernel variants were made ready since `count_compilations`; the disk cache's count too."""
    return len(_COUNTER.names)


def compiled_since(count: int) -> list[str]:
    """Returns the variants made ready after `compile_count` was `count`: what a log line or a test shows."""
    return _COUNTER.names[count:]
