# SPDX-License-Identifier: Apache-2.0
"""The machine a GPU script runs on: where our packages are, what is missing, what was measured on what.

`prepare` comes before torch and our packages are imported. It needs no installation: a checkout and a python3 with
torch, triton and transformers will do.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from gpu import msgspec_stand_in

ROOT = Path(__file__).resolve().parents[2]
_SOURCES = (ROOT / "kernels", ROOT / "engine", ROOT / "tests", ROOT / "scripts")
_PACKAGES = ("torch", "triton", "transformers", "numpy", "msgspec", "flashinfer-python")
# What parts of the checks and peers need, beside torch, triton and transformers.
_WANTED = {
    "pytest": "the kernel tests",
    "hypothesis": "the kernel tests",
    "tokenizers": "the engine",
    "flashinfer": "a peer",
}


def prepare(*, is_dry_run: bool) -> None:
    """Lets our packages be imported from the checkout, and kernels be interpreted in a dry run."""
    for source in _SOURCES:
        if str(source) not in sys.path:
            sys.path.insert(0, str(source))
    msgspec_stand_in.install_where_missing()
    if is_dry_run:
        os.environ["TRITON_INTERPRET"] = "1"


def child_environment() -> dict[str, str]:
    """Returns the environment for a process that is to find our packages too."""
    paths = [str(source) for source in _SOURCES]
    paths += [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)), "PYTHONUNBUFFERED": "1"}


def missing_packages() -> dict[str, str]:
    """Returns what is not installed, and what goes without it."""
    return {name: use for name, use in _WANTED.items() if importlib.util.find_spec(name) is None}


def where_measured() -> dict[str, object]:
    """Returns the device, the versions and the commit."""
    import torch

    facts: dict[str, object] = {
        "device": "cpu, interpreted: a dry run",
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        "commit": _commit(),
        "at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        facts["device"] = found.name
        facts["cuda"] = torch.version.cuda
        facts["cudnn"] = torch.backends.cudnn.version()
        facts["num_sms"] = found.multi_processor_count
        facts["memory_gib"] = round(found.total_memory / 2**30, 1)
    return facts


def _commit() -> str:
    """Returns the commit, with a plus where files differ; a tree may have been sent without its history."""
    found = _git("rev-parse", "--short", "HEAD")
    return found + ("+" if _git("status", "--porcelain", "-uno") else "") if found else "unknown"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()
