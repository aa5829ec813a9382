# SPDX-License-Identifier: Apache-2.0
"""What holds for every test: without a GPU Triton interprets, and random numbers do not depend on the tests before."""

from __future__ import annotations

import os

import pytest
import torch

# Triton reads it when it is first imported, which any test module may do; so it is set here, above all of them. The
# processes that tests start inherit it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before the fixtures: processes that share out the tests run them in another order each time."""
    torch.manual_seed(0)
