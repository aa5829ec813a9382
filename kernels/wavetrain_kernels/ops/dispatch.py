# SPDX-License-Identifier: Apache-2.0
"""Which kernel set answers for a device.

The choice is per process and per device type, made once at load by whoever read the configuration: `choose_kernels`.
Without a choice the best set for the device answers.
"""

from __future__ import annotations

import torch

from wavetrain_kernels.errors import UnsupportedDevice
from wavetrain_kernels.kernel_set import KernelSet
from wavetrain_kernels.reference.kernels import REFERENCE

# Per device type, the sets that can serve it, best first. A new set is one entry here.
_AVAILABLE: dict[str, tuple[KernelSet, ...]] = {"cpu": (REFERENCE,), "cuda": (REFERENCE,)}

_CHOSEN: dict[str, KernelSet] = {}


def choose_kernels(choice: str, device: torch.device) -> KernelSet:
    """Decides which set answers for this device type from now on, and returns it.

    Args:
        choice: `auto` for the best there is, or the name of a set.

    Raises:
        UnsupportedDevice: no set of that name can serve the device.
    """
    available = _AVAILABLE.get(device.type, ())
    chosen = next((kernels for kernels in available if choice in ("auto", kernels.name)), None)
    if chosen is None:
        names = ", ".join(["auto", *(kernels.name for kernels in available)]) if available else "nothing"
        raise UnsupportedDevice(f"no {choice} kernels for device {device.type!r}; available there: {names}")
    _CHOSEN[device.type] = chosen
    return chosen


def implementation(device: torch.device) -> KernelSet:
    """Returns the set that answers for a device.

    Raises:
        UnsupportedDevice: none can.
    """
    chosen = _CHOSEN.get(device.type)
    return chosen if chosen is not None else choose_kernels("auto", device)


def kernel_set(device: torch.device) -> str:
    """Returns the name of the set that answers for a device: `reference`, `cpu`, `gpu`.

    Raises:
        UnsupportedDevice: none can.
    """
    return implementation(device).name
