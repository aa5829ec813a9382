# SPDX-License-Identifier: Apache-2.0
"""Prefill attention against the reference: chunks of all lengths, all layers, and what tiles must not touch."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unit.kernels.gpu.attention_cases import CODES, UNWRITTEN, AttentionCase, Heads, assert_attends, make_case
from wavetrain_kernels.gpu import attention_prefill
from wavetrain_kernels.gpu.attention_prefill import prefill_attention
from wavetrain_kernels.gpu.attention_prefill_config import PrefillConfig, PrefillShape, prefill_config, shared_bytes
from wavetrain_kernels.gpu.launch import H200, KIB, DeviceTraits
from wavetrain_kernels.kv_cache import KVCache

# The interpreter turns arrays of one element into numbers.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")

# Many tiles in short chunks. The matrix units of a GPU want 64 rows for four warps.
SKEWED = PrefillConfig(
    pack=3, block_m=16, block_n=16, num_warps=4, num_stages=3, query_in_registers=True, is_skewed=True
)
IN_STEP = dataclasses.replace(SKEWED, pack=1, query_in_registers=False, is_skewed=False)

A100 = DeviceTraits("NVIDIA A100", (8, 0), 108, 163 * KIB, 40 * KIB * KIB)
L4 = DeviceTraits("NVIDIA L4", (8, 9), 58, 99 * KIB, 48 * KIB * KIB)
T4 = DeviceTraits("Tesla T4", (7, 5), 40, 64 * KIB, 4 * KIB * KIB)
B200 = DeviceTraits("NVIDIA B200", (10, 0), 148, 227 * KIB, 126 * KIB * KIB)

STEPS = {
    "one token": [(1, 1)],
    "a block": [(16, 16)],
    "odd lengths": [(37, 37), (5, 5), (17, 17)],
    "cached prefixes": [(7, 60), (1, 33), (20, 36)],
    "rows without queries": [(0, 9), (12, 20), (0, 0), (3, 3), (0, 0)],
}


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch):
    """Makes the launcher take one configuration, whatever the heuristics say."""

    def use(config: PrefillConfig) -> None:
        monkeypatch.setattr(attention_prefill, "_config", lambda *_: config)

    return use


@pytest.mark.parametrize(
    ("config", "sliding_window", "soft_cap"),
    [
        pytest.param(SKEWED, None, None, id="skewed"),
        pytest.param(SKEWED, 1, None, id="skewed, window of one"),
        pytest.param(SKEWED, 20, 5.0, id="skewed, window, cap"),
        pytest.param(IN_STEP, None, 5.0, id="in step, cap"),
        pytest.param(IN_STEP, 20, None, id="in step, window"),
    ],
)
@pytest.mark.parametrize("rows", STEPS.values(), ids=STEPS.keys())
def test_steps_equal_the_reference(rows, config, sliding_window, soft_cap, dtype, device, use):
    use(config)
    heads = Heads(num_heads=3, num_kv_heads=1, head_dim=16)
    case = make_case(rows, dtype, device, heads, sliding_window=sliding_window, soft_cap=soft_cap)
    assert_attends(case, prefill_attention)


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("head_dim", [8, 64, 80, 96, 128, 256])
def test_shipped_configurations_equal_the_reference(head_dim, block_size, dtype, device):
    """Longer than two of the largest tiles of keys, and than one of queries."""
    heads = Heads(num_heads=4, num_kv_heads=1, head_dim=head_dim, block_size=block_size)
    assert_attends(make_case([(45, 270), (130, 130)], dtype, device, heads), prefill_attention)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(1, 1), (4, 2), (7, 1), (20, 1), (40, 2)])
def test_groups_of_heads(num_heads, num_kv_heads, dtype, device):
    heads = Heads(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=16)
    assert_attends(make_case([(40, 70), (3, 3)], dtype, device, heads), prefill_attention)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=4),
    pack=st.sampled_from([1, 2, 4]),
    blocks=st.sampled_from([(16, 16), (32, 16), (16, 32)]),
    is_skewed=st.booleans(),
    sliding_window=st.none() | st.integers(1, 70),
    soft_cap=st.none() | st.just(3.0),
    seed=st.integers(0, 9),
)
def test_any_step_equals_the_reference(rows, pack, blocks, is_skewed, sliding_window, soft_cap, seed, device, use):
    use(dataclasses.replace(SKEWED, pack=pack, block_m=blocks[0], block_n=blocks[1], is_skewed=is_skewed))
    case = make_case(
        [(queries, queries + before) for queries, before in rows],
        torch.float16,
        device,
        Heads(num_heads=4, num_kv_heads=1, head_dim=16),
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        seed=seed,
    )
    assert_attends(case, prefill_attention)


def test_an_empty_step(device):
    case = make_case([], torch.float16, device)
    assert case.attend(prefill_attention).shape == (0, 6, 64)


def test_a_query_with_strides(dtype, device, use):
    use(SKEWED)
    case = make_case([(20, 33)], dtype, device)
    case.query = torch.stack([case.query, case.query + 1], dim=-1)[..., 0]
    assert case.query.stride(2) == 2
    assert_attends(case, prefill_attention)


@pytest.mark.parametrize("min_query_len", [2, 9, 30])
def test_rows_of_the_decode_kernel_are_left_alone(min_query_len, device, use):
    use(SKEWED)
    case = make_case([(1, 30), (8, 40), (0, 0), (9, 9), (1, 1), (29, 50), (40, 41)], torch.float16, device)
    expected = case.expected()
    for start, stop in pairwise(case.metadata.host_query_start_loc):
        if stop - start < min_query_len:
            expected[start:stop] = UNWRITTEN
    result = case.attend(lambda *arguments: prefill_attention(*arguments, min_query_len=min_query_len))
    torch.testing.assert_close(result.float().cpu(), expected, atol=3e-3, rtol=3e-3)


def test_more_rows_than_a_program_looks_at_once(device, use, monkeypatch):
    use(SKEWED)
    monkeypatch.setattr(attention_prefill, "_BLOCK_B", 4)
    assert_attends(make_case([(row % 8, 9 + row) for row in range(14)], torch.float16, device), prefill_attention)


def test_tiles_that_nobody_has_do_nothing(device, use, monkeypatch):
    """As in a captured graph, whose grid is for any chunks of its tokens."""
    use(SKEWED)
    bound = attention_prefill._most_tiles
    monkeypatch.setattr(attention_prefill, "_num_tiles", lambda metadata, tile, _: bound(metadata, tile))
    assert_attends(make_case(STEPS["rows without queries"], torch.float16, device), prefill_attention)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 50), max_size=8), st.integers(1, 40), st.integers(1, 12))
def test_the_bound_holds_for_any_chunks(query_lens, tile_tokens, min_query_len):
    case = make_case([(length, length) for length in query_lens], torch.float16, torch.device("cpu"))
    num_tiles = attention_prefill._num_tiles(case.metadata, tile_tokens, min_query_len)
    assert num_tiles == sum(-(-n // tile_tokens) for n in query_lens if n >= min_query_len)
    assert num_tiles <= attention_prefill._most_tiles(case.metadata, tile_tokens)


@pytest.mark.parametrize("config", [SKEWED, IN_STEP], ids=["skewed", "in step"])
def test_blocks_before_the_window_are_not_read(config, device, use):
    """They may have gone to another request, and hold anything."""
    use(config)
    case = make_case([(6, 70)], torch.float16, device, sliding_window=18)
    expected = case.expected()
    first_seen = (70 - 6 - 18 + 1) // 16
    for block in case.metadata.block_tables[0, :first_seen].tolist():
        case.cache.key[block] = case.cache.value[block] = float("nan")
    case.metadata.block_tables[0, :first_seen] = 10**9  # an address outside the cache
    torch.testing.assert_close(case.attend(prefill_attention).float().cpu(), expected, atol=3e-3, rtol=3e-3)


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # NumPy's, interpreting
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("config", [SKEWED, IN_STEP], ids=["skewed", "in step"])
def test_a_row_of_nan_stays_alone(config, device, use):
    use(config)
    case = make_case([(20, 30), (20, 30), (20, 30)], torch.float16, device)
    clean = case.attend(prefill_attention)
    for block in case.metadata.block_tables[1, :2].tolist():
        case.cache.key[block] = case.cache.value[block] = float("nan")
    result = case.attend(prefill_attention)
    assert result[20:40].isnan().all()
    assert torch.equal(result[:20], clean[:20])
    assert torch.equal(result[40:], clean[40:])


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # NumPy's, interpreting: exp2 is infinite as it should be
def test_large_scores_do_not_overflow(device, use):
    use(SKEWED)
    case = make_case([(20, 50)], torch.float32, device)
    loud = AttentionCase(
        case.query * 1e3, KVCache(case.cache.key * 1e3, case.cache.value), case.metadata, case.scale, None, None
    )
    # Rounding alone moves such scores by more than a softmax forgives, so there is nothing to compare.
    assert loud.attend(prefill_attention).isfinite().all()
    assert dataclasses.replace(loud, soft_cap=30.0).attend(prefill_attention).isfinite().all()


@pytest.mark.parametrize("config", [SKEWED, IN_STEP], ids=["skewed", "in step"])
@pytest.mark.parametrize(("codes", "has_type"), CODES)
def test_codes(codes, has_type, config, dtype, device, use, monkeypatch):
    use(config)
    if not has_type:
        monkeypatch.setattr("wavetrain_kernels.gpu.kv_cache.device_traits", lambda _device: A100)
    for options in ({}, {"sliding_window": 18, "soft_cap": 1.5}):
        case = make_case([(37, 37), (7, 60), (3, 3)], dtype, device, codes=codes, **options)
        assert_attends(case, prefill_attention)


SHAPES = [
    PrefillShape(group * 8, 8, head_dim, block_size, element_bytes, is_quantized)
    for is_quantized in (False, True)
    for group in (1, 4, 7, 71, 200)
    for head_dim in (64, 80, 96, 128, 256)
    for block_size in (16, 32, 128)
    for element_bytes in (2, 4)
]


@pytest.mark.parametrize("device_traits", [H200, A100, L4, T4, B200], ids=lambda traits: traits.name)
def test_every_configuration_fits_its_device(device_traits):
    for shape in SHAPES:
        config = prefill_config(shape, device_traits)
        if shape.block_size <= 32 and shape.element_bytes == 2:
            assert shared_bytes(config, shape) <= device_traits.shared_bytes
        assert shape.group % config.pack == 0
        assert config.tile_tokens >= 1
        assert config.block_n % shape.block_size == 0
        assert config.is_skewed == (device_traits in (H200, B200))


def test_the_configuration_that_matters_most():
    llama = PrefillShape(32, 8, 128, 16, 2)
    assert prefill_config(llama, H200) == PrefillConfig(
        pack=4, block_m=128, block_n=64, num_warps=8, num_stages=3, query_in_registers=True, is_skewed=True
    )
    assert not prefill_config(dataclasses.replace(llama, head_dim=256), H200).query_in_registers
    assert not prefill_config(llama, A100).query_in_registers


def test_measured_values_replace_the_heuristics():
    shape = PrefillShape(32, 8, 128, 16, 2)
    measured = {"block_n": 128, "query_in_registers": False, "pack": 1}
    expected = dataclasses.replace(prefill_config(shape, H200), **measured)
    assert prefill_config(shape, H200, measured) == expected
    # What does not fit is still made to fit.
    assert prefill_config(shape, H200, {"num_stages": 9}).num_stages < 9
    # What was measured with small blocks is made to hold a large one.
    assert prefill_config(dataclasses.replace(shape, block_size=64), H200, {"block_n": 32}).block_n == 64


SERIALIZED = """
import json, sys
from triton.backends.compiler import GPUTarget
import triton
from wavetrain_kernels.aot import _source, all_cases
found = {}
for name in sys.argv[1:]:
    case = all_cases()[name]
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    text = triton.compile(_source(case), target=GPUTarget("cuda", 90, 32), options=options).asm["sass"]
    found[name] = text.count("HGMMA."), text.count("WARPGROUP.DEPBAR")
print(json.dumps(found))
"""


def test_products_run_in_the_background(tmp_path):
    """Where the assembler thinks that others may write a running product's registers, it waits for each instruction."""
    kinds = ["64/b16", "128/b16", "128/b16/window/cap", "256/b16/window"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-c", SERIALIZED, *(f"prefill_attention/bf16/32:8x{kind}" for kind in kinds)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, check=False)
    assert done.returncode == 0, done.stderr
    for name, (num_products, num_waits) in json.loads(done.stdout).items():
        assert num_products >= 12, name
        assert 3 * num_waits <= num_products, name
