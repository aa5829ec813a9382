# SPDX-License-Identifier: Apache-2.0
"""Which kernel set answers for a device.

The choice is per process and per device type, made once at load by whoever read the configuration: `choose_kernels`.
Without a choice the reference answers: nothing is compiled behind anybody's back.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch

from wavetrain_kernels.cpu.kernels import load_cpu_kernels
from wavetrain_kernels.errors import UnsupportedDevice
from wavetrain_kernels.kernel_set import KernelSet
from wavetrain_kernels.program import Program
from wavetrain_kernels.reference.kernels import REFERENCE

_LOG = logging.getLogger(__name__)

# Makes a set ready, with a folder for what it compiles; raises UnsupportedDevice where this machine cannot have it.
_Loader = Callable[[Path], KernelSet]


def _load_gpu_kernels(cache_dir: Path) -> KernelSet:
    try:
        # Not at the top: a machine that serves from its CPU need not have triton.
        from wavetrain_kernels.gpu.kernels import load_gpu_kernels
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise UnsupportedDevice("the gpu kernels need triton, which is not installed: pip install triton") from error
    return load_gpu_kernels(cache_dir)


# Per device type, the sets that may serve it by name, best first. A new set is one entry here.
_AVAILABLE: dict[str, dict[str, _Loader]] = {
    "cpu": {"cpu": load_cpu_kernels, "reference": lambda _: REFERENCE},
    "cuda": {"gpu": _load_gpu_kernels, "reference": lambda _: REFERENCE},
}

_CHOSEN: dict[str, KernelSet] = {}


def choose_kernels(choice: str, device: torch.device, cache_dir: Path) -> KernelSet:
    """Decides which set answers for this device type from now on, and returns it.

    Args:
        choice: `auto` for the best that this machine can have, or the name of a set.
        cache_dir: where compiled kernels are kept.

    Raises:
        UnsupportedDevice: no set of that name can serve the device; BuildError, one of these, where compiling failed.
    """
    available = _AVAILABLE.get(device.type, {})
    wanted = [name for name in available if choice in ("auto", name)]
    if not wanted:
        names = ", ".join(["auto", *available]) if available else "nothing"
        raise UnsupportedDevice(f"no {choice} kernels for device {device.type!r}; available there: {names}")
    chosen = next((found for name in wanted[:-1] if (found := _load_or_warn(name, available[name], cache_dir))), None)
    _CHOSEN[device.type] = available[wanted[-1]](cache_dir) if chosen is None else chosen
    return _CHOSEN[device.type]


def _load_or_warn(name: str, loader: _Loader, cache_dir: Path) -> KernelSet | None:
    try:
        return loader(cache_dir)
    except UnsupportedDevice as error:
        _LOG.warning("%s kernels cannot be had, slower ones answer: %s", name, error)
        return None


def implementation(device: torch.device) -> KernelSet:
    """Returns the set that answers for a device.

    Raises:
        UnsupportedDevice: none can.
    """
    chosen = _CHOSEN.get(device.type)
    if chosen is not None:
        return chosen
    if device.type not in _AVAILABLE:
        raise UnsupportedDevice(f"no kernels for device {device.type!r}")
    return REFERENCE


def kernel_set(device: torch.device) -> str:
    """Returns the name of the set that answers for a device: `reference`, `cpu`, `gpu`.

    Raises:
        UnsupportedDevice: none can.
    """
    return implementation(device).name


def new_program(device: torch.device, capacity: int, dtype: torch.dtype) -> Program | None:
    """Returns an empty program for steps of up to `capacity` tokens; None where the set has none for this dtype.

    Raises:
        UnsupportedDevice: no set can serve the device.
    """
    maker = implementation(device).new_program
    return None if maker is None else maker(capacity, dtype)
