# SPDX-License-Identifier: Apache-2.0
"""Mixtures of quantized experts on the GPU, or interpreted, against the reference."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from fakes.quantized_weights import every_scheme, random_quantized
from wavetrain_kernels.gpu import moe_config, quantized_experts, quantized_moe, weight_only_config
from wavetrain_kernels.gpu.kernels import GPU
from wavetrain_kernels.gpu.launch import A100, H200
from wavetrain_kernels.ops import QuantizedWeight
from wavetrain_kernels.reference.kernels import REFERENCE

# The interpreter turns arrays of one element into loop bounds, which NumPy frowns upon (Triton 3.6).
pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]

# The interpreter's matrix products are wrong in bfloat16 (Triton 3.6).
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float16
# Relative error of a whole result; gated units and terms are rounded to 16 bits.
TOLERANCE = {torch.float16: 3e-3, torch.bfloat16: 1.5e-2}
SCHEMES = sorted(every_scheme(256))


def finer(weight: QuantizedWeight) -> QuantizedWeight:
    """The weight without the rounding of its inputs, which these kernels leave out."""
    scheme = dataclasses.replace(weight.scheme, inputs=None, input_group_size=None, has_input_scale=False)
    return dataclasses.replace(weight, scheme=scheme, input_scale=None)


def dynamic(weight: QuantizedWeight) -> QuantizedWeight:
    """The weight with scales of inputs found for each row, as these kernels have it for all experts."""
    scheme = dataclasses.replace(weight.scheme, has_input_scale=False)
    return dataclasses.replace(weight, scheme=scheme, input_scale=None)


class Layer:
    """Random experts, and tokens for them. A projection whose scheme is `dense` is not quantized."""

    def __init__(
        self,
        size: tuple[int, int, int, int, int],
        gate_up: str,
        down: str,
        device: torch.device,
        *,
        is_rounded: bool = False,
    ) -> None:
        num_tokens, num_experts, top_k, hidden, units = size
        self._is_rounded = is_rounded
        generator = torch.Generator().manual_seed(num_tokens)
        self.x = torch.randn(num_tokens, hidden, generator=generator).to(device, DTYPE)
        logits = torch.randn(num_tokens, num_experts, generator=generator).to(device) * 2
        self.weights = torch.empty(num_tokens, top_k, device=device)
        self.expert_ids = torch.empty(num_tokens, top_k, dtype=torch.int32, device=device)
        REFERENCE.route_experts(self.weights, self.expert_ids, logits, True)
        self.gate_up = self._make(gate_up, num_experts, 2 * units, hidden)
        self.down = self._make(down, num_experts, hidden, units)

    def _make(self, name: str, num_experts: int, rows: int, columns: int) -> list[QuantizedWeight] | Tensor:
        device = self.x.device
        if name == "dense":
            return (torch.randn(num_experts, rows, columns) / columns**0.5).to(device, DTYPE)
        scheme = every_scheme(columns)[name]
        made = [random_quantized(scheme, rows, columns, seed=seed, device=str(device)) for seed in range(num_experts)]
        return [dynamic(weight) if self._is_rounded else finer(weight) for weight in made]

    def run(self, kernels, activation: str = "silu") -> Tensor:
        out = torch.full(self.x.shape, float("nan"), dtype=DTYPE, device=self.x.device)
        num_units = self.gate_up[0].shape[0] // 2 if isinstance(self.gate_up, Tensor) else None
        num_units = num_units or self.gate_up[0].out_features // 2
        packed = [pack(kernels, part, is_gated=index == 0) for index, part in enumerate((self.gate_up, self.down))]
        kernels.fused_moe(out, self.x, *packed, self.weights, self.expert_ids, num_units, activation)
        return out

    def check(self, activation: str = "silu") -> None:
        result, expected = self.run(GPU, activation).double(), self.run(REFERENCE, activation).double()
        assert result.isfinite().all()
        error = (result - expected).norm() / expected.norm().clamp_min(1e-9)
        assert error <= TOLERANCE[DTYPE], error


def pack(kernels, weights: list[QuantizedWeight] | Tensor, *, is_gated: bool):
    if isinstance(weights, Tensor):
        return weights
    packed = kernels.empty_quantized_experts(len(weights), weights[0], DTYPE, is_gated)
    for expert, weight in enumerate(weights):
        kernels.pack_quantized_expert(packed, expert, weight)
    return packed


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("size", [(1, 4, 2, 256, 128), (7, 5, 3, 200, 72)], ids=str)
def test_experts_equal_the_reference(name, size, device):
    Layer(size, name, name, device).check()


@pytest.mark.parametrize("size", [(0, 4, 2, 64, 32), (1, 1, 1, 32, 16), (3, 20, 4, 96, 40)], ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_sizes_and_activations(size, activation, device):
    Layer(size, "w4a16-g32", "w8a16", device).check(activation)


@pytest.mark.parametrize(
    ("gate_up", "down"), [("dense", "w4a16-g32"), ("w8a16", "dense"), ("nf4-g64", "dense"), ("fp8-block", "w4a16-g32")]
)
def test_projections_of_different_schemes(gate_up, down, device):
    Layer((40, 2, 2, 128, 64), gate_up, down, device).check()


@pytest.mark.parametrize("num_tokens", [20, 60, 150])
@pytest.mark.parametrize("name", ["w4a16-g64-asym", "nf4-g64"])
def test_tiles_of_many_rows_equal_the_reference(name, num_tokens, device):
    """Two experts: on average 20, 60 and 150 rows each."""
    Layer((num_tokens, 2, 2, 72, 40), name, name, device).check()


@pytest.mark.parametrize(("num_tokens", "hidden", "units"), [(40, 256, 128), (150, 200, 72)])
@pytest.mark.parametrize("name", ["w8a8", "w8a8-static", "fp8", "fp8-block"])
def test_many_rows_of_8_bits_equal_the_reference(name, num_tokens, hidden, units, device, monkeypatch):
    """Rounded as the scheme says, with scales of their own; a sum in another order may round to the next step."""
    if name == "fp8-block" and units % 128:
        hidden, units = 256, 128  # gates of the same blocks as what they gate
    monkeypatch.setattr(quantized_moe, "multiply_rounded", seen := Calls(quantized_moe.multiply_rounded))
    layer = Layer((num_tokens, 2, 2, hidden, units), name, name, device, is_rounded=True)
    result, expected = layer.run(GPU).double(), layer.run(REFERENCE).double()
    assert result.isfinite().all()
    assert (result - expected).norm() <= (0.02 if name.startswith("w8") else 0.04) * expected.norm()
    assert seen.count == 2


class Calls:
    """Counts calls of a function."""

    def __init__(self, function) -> None:
        self._function = function
        self.count = 0

    def __call__(self, *arguments, **options) -> None:
        self.count += 1
        self._function(*arguments, **options)


def test_one_expert_may_get_all_tokens_and_others_none(device):
    layer = Layer((37, 9, 2, 64, 24), "w4a16-g32", "w4a16-g32", device)
    for ids in ([3, 3], [8, 0], [-1, 4], [9, 2**31 - 1], [-(2**31), -1]):
        layer.expert_ids[:] = torch.tensor(ids, device=device)
        layer.check()
    assert not layer.run(GPU).any()


def test_bad_tokens_stay_alone(device):
    layer = Layer((20, 4, 2, 64, 24), "w4a16-g32", "w8a16", device)
    expected = layer.run(GPU)
    layer.x[3, 7], layer.weights[11] = float("nan"), float("nan")
    result = layer.run(GPU)
    assert result[3].isnan().all()
    assert result[11].isnan().all()
    others = [row for row in range(20) if row not in (3, 11)]
    assert torch.equal(result[others], expected[others])


def test_inputs_that_lie_apart(device):
    layer = Layer((9, 4, 2, 64, 24), "w4a16-g32", "w4a16-g32", device)
    x, expected = layer.x, layer.run(GPU)
    for columns in (slice(10, 74), slice(0, 128, 2)):
        layer.x = torch.zeros(9, 140, dtype=DTYPE, device=device)[:, columns]
        layer.x.copy_(x)
        assert torch.equal(layer.run(GPU), expected)


def test_single_experts_may_lack_offsets_or_an_order(device):
    """Files leave out those that change nothing."""
    layer = Layer((9, 3, 2, 256, 128), "w4a16-g128-act-order", "w4a16-g64-asym", device)
    for weights in (layer.gate_up, layer.down):
        scheme = dataclasses.replace(weights[0].scheme, has_offsets=False, is_reordered=False)
        weights[1] = dataclasses.replace(weights[1], scheme=scheme, offsets=None, column_order=None)
    for _ in range(2):
        layer.check()
        layer.gate_up, layer.down = (weights[1:] + weights[:1] for weights in (layer.gate_up, layer.down))


def test_what_no_kernel_takes_has_no_place(device):
    weight = random_quantized(every_scheme(64)["w4a16-g32"], 8, 64, device=str(device))
    assert quantized_experts.empty_quantized_experts(4, weight, torch.float32, False) is None


def test_tiles_have_no_more_rows_than_registers_hold(monkeypatch, device):
    stacks = {
        name: pack(GPU, [random_quantized(every_scheme(64)[name], 8, 64, device=str(device))], is_gated=False)
        for name in ("w4a16-g32", "nf4-g64")
    }
    monkeypatch.setattr(quantized_moe, "device_traits", lambda _device: H200)
    dense = torch.zeros(1, 8, 64)
    assert quantized_moe.rows_at_most(dense, dense) == moe_config.MOST_ROWS
    assert quantized_moe.rows_at_most(stacks["w4a16-g32"], dense) == moe_config.MOST_ROWS
    assert quantized_moe.rows_at_most(stacks["w4a16-g32"], stacks["nf4-g64"]) == 32
    monkeypatch.setattr(quantized_moe, "device_traits", lambda _device: A100)
    assert quantized_moe.rows_at_most(stacks["w4a16-g32"]) == 64
    for block_m in (16, 32, 64):
        config = weight_only_config.chosen_config(block_m, stacks["w4a16-g32"].shape, A100)
        assert config.block_t == block_m
