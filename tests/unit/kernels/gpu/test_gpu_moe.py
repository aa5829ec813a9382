# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts on the GPU, or interpreted, against the reference: sizes and choices of experts of all kinds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wavetrain_kernels.gpu import launch, moe, moe_config, moe_routing
from wavetrain_kernels.gpu.workspace import workspace
from wavetrain_kernels.reference import moe as reference

# The interpreter turns arrays of one element into loop bounds, which NumPy frowns upon (Triton 3.6).
pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]

# Relative error of a whole result; gated units and terms are rounded to dtype.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def stale_scratch(device: torch.device) -> None:
    """What is in scratch memory before it is written must not matter."""
    for name in ("moe_pairs", "moe_tiles", "moe_counts"):
        workspace(name, (1 << 12,), torch.int32, device).fill_(-(2**31))


def route(functions, logits: Tensor, top_k: int, *, renormalize: bool) -> tuple[Tensor, Tensor]:
    weights = torch.full((logits.shape[0], top_k), -7.0, device=logits.device)
    expert_ids = torch.full_like(weights, -7, dtype=torch.int32)
    functions.route_experts(weights, expert_ids, logits, renormalize)
    return weights, expert_ids


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k"), [(0, 4, 2), (1, 1, 1), (1, 8, 2), (5, 60, 4), (9, 128, 8), (70, 5, 5)]
)
@pytest.mark.parametrize("renormalize", [True, False])
def test_routing_equals_the_reference(num_tokens, num_experts, top_k, renormalize, device):
    logits = (torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(top_k)) * 3).to(device)
    for given_logits in (logits, logits.round(), torch.cat((logits, logits), 1)[:, :num_experts]):
        weights, expert_ids = route(moe_routing, given_logits, top_k, renormalize=renormalize)
        wanted_weights, wanted_ids = route(reference, given_logits, top_k, renormalize=renormalize)
        assert torch.equal(expert_ids, wanted_ids)
        torch.testing.assert_close(weights, wanted_weights, rtol=1e-5, atol=1e-7)


def test_routing_of_rows_that_are_no_distribution(device):
    inf, nan = float("inf"), float("nan")
    rows = [[0.0, nan, 1.0], [inf, 0.0, 1.0], [-inf] * 3, [nan] * 3, [2.0, -inf, -inf], [-0.0, 0.0, -1.0]]
    weights, expert_ids = route(moe_routing, torch.tensor(rows, device=device), 2, renormalize=True)
    assert weights[:4].isnan().all()
    assert expert_ids.tolist() == [[0, 1]] * 6
    assert weights[4:].tolist() == [[1.0, 0.0], [0.5, 0.5]]


@settings(max_examples=30, deadline=None)
@given(
    num_experts=st.sampled_from([1, 3, 8, 40]),
    expert_ids=st.lists(st.integers(-2, 41), min_size=1, max_size=200),
    top_k=st.integers(1, 3),
)
def test_the_table_has_every_pair_once(num_experts, expert_ids, top_k):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    expert_ids += [-1] * (-len(expert_ids) % top_k)
    ids = torch.tensor(expert_ids, dtype=torch.int32, device=device).view(-1, top_k)
    found = moe_routing.sort_pairs(ids, num_experts)
    pairs, seen = found.pairs.tolist(), []
    for expert, first, end in found.tiles.T.tolist():
        if expert < 0:
            continue
        rows = range(first, min(first + found.block_m, end))
        assert len(rows) > 0
        assert [expert_ids[pairs[row]] for row in rows] == [expert] * len(rows)
        seen += [pairs[row] for row in rows]
    wanted = [pair for pair, expert in enumerate(expert_ids) if 0 <= expert < num_experts]
    assert sorted(seen) == wanted
    # By expert, then by pair, whatever ran first.
    assert seen == sorted(wanted, key=lambda pair: (expert_ids[pair], pair))


def test_there_are_never_more_tiles_than_the_grid_has():
    for num_pairs in (1, 2, 7, 64, 100):
        for num_experts in (1, 2, 5, 128):
            for block_m in (16, 64):
                used = min(num_experts, num_pairs)  # the worst: all but one expert have one pair, or a tile and one
                alone = used - 1 + -(-(num_pairs - used + 1) // block_m)
                most = moe_config.most_tiles(num_pairs, num_experts, block_m)
                assert alone <= most <= num_pairs


class Layer:
    """Random experts, and tokens for them."""

    def __init__(
        self, num_tokens: int, num_experts: int, top_k: int, hidden: int, units: int, dtype: torch.dtype, device
    ) -> None:
        generator = torch.Generator().manual_seed(num_tokens)
        x = torch.randn(num_tokens, hidden, generator=generator)
        gate_up = torch.randn(num_experts, 2 * units, hidden, generator=generator) / hidden**0.5
        down = torch.randn(num_experts, hidden, units, generator=generator) / units**0.5
        logits = torch.randn(num_tokens, num_experts, generator=generator).to(device) * 2
        self.x, self.gate_up, self.down = (tensor.to(device, dtype) for tensor in (x, gate_up, down))
        self.weights, self.expert_ids = route(reference, logits, top_k, renormalize=False)

    def run(self, functions, activation: str = "silu") -> Tensor:
        out = torch.full(self.x.shape, float("nan"), dtype=self.x.dtype, device=self.x.device)
        arguments = self.gate_up, self.down, self.weights, self.expert_ids, self.down.shape[2], activation
        functions.fused_moe(out, self.x, *arguments)
        return out

    def check(self, activation: str = "silu") -> None:
        result, expected = self.run(moe, activation).double(), self.run(reference, activation).double()
        error = (result - expected).norm() / expected.norm().clamp_min(1e-9)
        assert error <= TOLERANCES[self.x.dtype], error


@pytest.mark.parametrize(
    "size",
    [
        (0, 4, 2, 16, 16),
        (1, 1, 1, 16, 16),
        (1, 8, 2, 64, 32),
        (3, 20, 4, 40, 24),
        (7, 5, 3, 33, 17),  # sizes that no tile divides
        (40, 5, 2, 150, 72),
    ],
    ids=str,
)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_experts_equal_the_reference(size, activation, dtype, device):
    Layer(*size, dtype, device).check(activation)


@pytest.mark.parametrize("num_tokens", [20, 60, 150])
def test_tiles_of_many_rows_equal_the_reference(num_tokens, dtype, device):
    """Two experts: on average 20, 60 and 150 rows each."""
    layer = Layer(num_tokens, 2, 2, 70, 40, dtype, device)
    assert moe_config.rows_per_tile(2 * num_tokens, 2) == {20: 64, 60: 64, 150: 128}[num_tokens]
    layer.check()


def test_one_expert_may_get_all_tokens_and_others_none(dtype, device):
    layer = Layer(37, 9, 2, 40, 24, dtype, device)
    for ids in ([3, 3], [8, 0], [-1, 4], [9, 2**31 - 1], [-(2**31), -1]):
        layer.expert_ids[:] = torch.tensor(ids, device=device)
        layer.check()
    assert not layer.run(moe).any()


def test_bad_tokens_stay_alone(dtype, device):
    layer = Layer(20, 4, 2, 40, 24, dtype, device)
    expected = layer.run(moe)
    layer.x[3, 7], layer.weights[11] = float("nan"), float("nan")
    result = layer.run(moe)
    assert result[3].isnan().all()
    assert result[11].isnan().all()
    others = [row for row in range(20) if row not in (3, 11)]
    assert torch.equal(result[others], expected[others])


def test_inputs_that_lie_apart(dtype, device):
    layer = Layer(9, 4, 2, 40, 24, dtype, device)
    x, expected = layer.x, layer.run(moe)
    for columns in (slice(10, 50), slice(0, 80, 2)):
        layer.x = torch.zeros(9, 99, dtype=dtype, device=device)[:, columns]
        layer.x.copy_(x)
        assert torch.equal(layer.run(moe), expected)
    layer.weights, layer.expert_ids = (tensor.T.contiguous().T for tensor in (layer.weights, layer.expert_ids))
    assert torch.equal(layer.run(moe), expected)


def test_other_types_go_to_the_reference(device, caplog):
    layer = Layer(5, 4, 2, 16, 16, torch.float64, device)
    assert torch.equal(layer.run(moe), layer.run(reference))
    assert "fused_moe: no GPU kernel for torch.float64" in caplog.text


@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (8, 2), (60, 6), (64, 3), (128, 8), (300, 5)])
def test_steps_that_double_meet_every_variant(num_experts, top_k):
    """Warm-up runs those, and the largest; nothing may be left to compile after it."""

    def variant(num_tokens: int) -> tuple[int, int, bool]:
        num_pairs = num_tokens * top_k
        chunk = moe_config.sort_chunk(num_pairs, num_experts)
        return moe_config.rows_per_tile(num_pairs, num_experts), chunk, num_pairs <= chunk

    limit = 5000
    warm = {variant(num_tokens) for num_tokens in (*(1 << exponent for exponent in range(13)), limit)}
    assert {variant(num_tokens) for num_tokens in range(1, limit + 1)} == warm


@pytest.mark.parametrize("capability", [(8, 0), (12, 0)])
def test_gpus_without_warp_group_products_get_smaller_tiles(capability, monkeypatch, device):
    assert moe_config.gate_up_config(128, 2048, 768).block_n == 128
    traits = replace(launch.H200, capability=capability)
    monkeypatch.setattr(moe_config, "device_traits", lambda _device: traits)
    assert moe_config.gate_up_config(128, 2048, 768, device) == moe_config.BEFORE_HOPPER


def test_measured_configurations_take_the_place_of_the_heuristics(monkeypatch):
    measured = {
        "moe_rows": {"block_m": 64},
        "moe_gate_up": {"block_n": 32, "block_k": 32, "group_m": 4, "num_warps": 2, "num_stages": 5},
        "moe_down": {"block_n": 16, "block_k": 16, "group_m": 2, "num_warps": 1, "num_stages": 2},
    }
    asked = []
    monkeypatch.setattr(moe_config, "tuned", lambda name, key, _device: asked.append((name, key)) or measured[name])
    assert moe_config.rows_per_tile(300, 128) == 64
    assert moe_config.gate_up_config(64, 2048, 768) == moe_config.ProductConfig(**measured["moe_gate_up"])
    assert moe_config.down_config(64, 2048, 768) == moe_config.ProductConfig(**measured["moe_down"])
    assert asked == [("moe_rows", (128, 4)), ("moe_gate_up", (64, 2048, 768)), ("moe_down", (64, 2048, 768))]
