# SPDX-License-Identifier: Apache-2.0
"""`python unfit_cases.py`: compiles kernels that must not be shipped. One JSON object a line, as the command prints."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace

import triton
import triton.language as tl

from wavetrain_kernels.aot import compile_case
from wavetrain_kernels.gpu.aot_case import AotCase


@triton.jit
def _product_kernel(out_ptr, x_ptr, SIZE: tl.constexpr, STAGES: tl.constexpr):  # noqa: N803
    rows = tl.arange(0, SIZE)
    tile = x_ptr + rows[:, None] * SIZE + rows[None, :]
    total = tl.zeros((SIZE, SIZE), tl.float32)
    for step in tl.range(0, 8, num_stages=STAGES):
        x = tl.load(tile + step * SIZE * SIZE)
        total += tl.dot(x, x)
    tl.store(out_ptr + rows[:, None] * SIZE + rows[None, :], total)


@triton.jit
def _large_kernel(out_ptr, x_ptr, SIZE: tl.constexpr):  # noqa: N803
    places = tl.arange(0, SIZE)
    x = tl.load(x_ptr + places)
    tl.store(out_ptr + places, x / tl.sum(x))  # all of x stays alive until its sum is known


@triton.jit
def _empty_kernel(out_ptr, x_ptr):
    tl.load(x_ptr)  # and out_ptr is forgotten


POINTERS = {"out_ptr": "*fp32", "x_ptr": "*fp16"}
FIT = AotCase("fit", _product_kernel, POINTERS, {"SIZE": 64, "STAGES": 1}, 4, 1, expects_wgmma=True)
CASES = [
    (FIT, "sm_90"),
    (replace(FIT, name="no wgmma in a tile of 16", constexprs={"SIZE": 16, "STAGES": 1}), "sm_90"),
    (replace(FIT, name="nor asked for elsewhere", constexprs={"SIZE": 16, "STAGES": 1}), "sm_80"),
    (replace(FIT, name="both operands in shared memory", expects_register_operand=True), "sm_90"),
    (replace(FIT, name="too much shared memory", constexprs={"SIZE": 128, "STAGES": 8}, num_warps=8), "sm_80"),
    (replace(FIT, name="an argument is missing", constexprs={"SIZE": 64}), "sm_90"),
    (replace(FIT, name="an argument is unknown", constexprs={**FIT.constexprs, "DEPTH": 1}), "sm_90"),
    (replace(FIT, name="does not compile", constexprs={"SIZE": 63, "STAGES": 1}), "sm_90"),
    (
        AotCase("spills", _large_kernel, {"out_ptr": "*fp32", "x_ptr": "*fp32"}, {"SIZE": 16384}, 1, 1, is_decode=True),
        "sm_90",
    ),
    (AotCase("stores nothing", _empty_kernel, POINTERS, {}, 1, 1), "sm_100"),
]


def main() -> None:
    """Compiles them all."""
    for case, arch in CASES:
        sys.stdout.write(json.dumps(asdict(compile_case(case, arch))) + "\n")


if __name__ == "__main__":
    main()
