# SPDX-License-Identifier: Apache-2.0
"""Launch configurations that were measured: `tuned/<device>.json` beside this package, from scripts/tune_kernels.py.

A file holds {"device": name, "kernels": {kernel: {key: {parameter: value}}}}. It is read once; a kernel that it does
not name, or a device without a file, goes by the heuristics of the launcher. Nothing is ever searched here.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable
from importlib import resources
from typing import Any

import torch

Key = str | int | Iterable[str | int]


def tuned(kernel_name: str, key: Key, device: torch.device | None = None) -> dict[str, Any] | None:
    """Returns the measured parameters of a kernel for a shape, or None: the launcher decides.

    Args:
        key: what the configuration depends on, as `key_text` writes it: (128, 8, "bf16") is 128,8,bf16.
        device: None: the current GPU. Without one there is nothing measured.
    """
    if device is not None and device.type != "cuda":
        return None
    return _table(_device_name(device)).get(kernel_name, {}).get(key_text(key))


def key_text(key: Key) -> str:
    """Returns a key as the files spell it."""
    return str(key) if isinstance(key, str | int) else ",".join(str(part) for part in key)


def file_name(device_name: str) -> str:
    """Returns the name of a device's file: `nvidia-h200.json` for NVIDIA H200."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-") + ".json"


@functools.cache
def _device_name(device: torch.device | None) -> str:
    return torch.cuda.get_device_name(device) if torch.cuda.is_available() else ""


@functools.cache
def _table(device_name: str) -> dict[str, dict[str, dict[str, Any]]]:
    if not device_name:
        return {}
    file = resources.files("wavetrain_kernels").joinpath("tuned").joinpath(file_name(device_name))
    return json.loads(file.read_text(encoding="utf-8"))["kernels"] if file.is_file() else {}
