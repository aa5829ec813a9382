# SPDX-License-Identifier: Apache-2.0
"""Which kernel set answers, and that the public names are what they claim to be."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import pytest
import torch

from wavetrain_kernels import errors, ops
from wavetrain_kernels.errors import BuildError, UnsupportedDevice
from wavetrain_kernels.kernel_set import KernelSet
from wavetrain_kernels.ops import dispatch
from wavetrain_kernels.reference.kernels import REFERENCE

CPU = torch.device("cpu")


class Loader:
    """Makes a second set for the CPU, whose norms are all 7; or fails to."""

    def __init__(self) -> None:
        self.cache_dirs: list[Path] = []
        self.error: UnsupportedDevice | None = None
        self.fast = dataclasses.replace(REFERENCE, name="cpu", rms_norm=lambda out, *_: out.fill_(7.0))

    def __call__(self, cache_dir: Path) -> KernelSet:
        self.cache_dirs.append(cache_dir)
        if self.error is not None:
            raise self.error
        return self.fast


@pytest.fixture
def loader(monkeypatch: pytest.MonkeyPatch) -> Loader:
    """A process that has not chosen yet."""
    made = Loader()
    monkeypatch.setattr(dispatch, "_AVAILABLE", {"cpu": {"cpu": made, "reference": lambda _: REFERENCE}})
    monkeypatch.setattr(dispatch, "_CHOSEN", {})
    return made


def test_the_reference_answers_until_somebody_chooses(loader, tmp_path):
    assert ops.kernel_set(CPU) == "reference"
    assert not loader.cache_dirs
    assert ops.choose_kernels("auto", CPU, tmp_path) is loader.fast
    assert loader.cache_dirs == [tmp_path]
    assert ops.kernel_set(CPU) == "cpu"
    assert ops.rms_norm(torch.ones(1, 2), torch.ones(2), 1e-6).tolist() == [[7.0, 7.0]]
    packed = ops.pack_weight(torch.ones(1, 2))  # the reference, as the set has none of its own
    assert torch.equal(ops.linear(torch.ones(1, 2), packed), torch.full((1, 1), 2.0))


def test_a_set_is_chosen_by_name(loader, tmp_path):
    assert ops.choose_kernels("reference", CPU, tmp_path) is REFERENCE
    assert ops.kernel_set(CPU) == "reference"
    assert ops.implementation(CPU) is REFERENCE
    assert not loader.cache_dirs
    assert ops.choose_kernels("cpu", CPU, tmp_path) is loader.fast
    assert ops.kernel_set(CPU) == "cpu"


def test_what_cannot_be_built_is_done_without_and_said_once(loader, tmp_path, caplog):
    loader.error = BuildError("no compiler")
    with caplog.at_level(logging.WARNING):
        assert ops.choose_kernels("auto", CPU, tmp_path) is REFERENCE
        ops.rms_norm(torch.ones(1, 2), torch.ones(2), 1e-6)
    assert [record.getMessage() for record in caplog.records] == [
        "cpu kernels cannot be had, slower ones answer: no compiler"
    ]
    with pytest.raises(BuildError, match="no compiler"):
        ops.choose_kernels("cpu", CPU, tmp_path)


def test_a_set_that_is_not_there(loader, tmp_path):
    with pytest.raises(
        UnsupportedDevice, match="no gpu kernels for device 'cpu'; available there: auto, cpu, reference"
    ):
        ops.choose_kernels("gpu", CPU, tmp_path)
    with pytest.raises(UnsupportedDevice, match="no auto kernels for device 'meta'; available there: nothing"):
        ops.choose_kernels("auto", torch.device("meta"), tmp_path)
    with pytest.raises(UnsupportedDevice, match="no kernels for device 'meta'"):
        ops.rms_norm(torch.zeros(2, 3, device="meta"), torch.zeros(3, device="meta"), 1e-6)


def test_public_names_are_sorted_and_there():
    assert ops.__all__ == sorted(ops.__all__, key=lambda name: (name[0].islower(), name))
    assert all(hasattr(ops, name) for name in ops.__all__)


def test_errors_are_one_tree():
    leaves = [errors.ShapeError, errors.DtypeError, errors.UnsupportedDevice, errors.BuildError]
    assert all(issubclass(leaf, errors.KernelError) for leaf in leaves)
    assert issubclass(errors.BuildError, errors.UnsupportedDevice)
