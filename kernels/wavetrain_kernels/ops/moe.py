# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts: routing, and the feed-forward blocks that a token is routed to."""

from __future__ import annotations

import torch
from torch import Tensor

from wavetrain_kernels.errors import DtypeError, ShapeError
from wavetrain_kernels.ops.dispatch import implementation
from wavetrain_kernels.ops.linear import GatedActivation, say_widened
from wavetrain_kernels.packed_experts import PackedExperts
from wavetrain_kernels.quantized_weight import QuantizedWeight, is_alike
from wavetrain_kernels.reference.quantized_linear import dequantize

# T = tokens, E = experts, k = experts of a token, H = hidden size, I = units of an expert.


def empty_experts(
    num_experts: int,
    out_features: int,
    in_features: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    is_gated: bool = False,
) -> PackedExperts:
    """Returns memory for one projection [out, in] of each of E experts; `pack_expert` fills it.

    Args:
        is_gated: of each weight, rows [0, out / 2) are gates of rows [out / 2, out).

    Raises:
        ShapeError: a size is not positive, or the projection is gated and `out` is odd.
        DtypeError: the dtype is not floating point.
    """
    if min(num_experts, out_features, in_features) < 1 or (is_gated and out_features % 2):
        raise ShapeError(
            f"experts must be positive in number and sizes{', out even' if is_gated else ''}, "
            f"got {num_experts} of [{out_features}, {in_features}]"
        )
    if not dtype.is_floating_point:
        raise DtypeError(f"experts must be floating point, got {dtype}")
    make = implementation(device).empty_experts
    return PackedExperts(
        data=make(num_experts, out_features, in_features, is_gated, dtype, device),
        device=device,
        num_experts=num_experts,
        out_features=out_features,
        in_features=in_features,
        dtype=dtype,
        is_gated=is_gated,
    )


def empty_quantized_experts(
    num_experts: int, like: QuantizedWeight, *, dtype: torch.dtype, is_gated: bool = False
) -> PackedExperts:
    """Returns a place for one projection of each of E experts, all quantized as `like` is; `pack_expert` fills it.

    Where the kernels have no form for such weights, experts are held as weights of `dtype`, which the log says once.

    Args:
        like: a weight [out, in], of which nothing is kept.
        dtype: of the inputs.
        is_gated: of each weight, rows [0, out / 2) are gates of rows [out / 2, out).

    Raises:
        ShapeError: their number is not positive, or the projection is gated and `out` is odd.
        DtypeError: `dtype` is not floating point.
    """
    sizes = (num_experts, like.out_features, like.in_features)
    if num_experts < 1 or (is_gated and like.out_features % 2):
        raise ShapeError(
            f"experts must be positive in number, gated ones even in size, got {num_experts} of {sizes[1:]}"
        )
    if not dtype.is_floating_point:
        raise DtypeError(f"inputs must be floating point, got {dtype}")
    kernels = implementation(like.device)
    data = kernels.empty_quantized_experts(num_experts, like, dtype, is_gated)
    if data is None:
        say_widened(kernels.name, like.scheme)
        return empty_experts(*sizes, dtype=dtype, device=like.device, is_gated=is_gated)
    return PackedExperts(
        data=data,
        device=like.device,
        num_experts=num_experts,
        out_features=like.out_features,
        in_features=like.in_features,
        dtype=dtype,
        is_gated=is_gated,
        scheme=like.scheme,
        codebook=like.codebook,
    )


def pack_expert(experts: PackedExperts, expert: int, weight: Tensor | QuantizedWeight) -> None:
    """Puts the weight [out, in] of one expert in its place; `weight` can be dropped afterwards.

    A quantized weight for experts that are held unquantized is dequantized.

    Raises:
        ShapeError: there is no such expert, or the weight is not [out, in].
        DtypeError: the weight is of another dtype, or is not quantized as the other experts are.
    """
    if not 0 <= expert < experts.num_experts:
        raise ShapeError(f"expert must be from 0 to {experts.num_experts - 1}, got {expert}")
    kernels = implementation(experts.device)
    is_quantized = isinstance(weight, QuantizedWeight)
    shape = (weight.out_features, weight.in_features) if is_quantized else tuple(weight.shape)
    if shape != (experts.out_features, experts.in_features):
        raise ShapeError(f"weight must be [{experts.out_features}, {experts.in_features}], got {list(shape)}")
    if experts.scheme is not None:
        kernels.pack_quantized_expert(experts.data, expert, _checked(weight, experts))
        return
    dense = dequantize(weight).to(experts.dtype) if is_quantized else weight
    if dense.dtype != experts.dtype:
        raise DtypeError(f"weight must be {experts.dtype} as the experts, got {dense.dtype}")
    kernels.pack_expert(experts.data, expert, dense, experts.is_gated)


def _checked(weight: Tensor | QuantizedWeight, experts: PackedExperts) -> QuantizedWeight:
    assert experts.scheme is not None, "the experts are quantized"
    if not isinstance(weight, QuantizedWeight):
        raise DtypeError(f"weight must be quantized as the experts, of {experts.scheme}")
    if not is_alike(weight.scheme, experts.scheme):
        raise DtypeError(f"weight must be of {experts.scheme} as the experts, got {weight.scheme}")
    codebook = weight.codebook
    if experts.codebook is not None and (codebook is None or not torch.equal(experts.codebook, codebook)):
        raise DtypeError("weight must have the codebook of the other experts")
    return weight


def route_experts(router_logits: Tensor, top_k: int, *, renormalize: bool) -> tuple[Tensor, Tensor]:
    """Returns (weights [T, k] float32, expert_ids [T, k] int32): the k likeliest experts, the likeliest first.

    A weight is the expert's share in softmax(router_logits [T, E]); of equal logits the lower id comes first. A row
    without a distribution (one NaN is enough) gets NaN as weights, and ids that exist.

    Args:
        renormalize: a token's weights are divided by their sum, so that they add up to 1.

    Raises:
        ShapeError: router_logits is not [T, E], or top_k not from 1 to E.
        DtypeError: router_logits is not float32.
    """
    if router_logits.dim() != 2:
        raise ShapeError(f"router_logits must be [T, E], got {list(router_logits.shape)}")
    if not 1 <= top_k <= router_logits.shape[1]:
        raise ShapeError(f"top_k must be from 1 to {router_logits.shape[1]} experts, got {top_k}")
    if router_logits.dtype != torch.float32:
        raise DtypeError(f"router_logits must be float32, got {router_logits.dtype}")
    kernels = implementation(router_logits.device)
    shape = (router_logits.shape[0], top_k)
    weights = kernels.empty(shape, torch.float32, router_logits.device)
    expert_ids = kernels.empty(shape, torch.int32, router_logits.device)
    kernels.route_experts(weights, expert_ids, router_logits, renormalize)
    return weights, expert_ids


def fused_moe(
    x: Tensor,
    gate_up: PackedExperts,
    down: PackedExperts,
    weights: Tensor,
    expert_ids: Tensor,
    activation: GatedActivation,
) -> Tensor:
    """Returns [T, H]: for each token the sum of weight * down(act(gate(x)) * up(x)) over its k experts.

    Products are summed in float32 or better, a token's experts in one order. Where the kernel set promises so (`cpu`
    does), a token's values depend on its own row alone.

    Args:
        x: [T, H].
        gate_up: E gated projections [2 * I, H], quantized or not.
        down: E projections [H, I], likewise.
        weights, expert_ids: as `route_experts` returns them. An id outside [0, E) adds nothing.
        activation: `silu`, or `gelu_tanh`: gelu's tanh approximation.

    Raises:
        ShapeError: the sizes do not fit, or gate_up is not gated, or down is.
        DtypeError: x and the experts are not of one dtype, or weights not float32, or expert_ids not int32.
    """
    _check_experts(x, gate_up, down)
    shape = (x.shape[0], expert_ids.shape[-1] if expert_ids.dim() == 2 else 0)
    if shape[1] < 1 or weights.shape != shape or expert_ids.shape != shape:
        raise ShapeError(
            f"weights and expert_ids must be [{x.shape[0]}, k], got {list(weights.shape)} and {list(expert_ids.shape)}"
        )
    if weights.dtype != torch.float32 or expert_ids.dtype != torch.int32:
        raise DtypeError(f"weights must be float32 and expert_ids int32, got {weights.dtype} and {expert_ids.dtype}")
    kernels = implementation(x.device)
    out = kernels.empty(x.shape, x.dtype, x.device)
    kernels.fused_moe(out, x, gate_up.data, down.data, weights, expert_ids, down.in_features, activation)
    return out


def _check_experts(x: Tensor, gate_up: PackedExperts, down: PackedExperts) -> None:
    if not gate_up.is_gated or down.is_gated:
        raise ShapeError("gate_up must be made with is_gated, and down without")
    if x.dim() != 2 or x.shape[1] != gate_up.in_features:
        raise ShapeError(f"x must be [T, {gate_up.in_features}], got {list(x.shape)}")
    wanted = (gate_up.num_experts, gate_up.in_features, gate_up.out_features // 2)
    if (down.num_experts, down.out_features, down.in_features) != wanted:
        raise ShapeError(
            f"down must be {wanted[0]} experts of [{wanted[1]}, {wanted[2]}], "
            f"got {down.num_experts} of [{down.out_features}, {down.in_features}]"
        )
    if not x.dtype == gate_up.dtype == down.dtype:
        raise DtypeError(f"x and the experts must have one dtype, got {x.dtype}, {gate_up.dtype} and {down.dtype}")
