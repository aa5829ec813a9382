# SPDX-License-Identifier: Apache-2.0
"""Where a tile of a grouped product over quantized experts is written, whichever kernel computed it."""

from __future__ import annotations

import triton
import triton.language as tl

from wavetrain_kernels.gpu.weight_only_product import store_tile


@triton.jit
def store_pairs(
    out_ptr, acc, weights_ptr, pairs, places, end, num_pairs, tile_n,
    SIZE: tl.constexpr, TOP_K: tl.constexpr, IS_SILU: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
) -> None:  # fmt: skip
    """Writes a tile of sums [N, T] of sorted pairs: gated, where they are; or weighted, where the pairs belong."""
    if TOP_K:
        store_tile(out_ptr, acc, None, tile_n, places, end, SIZE, True, IS_SILU, BLOCK_N, BLOCK_T)
    else:
        weights = tl.load(weights_ptr + pairs)
        # Rounded where the reference rounds.
        terms = acc.to(out_ptr.dtype.element_ty).to(tl.float32) * weights[None, :]
        belongs = tl.where(places < end, pairs, num_pairs)
        store_tile(out_ptr, terms, None, tile_n, belongs, num_pairs, SIZE, False, False, BLOCK_N, BLOCK_T)
