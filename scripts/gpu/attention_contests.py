# SPDX-License-Identifier: Apache-2.0
"""Paged attention beside the attention of torch and FlashInfer: decodes, and prefills of whole prompts and of chunks.

Blocks of a context are scattered over the cache. Peers that cannot read a paged cache get the same keys and values in
one piece, which is easier.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu.contest import Calls, Contest, relative_error
from gpu.timing import num_sets
from wavetrain_kernels import ops
from wavetrain_kernels.kv_cache import LARGEST_CODES
from wavetrain_kernels.reference.kv_cache import dequantize_heads, quantize_heads

# B = rows, T = tokens in the step, Hq = query heads, Hkv = key-value heads, D = head dimension, S = context.

BLOCK_SIZE = 16
_TOLERANCE = 2e-2


@dataclass(frozen=True)
class Shape:
    """A step: so many rows, each with so many queries at the end of a context of so many tokens."""

    num_rows: int
    query_len: int
    seq_len: int
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128

    @property
    def num_blocks(self) -> int:
        """Blocks that the contexts take."""
        return self.num_rows * -(-self.seq_len // BLOCK_SIZE)

    def num_bytes(self, itemsize: int) -> int:
        """Keys and values once, queries and results."""
        kv = 2 * self.num_rows * self.seq_len * self.num_kv_heads * self.head_dim
        return (kv + 2 * self.num_rows * self.query_len * self.num_heads * self.head_dim) * itemsize

    @property
    def num_flops(self) -> int:
        """Two products; a query sees the keys before it and its own."""
        seen = self.query_len * (self.seq_len - self.query_len) + self.query_len * (self.query_len + 1) // 2
        return 4 * self.num_rows * self.num_heads * self.head_dim * seen


@dataclass
class Buffers:
    """One set of inputs."""

    shape: Shape
    query: Tensor
    cache: ops.KVCache
    metadata: ops.AttentionMetadata

    @classmethod
    def random(cls, shape: Shape, dtype: torch.dtype, device: torch.device) -> Buffers:
        """Draws inputs; every context's blocks lie scattered over the cache."""
        draw = partial(torch.randn, dtype=dtype, device=device)
        sizes = (shape.num_blocks, shape.num_kv_heads, BLOCK_SIZE, shape.head_dim)
        tables = torch.randperm(shape.num_blocks, device=device).to(torch.int32).view(shape.num_rows, -1)
        num_tokens = shape.num_rows * shape.query_len
        return cls(
            shape=shape,
            query=draw(num_tokens, shape.num_heads, shape.head_dim),
            cache=ops.KVCache(draw(*sizes), draw(*sizes)),
            metadata=ops.AttentionMetadata.build(
                [shape.query_len] * shape.num_rows,
                [shape.seq_len] * shape.num_rows,
                tables,
                torch.full((num_tokens,), -1, dtype=torch.int64, device=device),
            ),
        )

    @property
    def scale(self) -> float:
        """Of the scores."""
        return self.shape.head_dim**-0.5

    def ours(self) -> Tensor:
        """Returns [T, Hq, D]."""
        return ops.paged_attention(self.query, self.cache, self.metadata, scale=self.scale)

    def in_one_piece(self, rows: slice = slice(None)) -> tuple[Tensor, Tensor, Tensor]:
        """Returns queries [B, Hq, Q, D], keys and values [B, Hkv, S, D] of some rows."""
        shape = self.shape
        tables = self.metadata.block_tables[rows].long()
        parts = [
            heads[tables].transpose(1, 2).flatten(2, 3)[:, :, : shape.seq_len].contiguous()
            for heads in (self.cache.key, self.cache.value)
        ]
        query = self.query.view(shape.num_rows, shape.query_len, shape.num_heads, shape.head_dim)[rows]
        return query.transpose(1, 2).contiguous(), parts[0], parts[1]

    def error(self, out: Tensor) -> float:
        """Returns how far the last queries of the first and last row are from the truth in float32."""
        worst = 0.0
        for row in {0, self.shape.num_rows - 1}:
            query, key, value = (part.float() for part in self.in_one_piece(slice(row, row + 1)))
            query = query[:, :, -16:]
            mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=key.device)
            mask = mask.tril(key.shape[2] - query.shape[2])
            with sdpa_kernel(SDPBackend.MATH):
                expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
            end = (row + 1) * self.shape.query_len
            found = out.reshape(-1, *out.shape[-2:])[end - query.shape[2] : end].transpose(0, 1)
            worst = max(worst, relative_error(found, expected[0]))
        return worst


def attention_contests(dtype: torch.dtype, device: torch.device, *, is_dry_run: bool) -> Iterator[Contest]:
    """Yields the contests of attention, each with buffers of its own."""
    small = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64}
    if is_dry_run:
        yield _contest("decode attention", Shape(2, 1, 40, **small), dtype, device, bar=("limit", 0.85))
        yield _contest("prefill attention", Shape(1, 24, 24, **small), dtype, device, bar=("cudnn sdpa", 0.75))
        for codes in LARGEST_CODES:
            yield _quantized_contest("decode attention", Shape(2, 1, 40, **small), dtype, codes, device)
        return
    for num_rows, seq_len in ((8, 8192), (64, 2048), (256, 1024), (1, 65536)):
        bar = None if num_rows == 1 else ("limit", 0.85)
        yield _contest("decode attention", Shape(num_rows, 1, seq_len), dtype, device, bar=bar)
    for query_len in (4, 8):
        yield _contest("verify attention", Shape(8, query_len, 8192), dtype, device, bar=None)
    for seq_len in (2048, 4096, 8192, 16384):
        shape = Shape(16384 // seq_len, seq_len, seq_len)
        yield _contest("prefill attention", shape, dtype, device, bar=("cudnn sdpa", 0.75))
    yield _contest("chunk attention", Shape(1, 2048, 16384), dtype, device, bar=None)
    for codes in LARGEST_CODES:
        yield _quantized_contest("decode attention", Shape(64, 1, 2048), dtype, codes, device)
        yield _quantized_contest("decode attention", Shape(8, 1, 8192), dtype, codes, device)
        yield _quantized_contest("prefill attention", Shape(4, 4096, 4096), dtype, codes, device)


def _quantized_contest(
    group: str, shape: Shape, dtype: torch.dtype, codes: torch.dtype, device: torch.device
) -> Contest:
    """Over a cache of 8 bits, beside the same over one of `dtype`; the truth is of what the codes stand for."""
    count = num_sets(shape.num_bytes(codes.itemsize), device)
    sets = [Buffers.random(shape, dtype, device) for _ in range(count)]
    quantized = [replace(buffers, cache=_quantized(buffers.cache, codes)) for buffers in sets]
    exact = replace(quantized[0], cache=_dequantized(quantized[0].cache, dtype))
    return Contest(
        group=group,
        case=f"{shape.num_rows} x {shape.seq_len}, {str(codes).removeprefix('torch.')} cache",
        num_bytes=shape.num_bytes(codes.itemsize),
        num_flops=shape.num_flops,
        ours=[buffers.ours for buffers in quantized],
        error=exact.error,
        tolerance=_TOLERANCE,
        peers={"unquantized cache": lambda: [buffers.ours for buffers in sets]},
        bar=None,
    )


def _quantized(cache: ops.KVCache, codes: torch.dtype) -> ops.KVCache:
    (key, key_scale), (value, value_scale) = (quantize_heads(heads, codes) for heads in (cache.key, cache.value))
    return ops.KVCache(key, value, key_scale, value_scale)


def _dequantized(cache: ops.KVCache, dtype: torch.dtype) -> ops.KVCache:
    assert cache.key_scale is not None
    assert cache.value_scale is not None
    return ops.KVCache(
        dequantize_heads(cache.key, cache.key_scale, dtype), dequantize_heads(cache.value, cache.value_scale, dtype)
    )


def _contest(
    group: str, shape: Shape, dtype: torch.dtype, device: torch.device, *, bar: tuple[str, float] | None
) -> Contest:
    count = num_sets(shape.num_bytes(dtype.itemsize), device)
    sets = [Buffers.random(shape, dtype, device) for _ in range(count)]
    peers: dict[str, Callable[[], Calls]] = {
        "varlen_attn, paged": lambda: [varlen_attention(buffers, is_paged=True) for buffers in sets],
        "varlen_attn": lambda: [varlen_attention(buffers, is_paged=False) for buffers in sets],
        "flashinfer": lambda: [flashinfer_attention(buffers) for buffers in sets],
    }
    if shape.query_len in (1, shape.seq_len):  # else the mask is not SDPA's
        for name, backend in (
            ("cudnn sdpa", SDPBackend.CUDNN_ATTENTION),
            ("flash sdpa", SDPBackend.FLASH_ATTENTION),
        ):
            peers[name] = partial(_sdpa_calls, sets, backend)
    return Contest(
        group=group,
        case=f"{shape.num_rows} x {shape.seq_len}"
        + (f", {shape.query_len} queries" if 1 < shape.query_len < shape.seq_len else ""),
        num_bytes=shape.num_bytes(dtype.itemsize),
        num_flops=shape.num_flops,
        ours=[buffers.ours for buffers in sets],
        error=sets[0].error,
        tolerance=_TOLERANCE,
        peers=peers,
        bar=bar,
    )


def _sdpa_calls(sets: list[Buffers], backend: SDPBackend) -> Calls:
    calls = [sdpa_attention(buffers, backend, repeats=False) for buffers in sets]
    try:
        calls[0]()
    except RuntimeError:  # a backend without grouped heads gets each key head as often as it is used
        calls = [sdpa_attention(buffers, backend, repeats=True) for buffers in sets]
    return calls


def sdpa_attention(buffers: Buffers, backend: SDPBackend, *, repeats: bool) -> Callable[[], Tensor]:
    """Returns a call of torch's attention on contiguous keys and values."""
    query, key, value = buffers.in_one_piece()
    if repeats:
        group = query.shape[1] // key.shape[1]
        key, value = (part.repeat_interleave(group, dim=1) for part in (key, value))
    is_causal = buffers.shape.query_len > 1

    def call() -> Tensor:
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(query, key, value, is_causal=is_causal, enable_gqa=not repeats)
        return out.transpose(1, 2)

    return call


def varlen_attention(buffers: Buffers, *, is_paged: bool) -> Callable[[], Tensor]:
    """Returns a call of torch's varlen_attn, whose arguments differ from version to version."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    shape, metadata = buffers.shape, buffers.metadata
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if "enable_gqa" in known:
        options["enable_gqa"] = True
    starts = torch.arange(shape.num_rows + 1, dtype=torch.int32, device=buffers.query.device) * shape.seq_len
    if is_paged:
        if "block_table" not in known:
            raise ValueError("this torch's varlen_attn reads no paged cache")
        key, value = (heads.transpose(1, 2).contiguous() for heads in (buffers.cache.key, buffers.cache.value))
        options |= {"block_table": metadata.block_tables, "seqused_k": metadata.seq_lens}
        starts_or_none = None
    else:
        _, *parts = buffers.in_one_piece()
        key, value = (part.transpose(1, 2).flatten(0, 1).contiguous() for part in parts)
        starts_or_none = starts
    sizes = (metadata.query_start_loc, starts_or_none, shape.query_len, shape.seq_len)
    return lambda: varlen_attn(buffers.query, key, value, *sizes, **options)  # pyright: ignore


def flashinfer_attention(buffers: Buffers) -> Callable[[], Tensor]:
    """Returns a call of FlashInfer on the paged cache as it is; planned once, as for all layers of a step."""
    import flashinfer  # pyright: ignore[reportMissingImports]

    shape, metadata, device = buffers.shape, buffers.metadata, buffers.query.device
    scratch = torch.empty(256 * 2**20, dtype=torch.uint8, device=device)
    width = metadata.block_tables.shape[1]
    indptr = torch.arange(shape.num_rows + 1, dtype=torch.int32, device=device) * width
    last = torch.full((shape.num_rows,), (shape.seq_len - 1) % BLOCK_SIZE + 1, dtype=torch.int32, device=device)
    indices = metadata.block_tables.flatten()
    heads = (shape.num_heads, shape.num_kv_heads, shape.head_dim, BLOCK_SIZE)
    kinds = {"q_data_type": buffers.query.dtype, "kv_data_type": buffers.cache.key.dtype}
    if shape.query_len == 1:
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(scratch, "HND", use_tensor_cores=True)
        wrapper.plan(indptr, indices, last, *heads, **kinds)
    else:
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(scratch, "HND")
        wrapper.plan(metadata.query_start_loc, indptr, indices, last, *heads, causal=True, **kinds)
    return lambda: wrapper.run(buffers.query, (buffers.cache.key, buffers.cache.value))
