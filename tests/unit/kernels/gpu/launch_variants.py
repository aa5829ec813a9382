# SPDX-License-Identifier: Apache-2.0
"""`python launch_variants.py`: which variants of each kernel a step of any size would have compiled, without a GPU.

Every launch is stopped where Triton would look its variant up, and the key it looks for is noted: the types of the
arguments, what of their values it specialises on, the constants and options. One JSON object on standard output:
{scenario: {kernel: [key, ...]}}, where a scenario is one operation of one model over steps of many sizes. Run where
Triton does not interpret.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, compute_cache_key, create_function_from_signature

from wavetrain_kernels import ops
from wavetrain_kernels.attention_metadata import AttentionMetadata
from wavetrain_kernels.gpu.kernels import GPU
from wavetrain_kernels.kv_cache import KVCache
from wavetrain_kernels.ops import PackedWeight, QuantizationScheme, QuantizedWeight, dispatch

DTYPE = torch.bfloat16
HIDDEN_SIZE, INTERMEDIATE_SIZE, VOCABULARY_SIZE = 96, 160, 300
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE = 6, 2, 64, 16
# Around 1 and the multiples of 16, which Triton makes variants of where it may.
STEP_SIZES = (0, 1, 2, 3, 15, 16, 17, 32, 48, 100, 257)

_BACKEND = make_backend(GPUTarget("cuda", 90, 32))
_Seen = dict[str, dict[str, None]]


def main() -> None:
    """Runs every scenario over every size."""
    found: dict[str, dict[str, list[str]]] = {}
    for name, scenario in SCENARIOS.items():
        seen: _Seen = defaultdict(dict)
        JITFunction.run = _recorder(seen)
        for num_tokens in STEP_SIZES:
            scenario(num_tokens)
        found[name] = {kernel: list(keys) for kernel, keys in seen.items()}
    sys.stdout.write(json.dumps(found))


def _recorder(seen: _Seen) -> Any:
    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        binder = create_function_from_signature(self.signature, self.params, _BACKEND)
        _, specialization, launch_options = binder(*args, **options)
        seen[self.__name__][compute_cache_key({}, specialization, launch_options)] = None

    return run


def _made(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=DTYPE)


WEIGHT, TABLE = _made(HIDDEN_SIZE), _made(VOCABULARY_SIZE, HIDDEN_SIZE)
HEAD_NORM, COS_SIN = _made(HEAD_DIM), _made(1000, 2, HEAD_DIM // 2)
GATED = _made(2 * INTERMEDIATE_SIZE, HIDDEN_SIZE)
NUM_EXPERTS = 64
EXPERTS = (
    _made(NUM_EXPERTS, 2 * INTERMEDIATE_SIZE, HIDDEN_SIZE),
    _made(NUM_EXPERTS, HIDDEN_SIZE, INTERMEDIATE_SIZE),
)
CACHE = KVCache(*(_made(20, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM) for _ in range(2)))
QUANTIZED_CACHE = KVCache(
    *(_made(20, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM).to(torch.float8_e4m3fn) for _ in range(2)),
    *(torch.zeros(20, NUM_KV_HEADS, BLOCK_SIZE, dtype=torch.bfloat16) for _ in range(2)),
)
BUFFER = torch.zeros(1024, dtype=torch.int64)  # what a step's ids are slices of, at any offset


@triton.jit
def _specializing_kernel(x_ptr, num_tokens):
    pass


def a_kernel_as_it_must_not_be(num_tokens: int) -> None:
    _specializing_kernel[(1,)](WEIGHT, num_tokens)


def rms_norm(num_tokens: int) -> None:
    x = _made(num_tokens, HIDDEN_SIZE)
    GPU.rms_norm(torch.empty_like(x), x, WEIGHT, 1e-5, 0.0)


def rms_norm_of_picked_rows(num_tokens: int) -> None:
    x = _made(num_tokens + 3, HIDDEN_SIZE)[1 : num_tokens + 1]
    GPU.rms_norm(_made(num_tokens, HIDDEN_SIZE), x, WEIGHT, 1e-5, 1.0)


def add_rms_norm(num_tokens: int) -> None:
    x = _made(num_tokens, HIDDEN_SIZE)
    GPU.add_rms_norm(torch.empty_like(x), torch.empty_like(x), x, x.clone(), WEIGHT, 1e-5, 0.0)


def rotate_and_cache(num_tokens: int, *norms: torch.Tensor, cache: KVCache = CACHE) -> None:
    num_all = NUM_HEADS + 2 * NUM_KV_HEADS
    fused = _made(num_tokens, num_all * HEAD_DIM).unflatten(-1, (num_all, HEAD_DIM))
    query, key, value = fused.split([NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS], dim=1)
    positions, slots = BUFFER[num_tokens : 2 * num_tokens], BUFFER[1 : num_tokens + 1]
    out = _made(num_tokens, NUM_HEADS, HEAD_DIM)
    GPU.rotate_and_cache(out, query, key, value, positions, COS_SIN, cache, slots, *(norms or (None, None)), 1e-6)


def rotate_and_cache_with_norms(num_tokens: int) -> None:
    rotate_and_cache(num_tokens, HEAD_NORM, HEAD_NORM)


def rotate_and_quantize(num_tokens: int) -> None:
    rotate_and_cache(num_tokens, cache=QUANTIZED_CACHE)


def gated_linear(num_tokens: int) -> None:
    out = _made(num_tokens, INTERMEDIATE_SIZE)
    GPU.gated_linear(out, _made(num_tokens, HIDDEN_SIZE), GATED, None, "silu")


def _source(scheme: QuantizationScheme, out_features: int, in_features: int) -> QuantizedWeight:
    grid = torch.ones(out_features, -(-in_features // scheme.group_size))
    if scheme.values == "int4":
        values = torch.zeros(out_features, in_features // 2, dtype=torch.uint8)
    else:
        values = torch.zeros(out_features, in_features, dtype=torch.int8)
    return QuantizedWeight(scheme=scheme, in_features=in_features, values=values, scales=grid)


def _quantized(scheme: QuantizationScheme, out_features: int, in_features: int, is_gated: bool) -> PackedWeight:
    return ops.pack_quantized(_source(scheme, out_features, in_features), dtype=DTYPE, is_gated=is_gated)


def _quantized_experts(out_features: int, in_features: int, is_gated: bool) -> Any:
    weight = _source(NARROW, out_features, in_features)
    experts = ops.empty_quantized_experts(NUM_EXPERTS, weight, dtype=DTYPE, is_gated=is_gated)
    for expert in range(NUM_EXPERTS):
        ops.pack_expert(experts, expert, weight)
    return experts.data


dispatch._CHOSEN["cpu"] = GPU
NARROW = QuantizationScheme(values="int4", group_size=32)
ROUNDED = QuantizationScheme(values="int8", group_size=1024, inputs="int8")
NARROW_WEIGHT = _quantized(NARROW, HIDDEN_SIZE, HIDDEN_SIZE, False)
NARROW_GATED = _quantized(NARROW, 2 * INTERMEDIATE_SIZE, HIDDEN_SIZE, True)
ROUNDED_WEIGHT = _quantized(ROUNDED, HIDDEN_SIZE, HIDDEN_SIZE, False)
NARROW_EXPERTS = (
    _quantized_experts(2 * INTERMEDIATE_SIZE, HIDDEN_SIZE, True),
    _quantized_experts(HIDDEN_SIZE, INTERMEDIATE_SIZE, False),
)
ROUNDED_DOWN = _quantized(ROUNDED, HIDDEN_SIZE, INTERMEDIATE_SIZE, False)


def weights_of_4_bits(num_tokens: int) -> None:
    """Up to 16 rows: how many a tile has is one of four constants."""
    ops.linear(_made(num_tokens % 17, HIDDEN_SIZE), NARROW_WEIGHT)


def gated_weights_of_4_bits(num_tokens: int) -> None:
    ops.gated_linear(_made(num_tokens % 17, HIDDEN_SIZE), NARROW_GATED, "silu")


def rows_of_8_bits_behind_a_norm(num_tokens: int) -> None:
    """From 65 rows on, which are rounded."""
    x = _made(65 + num_tokens, HIDDEN_SIZE)
    rows, _ = ops.add_rms_norm(x, x.clone(), WEIGHT, 1e-5, inputs_for=ROUNDED_WEIGHT)
    ops.linear(rows, ROUNDED_WEIGHT)


def rows_of_8_bits_behind_a_gate(num_tokens: int) -> None:
    """From 1025 rows on the weight of the gates is widened."""
    x = _made(1025 + num_tokens, HIDDEN_SIZE)
    ops.linear(ops.gated_linear(x, NARROW_GATED, "silu", inputs_for=ROUNDED_DOWN), ROUNDED_DOWN)


def embedding(num_tokens: int) -> None:
    token_ids = BUFFER[num_tokens : 2 * num_tokens]
    GPU.embedding(_made(num_tokens, HIDDEN_SIZE), TABLE, token_ids, 1.0, False)


def route_experts(num_tokens: int) -> None:
    weights, expert_ids = torch.zeros(num_tokens, 2), torch.zeros(num_tokens, 2, dtype=torch.int32)
    GPU.route_experts(weights, expert_ids, torch.zeros(num_tokens, NUM_EXPERTS), True)


def mixture_of_few(num_tokens: int) -> None:
    """Less than a pair an expert, and one program sorts them all."""
    _mixture(1 + num_tokens % 15, EXPERTS)


def mixture_of_many(num_tokens: int) -> None:
    """From 22 to 30 pairs an expert: the number of rows in a tile is one of four constants."""
    _mixture(700 + num_tokens, EXPERTS)


def quantized_gates_of_few(num_tokens: int) -> None:
    """Both projections are multiplied by one kernel, in two variants: so each is looked at by itself."""
    _mixture(1 + num_tokens % 15, (NARROW_EXPERTS[0], EXPERTS[1]))


def quantized_gates_of_many(num_tokens: int) -> None:
    _mixture(700 + num_tokens, (NARROW_EXPERTS[0], EXPERTS[1]))


def quantized_downs_of_few(num_tokens: int) -> None:
    _mixture(1 + num_tokens % 15, (EXPERTS[0], NARROW_EXPERTS[1]))


def quantized_downs_of_many(num_tokens: int) -> None:
    _mixture(700 + num_tokens, (EXPERTS[0], NARROW_EXPERTS[1]))


def _mixture(num_tokens: int, experts: tuple[Any, Any]) -> None:
    x = _made(num_tokens, HIDDEN_SIZE)
    weights, expert_ids = torch.zeros(num_tokens, 2), torch.zeros(num_tokens, 2, dtype=torch.int32)
    GPU.fused_moe(torch.empty_like(x), x, *experts, weights, expert_ids, INTERMEDIATE_SIZE, "silu")


def decode_attention(num_tokens: int) -> None:
    """Eight rows whatever the size: it is their contexts that differ."""
    _attention([1] * 8, [num_tokens + row + 1 for row in range(8)])


def decode_attention_over_codes(num_tokens: int) -> None:
    _attention([1] * 8, [num_tokens + row + 1 for row in range(8)], QUANTIZED_CACHE)


def prefill_attention_over_codes(num_tokens: int) -> None:
    _attention([9 + num_tokens, 10, 11 + num_tokens // 2, 64], [3 * num_tokens + 64] * 4, QUANTIZED_CACHE)


def prefill_attention(num_tokens: int) -> None:
    """Four rows in chunks that differ."""
    _attention([9 + num_tokens, 10, 11 + num_tokens // 2, 64], [3 * num_tokens + 64] * 4)


def _attention(query_lens: list[int], seq_lens: list[int], cache: KVCache = CACHE) -> None:
    num_tokens, width = sum(query_lens), max(seq_lens) // BLOCK_SIZE + 1
    tables = torch.zeros(len(seq_lens), width, dtype=torch.int32)
    metadata = AttentionMetadata.build(query_lens, seq_lens, tables, torch.full((num_tokens,), -1))
    query = _made(num_tokens, NUM_HEADS, HEAD_DIM)
    GPU.paged_attention(torch.empty_like(query), query, cache, metadata, 0.1, None, None)


def _logits(num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of logits; an id and a parameter of each, slices of longer tensors."""
    parameters = torch.ones(1024)[num_tokens : 2 * num_tokens]
    return torch.zeros(num_tokens, VOCABULARY_SIZE), BUFFER[1 : num_tokens + 1], parameters


def penalties(num_tokens: int) -> None:
    logits, _, ones = _logits(num_tokens)
    history = torch.zeros(num_tokens, 40, dtype=torch.int64)
    ops.apply_penalties(logits, history, history.int(), ones, ones, ones)


def greedy(num_tokens: int) -> None:
    ops.sample_greedy(_logits(num_tokens)[0])


def filters(num_tokens: int) -> None:
    logits, top_k, ones = _logits(num_tokens)
    ops.filter_thresholds(logits, ones, top_k=top_k, top_p=ones, min_p=ones)


def draw(num_tokens: int) -> None:
    logits, seeds, ones = _logits(num_tokens)
    ops.sample(logits, seeds, BUFFER[num_tokens : 2 * num_tokens], ones, ones)


def logprobs(num_tokens: int) -> None:
    logits, token_ids, _ = _logits(num_tokens)
    ops.top_logprobs(logits, token_ids, 5)


SCENARIOS: dict[str, Callable[[int], None]] = {
    function.__name__: function
    for function in (
        a_kernel_as_it_must_not_be,
        rms_norm,
        rms_norm_of_picked_rows,
        add_rms_norm,
        rotate_and_cache,
        rotate_and_cache_with_norms,
        rotate_and_quantize,
        gated_linear,
        weights_of_4_bits,
        gated_weights_of_4_bits,
        rows_of_8_bits_behind_a_norm,
        rows_of_8_bits_behind_a_gate,
        embedding,
        route_experts,
        mixture_of_few,
        mixture_of_many,
        quantized_gates_of_few,
        quantized_gates_of_many,
        quantized_downs_of_few,
        quantized_downs_of_many,
        decode_attention,
        decode_attention_over_codes,
        prefill_attention,
        prefill_attention_over_codes,
        penalties,
        greedy,
        filters,
        draw,
        logprobs,
    )
}

if __name__ == "__main__":
    main()
