# SPDX-License-Identifier: Apache-2.0
"""GPTQ loses no more than rounding to the nearest; AWQ and SmoothQuant leave the model what it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes.tiny_checkpoints import VOCAB_SIZE, TinyCheckpoints
from wavetrain_engine.models.model_config import ModelConfig
from wavetrain_engine.quantizer import awq, smoothquant
from wavetrain_engine.quantizer.expert_inputs import MixtureWatch
from wavetrain_engine.quantizer.folding import fold, spread
from wavetrain_engine.quantizer.gptq import gptq
from wavetrain_engine.quantizer.input_moments import InputMoments
from wavetrain_engine.quantizer.layer_runner import LayerRunner
from wavetrain_engine.quantizer.layer_source import LayerSource
from wavetrain_engine.quantizer.layer_structure import LayerStructure
from wavetrain_engine.quantizer.rounding import Grid, find_grid, round_to, round_weight

WINDOW = 24


def grid_of(bits: int, group_size: int, *, is_symmetric: bool = True) -> Grid:
    return Grid(
        num_bits=bits,
        is_float=False,
        is_symmetric=is_symmetric,
        group_size=group_size,
        block_rows=1,
        scale_dtype=torch.bfloat16,
    )


def random_moments(width: int, seed: int, *, tokens: int = 300) -> InputMoments:
    """Of inputs that depend on each other, and differ in size."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator) * torch.rand(width, generator=generator) ** 4
    moments = InputMoments(width)
    moments.add(torch.randn(tokens, width, generator=generator) @ mixing)
    return moments


def nearest(weight: torch.Tensor, grid: Grid, moments: InputMoments) -> torch.Tensor:
    return round_to(weight, grid, *find_grid(weight, grid, moments.second)).dequantize()


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([2, 4, 8]),
    st.sampled_from([16, 48, -1]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**16),
    st.sampled_from([1, 40, 300]),
)
def test_gptq_never_loses_more_than_rounding_to_the_nearest(bits, group, is_symmetric, has_act_order, seed, tokens):
    grid, width = grid_of(bits, group, is_symmetric=is_symmetric), 144
    weight = torch.randn(6, width, generator=torch.Generator().manual_seed(seed))
    moments = random_moments(width, seed, tokens=tokens)
    rounded = gptq(weight, grid, moments, has_act_order=has_act_order)
    assert rounded.values.min() >= grid.lowest
    assert rounded.values.max() <= grid.highest
    ours = moments.loss(rounded.dequantize() - weight)
    theirs = moments.loss(nearest(weight, grid, moments) - weight)
    assert bool((ours <= theirs * (1 + 1e-4) + 1e-3).all())


@pytest.mark.parametrize(("has_act_order", "share"), [(True, 0.5), (False, 0.8)])
def test_gptq_makes_up_for_much_of_what_rounding_loses(has_act_order, share):
    weight = torch.randn(16, 320, generator=torch.Generator().manual_seed(1))
    moments, grid = random_moments(320, 2), grid_of(4, 32)
    ours = moments.loss(gptq(weight, grid, moments, has_act_order=has_act_order).dequantize() - weight).sum()
    assert ours < share * moments.loss(nearest(weight, grid, moments) - weight).sum()


def one_by_one(weight: torch.Tensor, grid: Grid, moments: InputMoments, order: list[int]) -> torch.Tensor:
    """Optimal making up, input by input, with the inverse of what is left (Frantar et al. 2022, equation 2)."""
    scales, _ = find_grid(weight, grid, moments.second)
    scales = scales.repeat_interleave(grid.group_size, 1).double()
    left, rounded = weight.double().clone(), torch.empty_like(weight, dtype=torch.float64)
    matrix = moments.second.double()
    matrix += 0.01 * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=torch.float64)
    for done, column in enumerate(order):
        rest = order[done:]
        inverse = torch.linalg.inv(matrix[rest][:, rest])
        steps = (left[:, column] / scales[:, column]).round().clamp(grid.lowest, grid.highest)
        rounded[:, column] = steps * scales[:, column]
        error = (left[:, column] - rounded[:, column]) / inverse[0, 0]
        left[:, rest] -= error[:, None] * inverse[0]
    return rounded.float()


@pytest.mark.parametrize("has_act_order", [True, False])
def test_gptq_is_the_making_up_input_by_input(has_act_order):
    # Wider than a block of inputs, so that the lazy updates count.
    weight = torch.randn(8, 160, generator=torch.Generator().manual_seed(1))
    moments, grid = random_moments(160, 2, tokens=2000), grid_of(4, 32)
    order = moments.second.diagonal().argsort(descending=True) if has_act_order else torch.arange(160)
    ours = gptq(weight, grid, moments, has_act_order=has_act_order).dequantize()
    theirs = one_by_one(weight, grid, moments, order.tolist())
    is_made_up = moments.loss(theirs - weight) <= moments.loss(nearest(weight, grid, moments) - weight)
    assert is_made_up.sum() >= 4
    same = (ours - theirs)[is_made_up].abs() < 1e-4  # rounding of float32 may tip an element, and those after it
    assert same.float().mean() > 0.95


def test_gptq_rounds_to_the_nearest_where_it_knows_nothing():
    weight, grid = torch.randn(4, 32), grid_of(4, 16)
    for second in (torch.zeros(32, 32), torch.full((32, 32), torch.nan)):
        moments = InputMoments(32)
        moments.second = second
        rounded = gptq(weight, grid, moments, has_act_order=True)
        assert bool(rounded.dequantize().isfinite().all())


def test_inputs_that_are_always_zero_do_not_disturb_gptq():
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(5))
    x = torch.randn(100, 64, generator=torch.Generator().manual_seed(6))
    x[:, 10:20] = 0
    moments = InputMoments(64)
    moments.add(x)
    rounded = gptq(weight, grid_of(4, 16), moments, has_act_order=True).dequantize()
    assert bool(rounded.isfinite().all())
    assert moments.loss(rounded - weight).sum() < 0.1 * moments.loss(weight).sum()


def test_moments_give_the_error_of_the_outputs():
    generator = torch.Generator().manual_seed(0)
    x, errors = torch.randn(50, 12, generator=generator), torch.randn(3, 12, generator=generator)
    moments = InputMoments(12)
    moments.add(x[:20])
    moments.add(x[20:])
    torch.testing.assert_close(moments.loss(errors), (x @ errors.t()).square().sum(0))
    factors = torch.rand(12, generator=generator) + 0.5
    moments.rescale(factors)
    torch.testing.assert_close(moments.loss(errors), ((x * factors) @ errors.t()).square().sum(0))
    torch.testing.assert_close(moments.largest, (x * factors).abs().amax(0))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoints:
    return TinyCheckpoints(tmp_path_factory.mktemp("checkpoints"))


class Layer:
    """The first layer of a tiny model, and some text's hidden states before it."""

    def __init__(self, directory: Path, index: int = 0) -> None:
        config = ModelConfig.load(directory)
        self.source = LayerSource(directory, config, WINDOW)
        self.index = index
        self.tensors = self.source.read_layer(index)
        self.structure = LayerStructure.of(self.source.shape(index), config)
        ids = torch.randint(VOCAB_SIZE, (6, WINDOW), generator=torch.Generator().manual_seed(7))
        with torch.inference_mode():
            self.hidden = torch.stack([self.source.ends().embed_tokens(row) for row in ids])
        self.moments = {item.module: InputMoments(item.in_features) for item in self.structure.inputs}
        self.mixture = None if self.structure.mixture is None else MixtureWatch(self.structure.mixture, config)
        watched = {f"layers.0.{name}": item.add for name, item in self.moments.items()}
        if self.mixture is not None:
            watched[f"layers.0.{self.mixture.mixture.module}"] = self.mixture.add
        self.output = self.run(watched)

    @torch.inference_mode()
    def run(self, watched=None) -> torch.Tensor:
        found: list[torch.Tensor] = []
        stage = self.source.stage(self.source.build_layer(self.index, self.tensors))
        LayerRunner(WINDOW).run(stage, self.hidden, lambda _, output: found.append(output.clone()), watched=watched)
        return torch.cat(found)

    def fold(self, scales_of) -> int:
        """Folds all inputs, and returns how many were scaled."""
        count = 0
        for shared in self.structure.inputs:
            moments = self.moments[shared.module]
            scales = scales_of(self.tensors, shared, moments)
            if scales is not None:
                fold(self.tensors, shared, scales, [moments], self.source.dtype)
                count += 1
        if self.mixture is not None:
            self.mixture.route(self.tensors[f"{self.mixture.mixture.shared.unquantized[0]}.weight"])
            shared, factors = self.mixture.moments(), None
            scales = scales_of(self.tensors, self.mixture.mixture.shared, shared)
            if scales is not None:
                factors = fold(self.tensors, self.mixture.mixture.shared, scales, [shared], self.source.dtype)
                count += 1
            for number, expert in enumerate(self.mixture.mixture.experts):
                moments = self.mixture.down_moments(number, self.tensors, factors)
                scales = scales_of(self.tensors, expert.down, moments)
                if scales is not None:
                    fold(self.tensors, expert.down, scales, [moments], self.source.dtype)
        return count


FAMILIES = ["llama-bias", "mistral", "qwen2", "qwen3", "gemma2", "mixtral", "qwen3-moe"]


def smooth(tensors, shared, moments):
    return smoothquant.smoothing_scales(tensors, shared, moments, 0.6)


def grow(tensors, shared, moments):
    return awq.search_scales(tensors, shared, grid_of(2, 8), moments)


@torch.inference_mode()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scales_of", [smooth, grow], ids=["smoothquant", "awq"])
def test_scales_that_are_folded_change_nothing(checkpoints: TinyCheckpoints, family, scales_of):
    layer = Layer(checkpoints.get(family))
    before = {name: tensor.clone() for name, tensor in layer.tensors.items()}
    num_scaled = layer.fold(scales_of)
    assert num_scaled > 0
    assert any(not torch.equal(before[name], tensor) for name, tensor in layer.tensors.items())
    scale = layer.output.abs().max()
    torch.testing.assert_close(layer.run(), layer.output, atol=float(2e-5 * scale), rtol=0)


@torch.inference_mode()
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_moments_that_scales_leave_are_those_of_the_scaled_inputs(checkpoints: TinyCheckpoints, family):
    layer = Layer(checkpoints.get(family))
    layer.fold(smooth)
    seen = {item.module: InputMoments(item.in_features) for item in layer.structure.inputs}
    layer.run({f"layers.0.{name}": item.add for name, item in seen.items()})
    for name, moments in seen.items():
        torch.testing.assert_close(layer.moments[name].second, moments.second, rtol=1e-3, atol=1e-2)


@torch.inference_mode()
def test_a_norm_in_bfloat16_takes_only_scales_that_it_can_hold(checkpoints: TinyCheckpoints):
    layer = Layer(checkpoints.get("llama", dtype=torch.bfloat16))
    shared = layer.structure.inputs[0]
    before = layer.tensors["input_layernorm.weight"].clone()
    scales = smooth(layer.tensors, shared, layer.moments[shared.module])
    factors = fold(layer.tensors, shared, scales, [], torch.bfloat16)
    after = layer.tensors["input_layernorm.weight"]
    assert torch.equal(after.to(torch.bfloat16).float(), after)
    torch.testing.assert_close(after * factors, before, rtol=1e-6, atol=0)


def test_awq_chooses_scales_that_lose_less_than_none(checkpoints: TinyCheckpoints):
    layer, grid, num_chosen = Layer(checkpoints.get("llama")), grid_of(4, 32), 0
    for shared in layer.structure.inputs:
        moments = layer.moments[shared.module]
        factors = torch.ones(shared.in_features)
        factors[:2] = 30  # inputs that matter more than others
        moments.rescale(factors)
        scales = awq.search_scales(layer.tensors, shared, grid, moments)
        if scales is None:
            continue
        num_chosen += 1
        factors, ours, plain = spread(scales, shared.source), 0.0, 0.0
        scaled_moments = moments.second / factors / factors[:, None]
        for name in shared.matrices:
            weight = layer.tensors[f"{name}.weight"]
            scaled = round_weight(weight * factors, grid, scaled_moments).dequantize() / factors
            ours += moments.loss(scaled - weight).sum().item()
            plain += moments.loss(round_weight(weight, grid, moments.second).dequantize() - weight).sum().item()
        assert ours < plain
    assert num_chosen


def test_the_structure_of_a_layer_is_that_of_its_checkpoint(checkpoints: TinyCheckpoints):
    for family in FAMILIES:
        directory = checkpoints.get(family)
        config = ModelConfig.load(directory)
        source = LayerSource(directory, config, WINDOW)
        structure = LayerStructure.of(source.shape(0), config)
        shapes = {name: tuple(tensor.shape) for name, tensor in source.read_layer(0).items() if tensor.dim() == 2}
        routers = {f"{name}.weight" for name in structure.routers()}
        assert {f"{name}.weight": sizes for name, sizes in structure.matrices().items()} == {
            name: shape for name, shape in shapes.items() if name not in routers
        }
        assert routers <= set(shapes)
