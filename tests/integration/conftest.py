# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests on the real Triton server: one server for all of them, as a start takes seconds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fakes.compiled_kernels import are_compiled_kernels_to_be_had
from fakes.triton_server import REPOSITORY, RunningServer, make_repository, start_server

DEMO_MODEL = REPOSITORY / "engine" / "1" / "demo"


@pytest.fixture(scope="session")
def served_model() -> Path:
    """The checkpoint that the server tests serve."""
    return DEMO_MODEL


@pytest.fixture(scope="session")
def served_dtype() -> str:
    """What it is served in: its own bfloat16 where texts can be compared between batches (docs/decisions/0004)."""
    return "auto" if are_compiled_kernels_to_be_had() else "float32"


@pytest.fixture(scope="session")
def triton_server(
    served_model: Path, served_dtype: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    """A ready server with the five models. Tests leave it as they found it."""
    work_dir = tmp_path_factory.mktemp("triton")
    flags = {"dtype": served_dtype, "num_blocks": 1024, "max_num_seqs": 64, "max_queue_size": 512}
    repository = make_repository(work_dir / "repository", served_model, **flags)
    with start_server(repository, work_dir) as server:
        yield server
