# SPDX-License-Identifier: Apache-2.0
"""Decode attention against the reference: every division of the work, odd sizes, and what a captured graph replays."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from unit.kernels.gpu.attention_cases import (
    CODES,
    UNWRITTEN,
    Attention,
    AttentionCase,
    Heads,
    assert_attends,
    make_case,
)
from wavetrain_kernels.attention_metadata import AttentionMetadata
from wavetrain_kernels.gpu import attention_decode
from wavetrain_kernels.gpu.attention import paged_attention
from wavetrain_kernels.gpu.attention_decode import decode_attention
from wavetrain_kernels.gpu.attention_decode_config import MAX_DECODE_QUERY_LEN, DecodeShape, decode_config
from wavetrain_kernels.gpu.launch import H200, fall_back
from wavetrain_kernels.gpu.workspace import workspace
from wavetrain_kernels.kv_cache import KVCache

# The interpreter turns arrays of one element into numbers.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")

SMALL = Heads(num_heads=3, num_kv_heads=1)

STEPS = {
    "one decode": [(1, 9)],
    "one decode of one token": [(1, 1)],
    "decode at a tile's end": [(1, 128)],
    "decodes": [(1, 3), (1, 170), (1, 16), (1, 1)],
    "decodes of unlike length": [(1, 3), (1, 700), (1, 2), (1, 66)],
    "drafts": [(4, 300), (1, 20), (8, 8), (2, 129), (3, 64), (7, 200)],
    "padding": [(1, 200), (0, 0), (3, 70), (0, 0), (0, 0)],
    "only padding": [(0, 0), (0, 0)],
}


def divided(num_programs: int, **changes: Any) -> Attention:
    """Returns decode attention that shares its work between so many programs a head, and small tiles by default."""

    def attend(
        out: Tensor,
        query: Tensor,
        cache: KVCache,
        metadata: AttentionMetadata,
        scale: float,
        sliding_window: int | None,
        soft_cap: float | None,
    ) -> None:
        shape = DecodeShape(
            metadata.num_requests,
            min(metadata.max_query_len, MAX_DECODE_QUERY_LEN),
            query.shape[1],
            cache.num_kv_heads,
            query.shape[2],
            cache.key.element_size(),
        )
        sizes = {"num_programs": num_programs, "tile_n": 32, "merge_m": 8, "merge_p": 2, **changes}
        config = dataclasses.replace(decode_config(shape, H200), **sizes)
        options = (metadata, scale, sliding_window, soft_cap)
        attention_decode.run(out, query, cache, *options, shape, config)

    return attend


@pytest.mark.parametrize(("num_programs", "merges"), [(1, True), (5, True), (5, False), (21, False)])
@pytest.mark.parametrize("rows", STEPS.values(), ids=STEPS.keys())
def test_any_number_of_programs_gives_the_same(rows, num_programs, merges, device):
    """Also more programs than the step has tiles."""
    case = make_case(rows, torch.float32, device, SMALL)
    assert_attends(case, divided(num_programs, merges=merges, min_tiles=1))


@pytest.mark.parametrize("soft_cap", [None, 1.5])
@pytest.mark.parametrize("sliding_window", [None, 1, 32, 101])
def test_windows_and_caps(sliding_window, soft_cap, dtype, device):
    rows = [*STEPS["drafts"], *STEPS["padding"]]
    case = make_case(rows, dtype, device, SMALL, sliding_window=sliding_window, soft_cap=soft_cap)
    assert_attends(case, divided(3))


@pytest.mark.parametrize(("block_size", "merges"), [(16, True), (32, False)])
@pytest.mark.parametrize("head_dim", [8, 64, 80, 96, 128, 256])
def test_head_dims(head_dim, block_size, merges, dtype, device):
    heads = Heads(num_heads=4, num_kv_heads=2, head_dim=head_dim, block_size=block_size)
    tile_n = decode_config(DecodeShape(3, 3, 4, 2, head_dim, 2), H200).tile_n
    case = make_case([(3, 300), (1, 20), (2, 129)], dtype, device, heads)
    assert_attends(case, divided(4, tile_n=tile_n, min_tiles=1, merges=merges))


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(1, 1), (3, 3), (4, 1), (14, 2), (16, 1), (12, 1)])
def test_groups(num_heads, num_kv_heads, dtype, device):
    heads = Heads(num_heads=num_heads, num_kv_heads=num_kv_heads)
    for rows in (STEPS["decodes"], STEPS["drafts"]):
        assert_attends(make_case(rows, dtype, device, heads), divided(2))


@pytest.mark.parametrize("block_size", [4, 8, 64, 128])
def test_blocks_of_other_sizes(block_size, device):
    case = make_case(STEPS["drafts"], torch.float32, device, Heads(block_size=block_size), sliding_window=50)
    assert_attends(case, divided(3))


@pytest.mark.parametrize(("codes", "has_type"), CODES)
@pytest.mark.parametrize(("head_dim", "sliding_window", "soft_cap"), [(64, None, None), (80, 40, 1.5)])
def test_codes(head_dim, sliding_window, soft_cap, codes, has_type, dtype, device, monkeypatch):
    if not has_type:
        monkeypatch.setattr("wavetrain_kernels.gpu.kv_cache.device_traits", lambda _device: A100)
    options = {"sliding_window": sliding_window, "soft_cap": soft_cap, "codes": codes}
    heads = Heads(num_heads=4, num_kv_heads=2, head_dim=head_dim)
    assert_attends(make_case([(1, 70), (4, 33), (0, 0), (2, 129)], dtype, device, heads, **options), divided(3))


def test_the_launch_that_is_shipped(device):
    case = make_case([(1, 3), (1, 3000), (1, 2), (1, 66)], torch.float16, device, Heads(num_heads=32, num_kv_heads=8))
    assert_attends(case, decode_attention)


def test_an_empty_step(device):
    case = make_case([], torch.float32, device)
    assert case.attend(decode_attention).shape == (0, 6, 64)
    assert case.attend(paged_attention).shape == (0, 6, 64)


def test_a_long_context(device):
    """Positions of 17 bits; only the window's end has to be computed."""
    rows = [(2, 131072), (1, 5), (1, 70001)]
    assert_attends(make_case(rows, torch.float16, device, SMALL, sliding_window=300), divided(3))


def test_more_rows_than_a_scan_has_threads(device):
    rows = [(1, 1 + row % 37) for row in range(130)]
    assert_attends(make_case(rows, torch.float32, device, SMALL), divided(3))


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.tuples(st.integers(0, 8), st.integers(0, 150)), min_size=1, max_size=6),
    num_programs=st.integers(1, 12),
    min_tiles=st.integers(1, 4),
    sliding_window=st.none() | st.integers(1, 160),
    merges=st.booleans(),
)
def test_any_lengths(rows, num_programs, min_tiles, sliding_window, merges, device):
    steps = [(query_len, query_len + before if query_len else 0) for query_len, before in rows]
    case = make_case(steps, torch.float32, device, SMALL, sliding_window=sliding_window)
    assert_attends(case, divided(num_programs, min_tiles=min_tiles, merges=merges))


# What a captured graph does: the launch is of the capture, the numbers on the device are of the replay.


@pytest.mark.parametrize("merges", [True, False])
def test_lengths_come_from_the_device(merges, device):
    case = make_case([(1, 400), (1, 3), (1, 260)], torch.float32, device)
    replayed = make_case([(1, 77), (1, 301), (1, 1)], torch.float32, device)
    expected = replayed.expected()
    captured = dataclasses.replace(case.metadata)
    captured.seq_lens.copy_(replayed.metadata.seq_lens)
    captured.block_tables = replayed.metadata.block_tables
    replayed.metadata = captured
    assert captured.host_seq_lens == [400, 3, 260]
    torch.testing.assert_close(replayed.attend(divided(4, merges=merges)).cpu(), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("merges", [True, False])
def test_padding_with_queries_gets_zeros(merges, device):
    """A graph's padded rows have as many queries as the others, of no context."""
    case = make_case([(2, 40), (2, 2), (2, 300), (2, 2)], torch.float16, device)
    expected = case.expected()
    expected[2:4] = expected[6:8] = 0
    case.metadata.seq_lens[1::2] = 0
    out = case.attend(divided(3, merges=merges))
    torch.testing.assert_close(out.float().cpu(), expected, atol=3e-3, rtol=3e-3)


@pytest.mark.parametrize("merges", [True, False])
def test_launches_leave_nothing_behind(merges, device):
    """Steps of other shapes between two of one shape: neither counts nor notes of old rows reach a later launch."""
    steps = [STEPS[name] for name in ("drafts", "decodes of unlike length", "padding", "drafts", "only padding")]
    for rows in [*steps, [(1, 200)], [(0, 0), (12, 12), (1, 200)]]:
        case = make_case(rows, torch.float32, device, SMALL)
        out = case.attend(divided(5, merges=merges, min_tiles=1))
        expected = case.expected()
        for row, (start, stop) in enumerate(itertools.pairwise(case.metadata.host_query_start_loc)):
            if stop - start > MAX_DECODE_QUERY_LEN:
                expected[start:stop] = UNWRITTEN
            torch.testing.assert_close(out[start:stop].cpu(), expected[start:stop], atol=2e-5, rtol=2e-5, msg=str(row))
        assert not workspace("decode_attention.arrived", (len(rows), 1), torch.int32, device).any()


# Rows that are the other kernel's.


def test_rows_with_more_queries_are_left_alone(device):
    rows = [(1, 100), (9, 9), (8, 60), (30, 200), (1, 1)]
    case = make_case(rows, torch.float32, device)
    out, expected = case.attend(divided(3)).cpu(), case.expected()
    expected[1:10] = expected[18:48] = UNWRITTEN
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    "rows",
    [[(1, 100), (9, 9), (8, 60), (0, 0), (30, 200), (1, 1)], [(20, 20), (9, 70)], [(8, 20), (1, 70)]],
    ids=["mixed", "chunks", "decodes"],
)
def test_every_row_of_a_step_is_somebodys(rows, device):
    assert_attends(make_case(rows, torch.float16, device, sliding_window=33), paged_attention)


def test_a_type_without_kernels_falls_to_the_reference(device):
    case = make_case([(1, 20), (3, 3)], torch.float64, device)
    torch.testing.assert_close(case.attend(paged_attention).float().cpu(), case.expected(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("block_size", [24, 512])
def test_chunks_in_blocks_that_no_tile_has_fall_to_the_reference(block_size, device, caplog):
    fall_back.cache_clear()
    heads = Heads(head_dim=256, block_size=block_size)
    case = make_case([(1, 30), (12, 40)], torch.float32, device, heads)
    assert_attends(case, paged_attention)
    assert f"chunks of prompts in blocks of {block_size} tokens" in caplog.text


def test_elements_of_a_query_that_lie_apart(device):
    case = make_case([(1, 20), (3, 30)], torch.float16, device)
    case.query = torch.stack([case.query, case.query + 1], dim=-1)[..., 0]
    assert_attends(case, paged_attention)


# The comparison notices what could be wrong.


def _without_cap(case: AttentionCase) -> None:
    case.soft_cap = None


def _with_other_scale(case: AttentionCase) -> None:
    case.scale *= 1.1


def _with_one_key_more(case: AttentionCase) -> None:
    case.sliding_window = 41


def _with_one_key_less(case: AttentionCase) -> None:
    case.sliding_window = 39


def _with_another_block(case: AttentionCase) -> None:
    case.metadata.block_tables[1, 3] = case.metadata.block_tables[1, 4]


def _one_token_earlier(case: AttentionCase) -> None:
    case.metadata.seq_lens[1] -= 1


@pytest.mark.parametrize(
    "perturb",
    [_without_cap, _with_other_scale, _with_one_key_more, _with_one_key_less, _with_another_block, _one_token_earlier],
)
def test_the_comparison_notices(perturb, dtype, device):
    case = make_case([(1, 70), (4, 75), (1, 9)], dtype, device, sliding_window=40, soft_cap=1.5)
    attend = divided(3)
    assert_attends(case, attend)
    changed = dataclasses.replace(case, metadata=dataclasses.replace(case.metadata))
    changed.metadata.seq_lens = case.metadata.seq_lens.clone()
    changed.metadata.block_tables = case.metadata.block_tables.clone()
    perturb(changed)
    with pytest.raises(AssertionError, match="not close"):
        torch.testing.assert_close(
            changed.attend(attend).float().cpu(), case.expected(), atol=2e-2, rtol=2e-2, equal_nan=True
        )


# The launch.

LLAMA = DecodeShape(num_rows=64, max_query_len=1, num_heads=32, num_kv_heads=8, head_dim=128, element_bytes=2)
A100 = dataclasses.replace(H200, capability=(8, 0), num_sms=108, shared_bytes=163 * 1024)


def test_an_h200_keeps_more_than_its_latency_on_the_way():
    config = decode_config(LLAMA, H200)
    assert (config.tile_n, config.num_stages, config.num_warps) == (64, 4, 4)
    assert config.num_programs * LLAMA.num_kv_heads == 264
    stage_bytes = 2 * config.tile_n * config.block_d * LLAMA.element_bytes
    assert (config.num_stages - 2) * stage_bytes >= 36 * 1024  # of one program, while it computes on a stage


@pytest.mark.parametrize("cache_bytes", [1, 2])
@pytest.mark.parametrize("traits", [H200, A100], ids=["h200", "a100"])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(32, 32), (32, 8), (28, 4), (16, 1)])
@pytest.mark.parametrize("max_query_len", [1, 3, 8])
def test_launches_fit(max_query_len, num_heads, num_kv_heads, head_dim, traits, cache_bytes):
    shape = DecodeShape(64, max_query_len, num_heads, num_kv_heads, head_dim, cache_bytes)
    config = decode_config(shape, traits)
    assert config.block_m >= max(16, max_query_len * shape.group)
    assert config.num_programs * num_kv_heads <= 2 * traits.num_sms
    assert config.tile_n in (16, 32, 64, 128)
    used_bytes = 2 * config.tile_n * config.block_d * cache_bytes * (config.num_stages - 1)
    used_bytes += 2 * config.block_m * (config.block_d + config.tile_n)
    assert config.num_stages >= 3
    assert used_bytes <= traits.shared_bytes // (2 if config.num_warps == 4 else 1)
    assert config.merge_m * config.merge_p * config.block_d <= 8192
    assert config.block_m % config.merge_m == 0


def test_a_launch_depends_on_the_batch_by_few_steps():
    """Each is a variant to compile before serving."""
    variants = {decode_config(dataclasses.replace(LLAMA, num_rows=rows), H200) for rows in range(1, 1025)}
    assert sorted(config.block_b for config in variants) == [128, 512, 2048]
    assert len({dataclasses.replace(config, block_b=0) for config in variants}) == 1


def test_products_are_as_large_as_the_compiler_wants_them():
    config = decode_config(dataclasses.replace(LLAMA, head_dim=8), H200)
    assert min(config.block_m, config.block_d, config.tile_n) >= 16


def test_measured_values_replace_the_heuristics():
    config = decode_config(LLAMA, H200, {"programs_per_sm": 3, "tile_n": 32, "num_warps": 8})
    assert (config.num_programs, config.tile_n, config.num_warps, config.block_b) == (49, 32, 8, 256)
    with pytest.raises(TypeError, match="tile_m"):
        decode_config(LLAMA, H200, {"tile_m": 1})
