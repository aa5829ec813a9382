# SPDX-License-Identifier: Apache-2.0
"""Products with quantized weights, in the four shapes of an 8B Llama's layer, beside cuBLAS in bf16 and in few bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from gpu.contest import Calls, Contest, relative_error
from gpu.timing import num_sets
from wavetrain_kernels import ops

# T = rows, N = outputs, K = inputs.

# pyright: reportPrivateImportUsage=false
# torch has its products of few bits under names of its own only.

_CUBLAS = "cublas bf16"
_TOLERANCE = 1e-2
_ROUNDED_TOLERANCE = 5e-2  # rows in e4m3 are some 3 % off
_LARGEST_FP8 = 448.0
_TINYGEMM_TILES = 8


@dataclass(frozen=True)
class _Case:
    """A scheme, the numbers of rows that are tried, and what is promised at each."""

    name: str
    scheme: Callable[[int], ops.QuantizationScheme]
    steps: tuple[int, ...]
    bars: dict[int, tuple[str, float]]
    all_shapes: bool = False


_SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate + up": (28672, 4096), "down": (4096, 14336)}
_DRY_SHAPES = {"o": (48, 128)}

_CASES = (
    _Case(
        "w4a16 g128",
        lambda _: ops.QuantizationScheme(values="int4", group_size=128),
        (1, 8, 16, 32, 64, 256),
        {**dict.fromkeys((1, 8, 16), (_CUBLAS, 2.5)), 256: (_CUBLAS, 0.95)},
        all_shapes=True,
    ),
    _Case("w8a16", lambda size: ops.QuantizationScheme(values="int8", group_size=size), (1, 16, 256), {}),
    _Case(
        "fp8",
        lambda size: ops.QuantizationScheme(values="fp8", group_size=size, inputs="fp8"),
        (16, 64, 256, 8192),
        dict.fromkeys((16, 64, 256, 8192), ("scaled_mm", 0.95)),
    ),
    _Case(
        "fp8 128 x 128",
        lambda _: ops.QuantizationScheme(
            values="fp8", group_size=128, block_rows=128, inputs="fp8", input_group_size=128
        ),
        (16, 256, 8192),
        {},
    ),
    _Case(
        "w8a8",
        lambda size: ops.QuantizationScheme(values="int8", group_size=size, inputs="int8"),
        (32, 256, 8192),
        dict.fromkeys((32, 256, 8192), ("int_mm", 0.9)),
    ),
)


def quantized_contests(dtype: torch.dtype, device: torch.device, *, is_dry_run: bool) -> Iterator[Contest]:
    """Yields the contests, each with buffers of its own; what has a bar first."""
    for case in sorted(_CASES, key=lambda case: not case.bars):
        shapes = _DRY_SHAPES if is_dry_run else _SHAPES
        for name, shape in shapes.items():
            if not case.all_shapes and name not in ("o", "gate + up"):
                continue
            for num_rows in (3,) if is_dry_run else case.steps:
                yield _contest(case, name, shape, num_rows, dtype, device)


@dataclass(frozen=True)
class _Set:
    """One set of inputs: the weight in every form that somebody reads."""

    x: Tensor
    weight: ops.QuantizedWeight
    packed: ops.PackedWeight
    dense: Tensor


def _contest(
    case: _Case, name: str, shape: tuple[int, int], num_rows: int, dtype: torch.dtype, device: torch.device
) -> Contest:
    (out_features, in_features), scheme = shape, case.scheme(shape[1])
    weight_bytes = out_features * in_features * (1 if scheme.values != "int4" else 0.5)
    groups = -(-in_features // scheme.group_size)
    num_bytes = weight_bytes + 4 * groups * out_features + 2 * num_rows * (in_features + out_features)

    def make() -> _Set:
        weight = random_weight(scheme, out_features, in_features, device)
        x = torch.randn(num_rows, in_features, dtype=dtype, device=device)
        return _Set(x, weight, ops.pack_quantized(weight, dtype=dtype), ops.dequantize(weight).to(dtype))

    sets = [make() for _ in range(num_sets(int(num_bytes), device))]
    peers: dict[str, Callable[[], Calls]] = {_CUBLAS: lambda: [partial(F.linear, one.x, one.dense) for one in sets]}
    if scheme.values == "int4":
        peers["tinygemm"] = lambda: [_tinygemm(one) for one in sets]
    if scheme.inputs == "fp8" and scheme.block_rows == 1:
        peers["scaled_mm"] = lambda: [_scaled_mm(one) for one in sets]
    if scheme.inputs == "int8":
        peers["int_mm"] = lambda: [_int_mm(one) for one in sets]
    return Contest(
        group=f"quantized linear, {case.name}",
        case=f"{name}, {num_rows} x {in_features} x {out_features}",
        num_bytes=num_bytes,
        num_flops=2 * num_rows * out_features * in_features,
        ours=[partial(ops.linear, one.x, one.packed) for one in sets],
        error=lambda out: relative_error(out, F.linear(sets[0].x.float(), sets[0].dense.float())),
        tolerance=_TOLERANCE if scheme.inputs is None else _ROUNDED_TOLERANCE,
        peers=peers,
        bar=case.bars.get(num_rows),
    )


def random_weight(
    scheme: ops.QuantizationScheme, out_features: int, in_features: int, device: torch.device
) -> ops.QuantizedWeight:
    """Returns a weight whose elements are about as large as 1 / sqrt(in_features)."""
    grid = (-(-out_features // scheme.block_rows), -(-in_features // scheme.group_size))
    scales = (torch.rand(grid, device=device) + 0.5) * in_features**-0.5
    if scheme.values == "int4":
        values = torch.randint(256, (out_features, in_features // 2), dtype=torch.uint8, device=device)
        scales /= 5
    elif scheme.values == "int8":
        values = torch.randint(-128, 128, (out_features, in_features), dtype=torch.int8, device=device)
        scales /= 70
    else:
        values = (torch.randn(out_features, in_features, device=device) * 100).clamp(-448, 448)
        values, scales = values.to(torch.float8_e4m3fn), scales / 100
    return ops.QuantizedWeight(scheme=scheme, in_features=in_features, values=values, scales=scales)


def _tinygemm(one: _Set) -> Callable[[], Tensor]:
    """torch's product with 4-bit weights: even inputs in the upper half of a byte, a zero point of 8."""
    values = one.weight.values
    packed = torch._convert_weight_to_int4pack(values << 4 | values >> 4, _TINYGEMM_TILES)
    scales = one.weight.scales.t().to(one.x.dtype)
    scales_and_zeros = torch.stack((scales, torch.zeros_like(scales)), dim=-1).contiguous()
    return lambda: torch._weight_int4pack_mm(one.x, packed, one.weight.scheme.group_size, scales_and_zeros)


def _scaled_mm(one: _Set) -> Callable[[], Tensor]:
    """With rows that were rounded before, so without the time for that."""
    scale = one.x.float().abs().amax(1, keepdim=True) / _LARGEST_FP8
    rows = (one.x / scale).to(torch.float8_e4m3fn)
    weight, widths = one.weight.values.t(), one.weight.scales.t()
    return lambda: torch._scaled_mm(rows, weight, scale_a=scale, scale_b=widths, out_dtype=one.x.dtype)


def _int_mm(one: _Set) -> Callable[[], Tensor]:
    """With rows that were rounded before; the sums are scaled, as nobody can use them otherwise."""
    scale = one.x.float().abs().amax(1, keepdim=True) / 127
    rows = (one.x / scale).round().to(torch.int8)
    weight, widths, dtype = one.weight.values.t(), one.weight.scales.t(), one.x.dtype
    return lambda: (torch._int_mm(rows, weight) * scale * widths).to(dtype)
