# SPDX-License-Identifier: Apache-2.0
"""The engine's public names, and that nothing outside the worker pulls torch in."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import pytest

import wavetrain_engine
from wavetrain_engine import errors

TORCH_FREE = ["core", "ipc", "serving", "text"]
FRONT_ENDS = ["llm", "async_llm", "fan_out", "output_collector"]


def test_all_is_sorted_and_complete() -> None:
    names = wavetrain_engine.__all__
    assert names == sorted(names, key=lambda name: (not name.isupper(), name))  # the linter's order
    assert dir(wavetrain_engine) == sorted(names)
    for name in names:
        value = getattr(wavetrain_engine, name)
        assert value.__name__ == name
        assert value.__module__.startswith("wavetrain_engine.")


def test_every_error_is_exported() -> None:
    tree = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.WavetrainError)
    }
    assert tree <= set(wavetrain_engine.__all__)


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        wavetrain_engine.Nonsense  # noqa: B018


def modules_of(package: str) -> list[str]:
    """All modules of a sub-package; those that only run inside the Triton server import its pb_utils late."""
    path = [f"{wavetrain_engine.__path__[0]}/{package}"]
    names = [module.name for module in pkgutil.walk_packages(path, f"wavetrain_engine.{package}.")]
    return [f"wavetrain_engine.{package}", *names]


def test_torch_is_not_imported() -> None:
    modules = ["wavetrain_engine", *(f"wavetrain_engine.{name}" for name in FRONT_ENDS)]
    for package in TORCH_FREE:
        modules += modules_of(package)
    program = (
        "import importlib, sys, types\n"
        "sys.modules['triton_python_backend_utils'] = types.ModuleType('triton_python_backend_utils')\n"
        "import wavetrain_engine\n"
        "for name in wavetrain_engine.__all__: getattr(wavetrain_engine, name)\n"
        f"for name in {modules!r}:\n"
        "    importlib.import_module(name)\n"
        "    if 'torch' in sys.modules or 'transformers' in sys.modules: sys.exit(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_imports_nothing_of_it() -> None:
    program = (
        "import sys, wavetrain_engine\n"
        "sys.exit(','.join(name for name in sys.modules if name.startswith('wavetrain_engine.')) or 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
