# SPDX-License-Identifier: Apache-2.0
"""Linear layers over quantized weights: which kernel multiplies, by the number of rows.

Few rows: the weight is widened in registers (`weight_only_product`), whatever the scheme says of its inputs. Reading
the weight is all the time there is then, so inputs that stay as they are cost nothing, and save the launch that would
round them. Many rows: schemes with 8-bit inputs round them and multiply 8-bit tiles, of fp8 by cuBLAS where it can;
for the others the weight is widened once, and cuBLAS multiplies.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wavetrain_kernels.gpu.gated_pairs import gated_pairs
from wavetrain_kernels.gpu.launch import device_traits
from wavetrain_kernels.gpu.linear import linear as dense_linear
from wavetrain_kernels.gpu.quantized_packing import PackedQuantized, can_pack, pack
from wavetrain_kernels.gpu.quantized_product import quantized_product
from wavetrain_kernels.gpu.quantized_rows import new_inputs, quantize_rows
from wavetrain_kernels.gpu.weight_only_config import weight_only_config
from wavetrain_kernels.gpu.weight_only_product import weight_only_product
from wavetrain_kernels.gpu.widened_weight import widen_weight
from wavetrain_kernels.quantized_inputs import QuantizedInputs, Rows
from wavetrain_kernels.quantized_weight import QuantizedWeight

# T = rows, N = outputs, K = inputs.


def pack_quantized(weight: QuantizedWeight, dtype: torch.dtype, is_gated: bool) -> PackedQuantized | None:
    """Returns the weight repacked; None where there is no kernel for it: in float32, or groups of no multiple of 16."""
    return pack(weight, dtype, is_gated) if can_pack(weight, dtype) else None


def quantized_linear(out: Tensor, x: Rows, packed: PackedQuantized, bias: Tensor | None) -> None:
    """out [T, N] = x @ weight.T + bias. A float32 `out` takes the sums as they are."""
    _product(out, x, packed, bias, None)


def quantized_gated_linear(out: Rows, x: Rows, packed: PackedQuantized, bias: Tensor | None, activation: str) -> None:
    """out [T, N / 2] = act(first half) * second half of x @ weight.T + bias, rounded if `out` is for 8-bit rows."""
    if isinstance(out, Tensor):
        _product(out, x, packed, bias, activation)
        return
    shape = (out.num_rows, packed.shape.out_features)
    pairs = torch.empty(shape, dtype=packed.dtype, device=out.values.device)
    _product(pairs, x, packed, _paired(bias), None)
    quantize_rows(out, pairs, activation=activation)


def _product(out: Tensor, x: Rows, packed: PackedQuantized, bias: Tensor | None, activation: str | None) -> None:
    rows = _prepared(x, packed) if isinstance(x, Tensor) else x
    if isinstance(rows, QuantizedInputs):
        if can_scale(out, packed, bias):
            product = _pairs(out, packed) if activation else out
            scaled_product(product, rows, packed)
            _gate(out, product, activation)
        else:
            quantized_product(out, rows, packed, bias, activation)
    elif weight_only_config(rows.shape[0], packed.shape, rows.device).is_fused:
        weight_only_product(out, rows, packed, bias, activation)
    else:
        product = _pairs(out, packed) if activation else out
        dense_linear(product, rows, widen_weight(packed), _paired(bias) if activation else bias)
        _gate(out, product, activation)


def _prepared(x: Tensor, packed: PackedQuantized) -> Rows:
    """The rows as the weight's columns lie, rounded where there are so many that 8-bit products are faster."""
    if packed.column_order is not None:
        x = x.index_select(1, packed.column_order)
    rounded = new_inputs(packed, x.shape[0])
    if rounded is None:
        return x if x.stride(1) == 1 else x.contiguous()
    quantize_rows(rounded, x)
    return rounded


def _pairs(out: Tensor, packed: PackedQuantized) -> Tensor:
    """Room for the whole product of a gated weight, from torch's allocator: as large as any activation."""
    return out.new_empty((out.shape[0], packed.shape.out_features))


def _gate(out: Tensor, product: Tensor, activation: str | None) -> None:
    if activation is not None:
        gated_pairs(out, product, activation)


def _paired(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.view(2, -1).t().reshape(-1)


def can_scale(out: Tensor, packed: PackedQuantized, bias: Tensor | None) -> bool:
    """Whether `torch._scaled_mm` can multiply rows of this weight: cuBLAS has fp8 with a scale for each row of both."""
    scheme, shape = packed.scheme, packed.shape
    is_by_row = scheme.values == "fp8" and not shape.group_size and scheme.input_group_size is None
    is_whole = shape.out_features % 16 == 0 and out.dtype == torch.bfloat16 and bias is None
    return is_by_row and is_whole and device_traits(out.device).capability >= (9, 0)


def scaled_product(out: Tensor, x: QuantizedInputs, packed: PackedQuantized) -> None:
    """out [T, N] = x @ weight.T, by cuBLAS with sums in float32; for what `can_scale` says yes to."""
    weight = packed.words.view(torch.float8_e4m3fn).t()
    torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage, reportPrivateUsage]
        x.values, weight, scale_a=x.scales, scale_b=packed.scales, out_dtype=out.dtype, use_fast_accum=False, out=out
    )
