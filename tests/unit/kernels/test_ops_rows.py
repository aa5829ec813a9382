# SPDX-License-Identifier: Apache-2.0
"""Taking rows out of a step."""

from __future__ import annotations

import pytest
import torch

from wavetrain_kernels import ops
from wavetrain_kernels.errors import DtypeError, ShapeError

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(5, 7), (1, 64), (33, 4, 16), (700, 130)], ids=str)
def test_rows_are_taken_as_they_are(shape, dtype):
    x = torch.randn(shape).to(dtype)
    for indices in ([], [0], [shape[0] - 1, 0, 0], list(range(shape[0]))):
        assert torch.equal(ops.select_rows(x, torch.tensor(indices, dtype=torch.int64)), x[indices])


@pytest.mark.parametrize(
    ("x", "indices", "error"),
    [
        (torch.zeros(4), torch.zeros(1, dtype=torch.int64), ShapeError),
        (torch.zeros(4, 6)[:, :3], torch.zeros(1, dtype=torch.int64), ShapeError),
        (torch.zeros(4, 6), torch.zeros(1, 1, dtype=torch.int64), ShapeError),
        (torch.zeros(4, 6), torch.zeros(1, dtype=torch.int32), DtypeError),
        (torch.zeros(4, 6, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), DtypeError),
    ],
)
def test_what_are_no_rows_is_refused(x, indices, error):
    with pytest.raises(error):
        ops.select_rows(x, indices)
