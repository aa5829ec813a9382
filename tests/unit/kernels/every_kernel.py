# SPDX-License-Identifier: Apache-2.0
"""Runs all functions of compiled libraries over odd sizes: `python every_kernel.py LIBRARY...`. For sanitizers.

Each tensor has memory of its own, of exactly its size, so that a read or write past one is outside of all.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import torch
from torch import Tensor

from fakes.quantized_weights import every_scheme, random_quantized
from wavetrain_kernels import ops
from wavetrain_kernels.cpu.kernels import kernels_of
from wavetrain_kernels.ops import dispatch
from wavetrain_kernels.reference.kv_cache import quantize_heads

_SIZES = (1, 2, 15, 16, 17, 33, 64, 130)


def main() -> None:
    """Runs them all, naming each library first; a sanitizer ends the process where one is wrong."""
    for name in sys.argv[1:]:
        sys.stdout.write(Path(name).name + "\n")
        sys.stdout.flush()
        dispatch._CHOSEN["cpu"] = kernels_of(Path(name))
        with torch.inference_mode():
            run_all()


def run_all() -> None:
    """Every function of the library that answers."""
    for dtype in (torch.bfloat16, torch.float32):
        run_norms(dtype)
        run_rotations(dtype)
    run_sampling()
    run_linears()
    run_quantized_linears()
    run_mixtures()
    run_quantized_mixtures()
    run_attention()


def run_norms(dtype: torch.dtype) -> None:
    """Rows of all lengths, alone and many, together and apart."""
    for num_rows, size in itertools.product((0, 1, 7, 700), _SIZES):
        x, residual, weight = (torch.randn(shape).to(dtype) for shape in ((num_rows, size), (num_rows, size), (size,)))
        ops.rms_norm(x, weight, 1e-5)
        ops.add_rms_norm(x, residual, weight, 1e-5, weight_offset=1.0)
        ops.rms_norm(torch.randn(num_rows, 3, size).to(dtype)[:, 1:], weight, 1e-5)


def run_rotations(dtype: torch.dtype) -> None:
    """Heads of all sizes, whole and in part rotated, into full and empty slots."""
    for num_tokens, head_dim, table_dtype in itertools.product((0, 1, 8), (2, 16, 34, 64), (dtype, torch.float32)):
        query, key, value = (torch.randn(num_tokens, heads, head_dim).to(dtype) for heads in (4, 2, 2))
        slots = torch.arange(num_tokens) + 4
        slots[1::3] = -1
        for half in (0, head_dim // 2, head_dim // 4):
            table = torch.randn(11, 2, half).to(table_dtype)
            norm = torch.randn(head_dim).to(dtype)
            for cache_dtype in (dtype, torch.int8, torch.float8_e4m3fn):
                held = [torch.zeros(3, 2, 4, head_dim).to(cache_dtype) for _ in range(2)]
                scales = [torch.zeros(3, 2, 4).bfloat16() for _ in range(2)] if cache_dtype != dtype else []
                cache = ops.KVCache(*held, *scales)
                step = (query, key, value, torch.full((num_tokens,), 10), table, cache, slots)
                ops.rotate_and_cache(*step)
                ops.rotate_and_cache(*step, query_norm=norm, key_norm=norm, eps=1e-6)


def run_linears() -> None:
    """Weights of all sizes, with and without gates and bias."""
    sizes = itertools.product((0, 1, 5, 16, 33, 70), (2, 16, 34, 100), (1, 31, 32, 70))
    for num_rows, num_outputs, num_inputs in sizes:
        x, weight, bias = (
            torch.randn(shape).bfloat16() for shape in ((num_rows, num_inputs), (num_outputs, num_inputs), num_outputs)
        )
        packed = ops.pack_weight(weight)
        for dtype in (torch.bfloat16, torch.float32):
            ops.linear(x, packed, dtype=dtype)
            ops.linear(x, packed, bias, dtype=dtype)
        for table in (packed, weight):
            assert torch.equal(ops.embedding(torch.arange(num_outputs), table), weight)
            ops.embedding(torch.arange(num_outputs), table, scale=3.0)
        assert torch.equal(ops.select_rows(weight, torch.arange(num_outputs)), weight)
        gated = ops.pack_weight(weight, is_gated=True)
        ops.gated_linear(x, gated, "silu")
        ops.gated_linear(x, gated, "gelu_tanh", bias)


def run_quantized_linears() -> None:
    """Weights of every scheme, gates and rows beyond what is multiplied at once."""
    for num_rows, num_outputs, num_inputs in ((0, 2, 16), (1, 130, 100), (3, 2, 1), (9, 34, 257), (70, 64, 384)):
        for scheme in every_scheme(num_inputs).values():
            weight = random_quantized(scheme, num_outputs, num_inputs)
            x, bias = torch.randn(num_rows, num_inputs).bfloat16(), torch.randn(num_outputs).bfloat16()
            ops.linear(x, ops.pack_quantized(weight, dtype=x.dtype), dtype=torch.float32)
            gated = ops.pack_quantized(weight, dtype=x.dtype, is_gated=True)
            ops.gated_linear(x, gated, "silu", bias)


def run_mixtures() -> None:
    """Experts of all sizes: one that all tokens go to, many that few do, some that none does."""
    for num_tokens, num_experts, top_k in ((0, 4, 2), (1, 1, 1), (1, 70, 8), (33, 3, 2), (70, 2, 2), (600, 5, 1)):
        logits = torch.randn(num_tokens, num_experts)
        weights, expert_ids = ops.route_experts(logits, top_k, renormalize=True)
        for hidden, units in ((1, 1), (32, 16), (70, 34), (33, 70)):
            gate_up, down = (
                ops.empty_experts(num_experts, *shape, dtype=torch.bfloat16, device=logits.device, is_gated=is_gated)
                for shape, is_gated in (((2 * units, hidden), True), ((hidden, units), False))
            )
            for expert in range(num_experts):
                ops.pack_expert(gate_up, expert, torch.randn(2 * units, hidden).bfloat16())
                ops.pack_expert(down, expert, torch.randn(hidden, units).bfloat16())
            x = torch.randn(num_tokens, hidden).bfloat16()
            ops.fused_moe(x, gate_up, down, weights, expert_ids, "silu")
            ops.fused_moe(x, gate_up, down, weights, torch.full_like(expert_ids, -1), "gelu_tanh")
    logits = torch.full((3, 5), float("nan"))
    ops.route_experts(logits, 5, renormalize=False)


def run_quantized_mixtures() -> None:
    """Experts of every scheme, in sizes that fill no segment; few rows, many, and more than pass a panel at once."""
    for num_tokens, num_experts, top_k, hidden, units in ((1, 3, 2, 70, 34), (20, 2, 2, 33, 70), (600, 3, 1, 32, 16)):
        logits = torch.randn(num_tokens, num_experts)
        weights, expert_ids = ops.route_experts(logits, top_k, renormalize=True)
        x = torch.randn(num_tokens, hidden).bfloat16()
        for name, scheme in every_scheme(hidden).items():
            other = every_scheme(units)[name]
            stacks: list[ops.PackedExperts] = []
            for shape, one, is_gated in (((2 * units, hidden), scheme, True), ((hidden, units), other, False)):
                matrices = [random_quantized(one, *shape, seed=seed) for seed in range(num_experts)]
                experts = ops.empty_quantized_experts(num_experts, matrices[0], dtype=torch.bfloat16, is_gated=is_gated)
                for expert, matrix in enumerate(matrices):
                    ops.pack_expert(experts, expert, matrix)
                stacks.append(experts)
            gate_up, down = stacks
            ops.fused_moe(x, gate_up, down, weights, expert_ids, "silu")
            ops.fused_moe(x, gate_up, down, weights, torch.full_like(expert_ids, -1), "gelu_tanh")


def run_attention() -> None:
    """Decodes and chunks, with and without windows and caps, whose blocks are the cache's last."""
    block_size = 16
    rows = [(1, 1), (1, 17), (5, 5), (1, 300), (40, 100), (3, 16)]
    num_blocks = sum(-(-seq_len // block_size) for _, seq_len in rows)
    width = max(-(-seq_len // block_size) for _, seq_len in rows)
    free = list(range(num_blocks))
    tables = [[free.pop() for _ in range(-(-seq_len // block_size))] for _, seq_len in rows]
    tables = torch.tensor([table + [0] * (width - len(table)) for table in tables], dtype=torch.int32)
    query_lens = [query_len for query_len, _ in rows]
    metadata_of = lambda: ops.AttentionMetadata.build(  # noqa: E731
        query_lens, [seq_len for _, seq_len in rows], tables, torch.full((sum(query_lens),), -1)
    )
    for heads, kv_heads, head_dim in ((1, 1, 8), (6, 2, 64), (4, 4, 80), (12, 1, 128), (2, 1, 256), (3, 1, 18)):
        query = torch.randn(sum(query_lens), heads, head_dim).bfloat16()
        heads_of = [torch.randn(num_blocks, kv_heads, block_size, head_dim).bfloat16() for _ in range(2)]
        coded = [quantize_heads(heads, dtype) for heads in heads_of for dtype in (torch.int8, torch.float8_e4m3fn)]
        caches = [ops.KVCache(*heads_of)]
        caches += [
            ops.KVCache(key[0], value[0], key[1], value[1]) for key, value in zip(coded[:2], coded[2:], strict=True)
        ]
        for cache, window, cap in itertools.product(caches, (None, 1, 20), (None, 5.0)):
            ops.paged_attention(query, cache, metadata_of(), scale=0.1, sliding_window=window, soft_cap=cap)


def run_sampling() -> None:
    """Vocabularies of all sizes, also divided between threads; rows that cannot be sampled from."""
    for num_rows, size in itertools.product((0, 1, 3, 90), (*_SIZES, 127, 128, 1003, 5000)):
        logits = torch.randn(num_rows, size) * 3
        seeds, positions, token_ids = torch.arange(3 * num_rows).view(3, num_rows).clone().unbind()
        token_ids = torch.full_like(token_ids, size - 1)
        _sample(logits, seeds.clone(), positions.clone(), token_ids)
        for value in (float("nan"), float("inf"), float("-inf")):
            logits[:1] = value
            _sample(logits, seeds.clone(), positions.clone(), token_ids)


def _sample(logits: Tensor, seeds: Tensor, positions: Tensor, token_ids: Tensor) -> None:
    num_rows, size = logits.shape
    ops.sample_greedy(logits)
    temperature = torch.arange(num_rows) % 3 / 2.0
    for k in {0, 1, min(5, size), size}:
        ops.top_logprobs(logits, token_ids, k)
    one = torch.ones(num_rows)
    seen, counts = torch.full((num_rows, 9), size - 1), torch.ones(num_rows, 9, dtype=torch.int32)
    ops.apply_penalties(logits.clone(), seen, counts, one * 1.5, one * 0.5, one * 0.25)
    for k in (1, 3, size - 1):
        top_k = torch.full((num_rows,), k)
        lowest = ops.filter_thresholds(logits, temperature, top_k=top_k, top_p=one * 0.7, min_p=one * 0.01)
        ops.sample(logits, seeds, positions, temperature, lowest)
    ops.filter_thresholds(logits, one, top_p=one * 0.999)
    ops.sample(logits, seeds, positions, one)


if __name__ == "__main__":
    main()
