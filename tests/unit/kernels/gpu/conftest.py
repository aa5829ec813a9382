# SPDX-License-Identifier: Apache-2.0
"""Where the tests of the GPU kernels run: on the GPU, or under Triton's interpreter on tensors of the CPU."""

from __future__ import annotations

import pytest
import torch

HAS_GPU = torch.cuda.is_available()

# The interpreter's matrix products are wrong in bfloat16 (Triton 3.6); on a GPU it is the type that matters.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if HAS_GPU else [])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with an argument `dtype` that it does not parametrise itself runs over every type that works here."""
    marked = {name for mark in metafunc.definition.iter_markers("parametrize") for name in _names(mark.args[0])}
    if "dtype" in metafunc.fixturenames and "dtype" not in marked:
        metafunc.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def _names(names: str | list[str] | tuple[str, ...]) -> list[str]:
    return [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device of the tensors."""
    return torch.device("cuda", torch.cuda.current_device()) if HAS_GPU else torch.device("cpu")
