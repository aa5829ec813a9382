# SPDX-License-Identifier: Apache-2.0
"""The installed version, from the package's own metadata."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def _installed_version() -> str:
    try:
        return version("wavetrain")
    except PackageNotFoundError:  # run from a source tree on PYTHONPATH, as on the GPU machine
        return "0+source"


VERSION = _installed_version()
