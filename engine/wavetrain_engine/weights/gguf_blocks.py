# SPDX-License-Identifier: Apache-2.0
"""Blocks of GGUF's types → the form that kernels take, without loss.

    32 values a block      scale d (float16), Q*_1 also a minimum m;          w = d * q (+ m)
    256 values a K block   d, dmin, and 6 or 4 bits for each group's share;   w = d * s * q - dmin * m

Every type here has values of at most 8 bits and a scale for each group of 16 or 32: so its numbers move into another
order of bits and nothing is rounded. Q4_1 and Q4_K alone have to move their zero, as their values of 0 to 15 become -8
to 7: their minima are rounded to float32 once more. Layouts: ggml-common.h and dequantize_row_* of ggml-quants.c.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from wavetrain_kernels.quantized_weight import QuantizationScheme, QuantizedWeight

# N = rows, B = blocks of a row, G = groups of a row.

_K_BLOCK = 256
_IQ4_CODES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_MXFP4_CODES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


class _Fields:
    """Takes blocks [N, B, bytes] apart, field after field."""

    def __init__(self, blocks: Tensor) -> None:
        self._blocks = blocks
        self._position = 0

    def take(self, num_bytes: int) -> Tensor:
        """Returns the next bytes [N, B, num_bytes]."""
        start, self._position = self._position, self._position + num_bytes
        return self._blocks[..., start : self._position]

    def half(self) -> Tensor:
        """Returns the next float16 as float32 [N, B, 1]."""
        return self.take(2).contiguous().view(torch.float16).float()


def repack(blocks: Tensor, dtype: str) -> QuantizedWeight | None:
    """Returns the weight whose rows are `blocks`; None: there is no such form of `dtype`.

    Args:
        blocks: [N, B, bytes of a block] uint8.
    """
    unpack = _UNPACK.get(dtype)
    return None if unpack is None else unpack(_Fields(blocks))


def _four_bit(
    codes: Tensor, scales: Tensor, offsets: Tensor | None, *, group_size: int, codebook: tuple[int, ...] | None = None
) -> QuantizedWeight:
    """Takes codes of 0 to 15, [N, ..., even], and [N, ...] scales: of code - 8, or of codebook[code]."""
    rows = codes.shape[0]
    flat = codes.reshape(rows, -1)
    return QuantizedWeight(
        scheme=QuantizationScheme(
            values="int4", group_size=group_size, has_offsets=offsets is not None, has_codebook=codebook is not None
        ),
        in_features=flat.shape[1],
        values=flat[:, 0::2] | flat[:, 1::2] << 4,
        scales=scales.reshape(rows, -1).contiguous(),
        offsets=None if offsets is None else offsets.reshape(rows, -1).contiguous(),
        codebook=None if codebook is None else torch.tensor(codebook, dtype=torch.float32),
    )


def _eight_bit(values: Tensor, scales: Tensor, offsets: Tensor | None, *, group_size: int) -> QuantizedWeight:
    rows = values.shape[0]
    flat = values.reshape(rows, -1).to(torch.int8)
    return QuantizedWeight(
        scheme=QuantizationScheme(values="int8", group_size=group_size, has_offsets=offsets is not None),
        in_features=flat.shape[1],
        values=flat,
        scales=scales.reshape(rows, -1).contiguous(),
        offsets=None if offsets is None else offsets.reshape(rows, -1).contiguous(),
    )


def _moved(scales: Tensor, offsets: Tensor) -> Tensor:
    """Returns the offsets of values that are 8 less: exact until it is rounded to float32 at the end."""
    return (offsets.double() - 8 * scales.double()).float()


def _halves(packed: Tensor) -> Tensor:
    """Returns [N, B, 2 * n] of packed [N, B, n]: first all low halves of its bytes, then all high ones."""
    return torch.cat([packed & 15, packed >> 4], dim=-1)


def _q4_0(fields: _Fields) -> QuantizedWeight:
    scale = fields.half()
    return _four_bit(_halves(fields.take(16)), scale, None, group_size=32)


def _q4_1(fields: _Fields) -> QuantizedWeight:
    scale, minimum = fields.half(), fields.half()
    return _four_bit(_halves(fields.take(16)), scale, _moved(scale, -minimum), group_size=32)


def _q5(fields: _Fields) -> Tensor:
    """Returns codes of 0 to 31."""
    high = _bits(fields.take(4))
    return _halves(fields.take(16)) | high << 4


def _bits(packed: Tensor) -> Tensor:
    """Returns [N, B, 8 * n] of packed [N, B, n]: the bits of each byte, the lowest first."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (packed[..., None] >> shifts & 1).flatten(-2)


def _q5_0(fields: _Fields) -> QuantizedWeight:
    scale = fields.half()
    return _eight_bit(_q5(fields).to(torch.int8) - 16, scale, None, group_size=32)


def _q5_1(fields: _Fields) -> QuantizedWeight:
    scale, minimum = fields.half(), fields.half()
    return _eight_bit(_q5(fields), scale, -minimum, group_size=32)


def _q8_0(fields: _Fields) -> QuantizedWeight:
    scale = fields.half()
    return _eight_bit(fields.take(32).contiguous().view(torch.int8), scale, None, group_size=32)


def _q2_k(fields: _Fields) -> QuantizedWeight:
    shares, packed = fields.take(16), fields.take(64)
    scale, minimum = fields.half(), fields.half()
    codes = _crumbs(packed)
    return _four_bit(codes + 8, scale * (shares & 15).float(), minimum * (shares >> 4).float(), group_size=16)


def _crumbs(packed: Tensor) -> Tensor:
    """Returns codes of 2 bits [N, B, 256] of packed [N, B, 64]: in each 32 bytes first all lowest bits, and so on."""
    parts = packed.unflatten(-1, (-1, 1, 32))
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=packed.device)[:, None]
    return (parts >> shifts & 3).flatten(-3)


def _q3_k(fields: _Fields) -> QuantizedWeight:
    mask, packed, shares = fields.take(32), fields.take(64), fields.take(12)
    scale = fields.half()
    # Bit i of byte j of the mask belongs to value 32 * i + j, and means that 4 is not subtracted.
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)[:, None]
    high = (mask[..., None, :] >> shifts & 1).flatten(-2)
    low_shares = _halves(shares[..., :8])
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=mask.device)[:, None]
    high_shares = (shares[..., None, 8:] >> shifts & 3).flatten(-2)
    share = (low_shares | high_shares << 4).float() - 32
    return _four_bit(_crumbs(packed) + 4 + (high << 2), scale * share, None, group_size=16)


def _k_shares(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Returns each group's share of scale and minimum, [N, B, 8], of the 12 bytes that hold them in 6 bits each."""
    first, second, third = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scale = torch.cat([first & 63, third & 15 | first >> 2 & 48], dim=-1)
    minimum = torch.cat([second & 63, third >> 4 | second >> 2 & 48], dim=-1)
    return scale.float(), minimum.float()


def _quarters(packed: Tensor) -> Tensor:
    """Returns codes of 4 bits [N, B, 256] of packed [N, B, 128]: the halves of each 32 bytes are a group each."""
    parts = packed.unflatten(-1, (4, 32))
    return torch.stack([parts & 15, parts >> 4], dim=-2).flatten(-3)


def _q4_k(fields: _Fields) -> QuantizedWeight:
    scale, minimum = fields.half(), fields.half()
    scale_shares, minimum_shares = _k_shares(fields.take(12))
    scales = scale * scale_shares
    return _four_bit(_quarters(fields.take(128)), scales, _moved(scales, minimum * minimum_shares), group_size=32)


def _q5_k(fields: _Fields) -> QuantizedWeight:
    scale, minimum = fields.half(), fields.half()
    scale_shares, minimum_shares = _k_shares(fields.take(12))
    high_bits = fields.take(32)
    shifts = torch.arange(8, dtype=torch.uint8, device=high_bits.device)[:, None]
    high = (high_bits[..., None, :] >> shifts & 1).flatten(-2)  # bit i of byte j: value j of group i
    codes = _quarters(fields.take(128)) | high << 4
    return _eight_bit(codes, scale * scale_shares, minimum * minimum_shares, group_size=32)


def _q6_k(fields: _Fields) -> QuantizedWeight:
    low, high = fields.take(128), fields.take(64)
    shares = fields.take(16).contiguous().view(torch.int8).float()
    scale = fields.half()
    # Each half of the block: 64 bytes with low halves of values 0..63 and high halves of 64..127.
    low_codes = _halves(low.unflatten(-1, (2, 64))).flatten(-2)
    codes = low_codes | _crumbs(high) << 4
    return _eight_bit(codes.to(torch.int8) - 32, scale * shares, None, group_size=16)


def _iq4_nl(fields: _Fields) -> QuantizedWeight:
    scale = fields.half()
    return _four_bit(_halves(fields.take(16)), scale, None, group_size=32, codebook=_IQ4_CODES)


def _iq4_xs(fields: _Fields) -> QuantizedWeight:
    scale = fields.half()
    high_shares, low_shares = fields.take(2), fields.take(4)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=high_shares.device)
    high = (high_shares[..., None] >> shifts & 3).flatten(-2)
    low = torch.stack([low_shares & 15, low_shares >> 4], dim=-1).flatten(-2)
    shares = (low | high << 4).float() - 32
    codes = _halves(fields.take(128).unflatten(-1, (8, 16))).flatten(-2)
    return _four_bit(codes, scale * shares, None, group_size=32, codebook=_IQ4_CODES)


def _mxfp4(fields: _Fields) -> QuantizedWeight:
    exponent = fields.take(1).to(torch.int32)
    # A power of two by its exponent's bits; its codes are twice the numbers they stand for, so half of it.
    bits = torch.where(exponent < 2, 0x00200000 << exponent, exponent - 1 << 23)
    codes = _halves(fields.take(16))
    return _four_bit(codes, bits.view(torch.float32), None, group_size=32, codebook=_MXFP4_CODES)


_UNPACK: dict[str, Callable[[_Fields], QuantizedWeight]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "MXFP4": _mxfp4,
}
