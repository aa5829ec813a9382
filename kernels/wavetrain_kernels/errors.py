# SPDX-License-Identifier: Apache-2.0
"""Every error the kernel library raises on purpose, as one tree.

    KernelError
    ├── ShapeError            a tensor's shape does not fit the operation
    ├── DtypeError            a tensor's dtype does not fit the operation
    └── UnsupportedDevice     no kernels, or not the demanded ones, for a device type
        └── BuildError        the kernels of a device could not be compiled on this machine

The first two tell a programmer of the engine what is wrong with a call; no request can cause one.
"""

from __future__ import annotations


class KernelError(Exception):
    """Root of the tree."""


class ShapeError(KernelError):
    """A tensor has the wrong rank or size, or two tensors do not fit each other."""


class DtypeError(KernelError):
    """A tensor has a dtype the operation does not take, or two tensors differ in dtype."""


class UnsupportedDevice(KernelError):
    """No kernel set, or none of the demanded name, can serve a device type."""


class BuildError(UnsupportedDevice):
    """Kernels that are compiled at first use could not be."""
