# SPDX-License-Identifier: Apache-2.0
"""Which kernel set answers, and that the public names are what they claim to be."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from wavetrain_kernels import errors, ops
from wavetrain_kernels.errors import UnsupportedDevice
from wavetrain_kernels.ops import dispatch
from wavetrain_kernels.reference.kernels import REFERENCE

CPU = torch.device("cpu")


@pytest.fixture
def sets(monkeypatch):
    """A process with a second set for the CPU, and no choice made yet."""
    fast = dataclasses.replace(REFERENCE, name="cpu", silu_and_mul=lambda out, x: out.fill_(7.0))
    monkeypatch.setattr(dispatch, "_AVAILABLE", {"cpu": (fast, REFERENCE)})
    monkeypatch.setattr(dispatch, "_CHOSEN", {})
    return fast


def test_the_best_set_answers_without_a_choice(sets):
    assert ops.kernel_set(CPU) == "cpu"
    assert ops.silu_and_mul(torch.ones(1, 2)).item() == 7.0
    assert torch.equal(ops.linear(torch.ones(1, 2), torch.ones(1, 2)), torch.full((1, 1), 2.0))


def test_a_set_is_chosen_by_name(sets):
    assert ops.choose_kernels("reference", CPU) is REFERENCE
    assert ops.kernel_set(CPU) == "reference"
    assert ops.implementation(CPU) is REFERENCE
    assert ops.choose_kernels("auto", CPU) is sets
    assert ops.kernel_set(CPU) == "cpu"


def test_a_set_that_is_not_there(sets):
    with pytest.raises(
        UnsupportedDevice, match="no gpu kernels for device 'cpu'; available there: auto, cpu, reference"
    ):
        ops.choose_kernels("gpu", CPU)
    with pytest.raises(UnsupportedDevice, match="no auto kernels for device 'meta'; available there: nothing"):
        ops.rms_norm(torch.zeros(2, 3, device="meta"), torch.zeros(3, device="meta"), 1e-6)


def test_public_names_are_sorted_and_there():
    assert ops.__all__ == sorted(ops.__all__, key=lambda name: (name[0].islower(), name))
    assert all(hasattr(ops, name) for name in ops.__all__)


def test_errors_are_one_tree():
    leaves = [errors.ShapeError, errors.DtypeError, errors.UnsupportedDevice]
    assert all(issubclass(leaf, errors.KernelError) for leaf in leaves)
