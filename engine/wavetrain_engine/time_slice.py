# SPDX-License-Identifier: Apache-2.0
"""How soon the threads that compute make room for those that send what was computed.

Linux lets a running thread finish its time slice, 3 ms, before one that has just woken gets the core (EEVDF with
RUN_TO_PARITY). Where the engine computes on all cores, every hand-over on a token's way out can cost that much: the
server's threads, the model's, the client's. With a slice of 0.1 ms the engine keeps its share of the cores and gives
way 30 times as soon: on two cores the first token of some 40 prompt tokens reached a client after 23.5 ms instead of
26; with 64 of them no difference stood out (7.2 to 8.6 ms added by the server, 7.6 before); tokens/s stayed.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import struct

_LOG = logging.getLogger(__name__)

_SLICE_NS = 100_000  # the least that Linux takes
# struct sched_attr, first version: size, policy, flags, nice, priority, runtime, deadline, period.
_ATTRIBUTES = struct.Struct("=IIQiIQQQ")
_RUNTIME = 5  # from Linux 6.12 on, the slice of an ordinary thread
# System calls without a function in libc: sched_setattr, sched_getattr.
_CALLS = {"x86_64": (314, 315), "aarch64": (274, 275)}


def shorten_time_slices() -> bool:
    """Gives the calling thread, and the threads and processes it starts from now on, short time slices.

    Returns whether Linux took it; one older than 6.12 takes it and does nothing.
    """
    numbers = _CALLS.get(platform.machine())
    if numbers is None:
        return False
    set_number, get_number = numbers
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(_ATTRIBUTES.size)
    if libc.syscall(get_number, 0, buffer, _ATTRIBUTES.size, 0) != 0:
        return _refused()
    values = list(_ATTRIBUTES.unpack(buffer.raw))
    if values[1] != os.SCHED_OTHER:  # whoever chose another policy meant it
        return False
    values[_RUNTIME] = _SLICE_NS
    buffer.raw = _ATTRIBUTES.pack(*values)
    return True if libc.syscall(set_number, 0, buffer, 0) == 0 else _refused()


def time_slice_ns() -> int:
    """Returns the calling thread's time slice as Linux tells it; 0 where it does not."""
    numbers = _CALLS.get(platform.machine())
    buffer = ctypes.create_string_buffer(_ATTRIBUTES.size)
    if numbers is None or ctypes.CDLL(None).syscall(numbers[1], 0, buffer, _ATTRIBUTES.size, 0) != 0:
        return 0
    return int(_ATTRIBUTES.unpack(buffer.raw)[_RUNTIME])


def _refused() -> bool:
    _LOG.debug("Linux does not let the engine shorten its time slices: %s", os.strerror(ctypes.get_errno()))
    return False
