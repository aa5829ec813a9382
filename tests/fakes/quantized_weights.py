# SPDX-License-Identifier: Apache-2.0
"""Random quantized weights of every scheme, for tests of kernels and of what reads and writes them."""

from __future__ import annotations

import torch
from torch import Tensor

from wavetrain_kernels.ops import QuantizationScheme, QuantizedWeight

# By the names the field has for them.
SCHEMES = {
    "w4a16-g32": QuantizationScheme(values="int4", group_size=32),
    "w4a16-g64-asym": QuantizationScheme(values="int4", group_size=64, has_offsets=True),
    "w4a16-g128": QuantizationScheme(values="int4", group_size=128),
    "w4a16-g128-act-order": QuantizationScheme(values="int4", group_size=128, has_offsets=True, is_reordered=True),
    "nf4-g64": QuantizationScheme(values="int4", group_size=64, has_codebook=True),
    "w8a16-g16": QuantizationScheme(values="int8", group_size=16),
    "w8a16-g128-asym": QuantizationScheme(values="int8", group_size=128, has_offsets=True),
    "fp8-block": QuantizationScheme(values="fp8", group_size=128, block_rows=128, inputs="fp8", input_group_size=128),
}


def per_channel(in_features: int) -> dict[str, QuantizationScheme]:
    """Schemes with one scale for a row of the weight, of this length."""
    return {
        "w4a16": QuantizationScheme(values="int4", group_size=in_features),
        "w8a16": QuantizationScheme(values="int8", group_size=in_features),
        "w8a8": QuantizationScheme(values="int8", group_size=in_features, inputs="int8"),
        "w8a8-static": QuantizationScheme(values="int8", group_size=in_features, inputs="int8", has_input_scale=True),
        "fp8": QuantizationScheme(values="fp8", group_size=in_features, inputs="fp8"),
        "fp8-static": QuantizationScheme(values="fp8", group_size=in_features, inputs="fp8", has_input_scale=True),
        "fp8a16": QuantizationScheme(values="fp8", group_size=in_features),
    }


def every_scheme(in_features: int) -> dict[str, QuantizationScheme]:
    """All schemes for weights with so many inputs."""
    return {**SCHEMES, **per_channel(in_features)}


def random_quantized(
    scheme: QuantizationScheme, out_features: int, in_features: int, *, seed: int = 0, device: str = "cpu"
) -> QuantizedWeight:
    """Returns a weight whose elements are about as large as 1 / sqrt(in_features)."""
    generator = torch.Generator().manual_seed(seed)
    grid = (-(-out_features // scheme.block_rows), -(-in_features // scheme.group_size))
    size = in_features**-0.5
    scales = (torch.rand(grid, generator=generator) + 0.5) * size / _typical(scheme)
    offsets = torch.randn(grid, generator=generator) * size if scheme.has_offsets else None
    codebook = torch.linspace(-1, 1, 16).pow(3) if scheme.has_codebook else None
    order = torch.randperm(in_features, generator=generator) if scheme.is_reordered else None
    return QuantizedWeight(
        scheme=scheme,
        in_features=in_features,
        values=_values(scheme, out_features, in_features, generator).to(device),
        scales=scales.to(device),
        offsets=None if offsets is None else offsets.to(device),
        codebook=None if codebook is None else codebook.to(device),
        column_order=None if order is None else order.to(device),
        input_scale=torch.full((1,), 4 / (127 if scheme.inputs == "int8" else 448)).to(device)
        if scheme.has_input_scale
        else None,
    )


def _typical(scheme: QuantizationScheme) -> float:
    """The size of a usual value."""
    if scheme.has_codebook:
        return 0.4
    return {"int4": 4.6, "int8": 73.0, "fp8": 100.0}[scheme.values]


def _values(scheme: QuantizationScheme, rows: int, columns: int, generator: torch.Generator) -> Tensor:
    if scheme.values == "int4":
        return torch.randint(256, (rows, -(-columns // 2)), generator=generator, dtype=torch.uint8)
    if scheme.values == "int8":
        return torch.randint(-128, 128, (rows, columns), generator=generator, dtype=torch.int8)
    return (torch.randn(rows, columns, generator=generator) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
