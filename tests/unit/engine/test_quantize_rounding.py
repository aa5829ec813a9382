# SPDX-License-Identifier: Apache-2.0
"""Grids, rounding, and the packed form, against their definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wavetrain_engine.errors import ConfigError
from wavetrain_engine.quantizer.compressed_tensors import pack
from wavetrain_engine.quantizer.input_moments import InputMoments
from wavetrain_engine.quantizer.recipe import METHODS, PER_CHANNEL, SCHEMES, Recipe, choose_group_size
from wavetrain_engine.quantizer.rounding import Grid, RoundedWeight, find_grid, round_to, round_weight


def grid_of(bits: int = 4, group_size: int = 16, **values) -> Grid:
    defaults = {"is_float": False, "is_symmetric": True, "block_rows": 1, "scale_dtype": torch.bfloat16}
    return Grid(num_bits=bits, group_size=group_size, **(defaults | values))


def random_weight(rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator)


def definition(rounded: RoundedWeight) -> torch.Tensor:
    grid, (rows, columns) = rounded.grid, rounded.values.shape
    width = columns if grid.group_size == PER_CHANNEL else grid.group_size
    dense = torch.zeros(rows, columns)
    for row in range(rows):
        for column in range(columns):
            at = row // grid.block_rows, column // width
            zero = 0 if rounded.zero_points is None else float(rounded.zero_points[at])
            dense[row, column] = (float(rounded.values[row, column]) - zero) * float(rounded.scales[at])
    return dense


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([2, 4, 8]),
    st.sampled_from([16, 32, PER_CHANNEL]),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(1, 5),
    st.integers(0, 2**16),
)
def test_integers_are_on_their_grid_and_mean_what_is_defined(bits, group_size, is_symmetric, dtype, rows, seed):
    grid = grid_of(bits, group_size, is_symmetric=is_symmetric, scale_dtype=dtype)
    weight = random_weight(rows, 64, seed)
    rounded = round_weight(weight, grid)
    assert rounded.scales.dtype == dtype
    assert (rounded.zero_points is None) == is_symmetric
    assert rounded.values.min() >= grid.lowest
    assert rounded.values.max() <= grid.highest
    assert torch.equal(rounded.dequantize(), definition(rounded))


@pytest.mark.parametrize("shape", [(3, 40), (128, 128), (130, 300), (5, 129)])
def test_blocks_of_fp8_may_be_cut_off_at_the_edge(shape):
    grid = grid_of(8, 128, is_float=True, block_rows=128, scale_dtype=torch.float32)
    weight = random_weight(*shape, seed=1)
    rounded = round_weight(weight, grid)
    assert rounded.values.dtype == torch.float8_e4m3fn
    assert rounded.scales.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    assert torch.equal(rounded.dequantize(), definition(rounded))
    # Half a step of three bits, and what is too small for a normal number.
    limit = weight.abs() * 2**-4 + rounded.scales.max() * 2**-9
    assert bool(((rounded.dequantize() - weight).abs() <= limit).all())


def test_the_search_never_loses_to_the_whole_range():
    weight = random_weight(32, 64, seed=3)
    weight[:, 5] *= 8  # outliers that a smaller range cuts off
    for moments in (None, random_moments(64, 4).second):
        grid = grid_of(scale_dtype=torch.float32)
        scales, _ = find_grid(weight, grid, moments)
        groups = weight.unflatten(1, (-1, 16))
        whole = groups.abs().amax(-1) / 7.5
        found, plain = (
            round_to(weight, grid, item, None).dequantize().sub(weight).unflatten(1, (-1, 16))
            for item in (scales, whole)
        )
        if moments is None:
            losses = [item.square().sum(-1) for item in (found, plain)]
        else:
            blocks = torch.stack([moments[at : at + 16, at : at + 16] for at in range(0, 64, 16)])
            losses = [torch.einsum("ngi,gij,ngj->ng", item, blocks, item) for item in (found, plain)]
        assert bool((losses[0] <= losses[1] * (1 + 1e-4) + 1e-6).all())
        assert losses[0].sum() < 0.95 * losses[1].sum()


def random_moments(width: int, seed: int) -> InputMoments:
    generator = torch.Generator().manual_seed(seed)
    moments = InputMoments(width)
    mixing = torch.randn(width, width, generator=generator)
    moments.add(torch.randn(200, width, generator=generator) @ mixing)
    return moments


def test_zeros_and_tiny_numbers_have_sound_scales():
    weight = torch.zeros(2, 32)
    weight[1] = 1e-30
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for is_float in (False, True):
            grid = grid_of(8, PER_CHANNEL, is_float=is_float, scale_dtype=dtype)
            rounded = round_weight(weight, grid)
            assert bool((rounded.scales > 0).all())
            assert torch.equal(rounded.dequantize()[0], weight[0])
            assert bool(rounded.dequantize().isfinite().all())


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([2, 4, 8]), st.integers(1, 4), st.integers(1, 50), st.integers(0, 2**16))
def test_words_hold_the_bits_of_their_integers_lowest_first(bits, rows, columns, seed):
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(low, high + 1, (rows, columns), dtype=torch.int8, generator=generator)
    packed = pack(values, bits)
    assert packed.shape == (rows, -(-columns * bits // 32))
    for row in range(rows):
        number = sum((int(value) - low) << (bits * at) for at, value in enumerate(values[row]))
        words = sum((int(word) & 0xFFFFFFFF) << (32 * at) for at, word in enumerate(packed[row]))
        assert words == number


def test_methods_and_schemes_that_do_not_go_together_say_what_does():
    for name, scheme in SCHEMES.items():
        for method in METHODS:
            if method in scheme.methods:
                assert Recipe(scheme=name, method=method).weight_scheme is scheme
            else:
                with pytest.raises(ConfigError, match=f"{name} goes with {', '.join(scheme.methods)}"):
                    Recipe(scheme=name, method=method)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"group_size": 40}, "multiple of 16"),
        ({"group_size": 0}, "multiple of 16"),
        ({"smoothing": 1.5}, "from 0 to 1"),
        ({"num_windows": 0}, "--calibration-windows 0"),
        ({"window_tokens": 8}, "at least 16"),
        ({"num_report_windows": -1}, "--report-windows -1"),
        ({"scheme": "w8a8", "group_size": 32}, "no groups to choose"),
        ({"scheme": "fp8", "is_symmetric": False}, "no zero points"),
        ({"scheme": "w3a16"}, "one of w4a16"),
        ({"method": "best"}, "one of rtn"),
    ],
)
def test_values_out_of_range_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        Recipe(**({"scheme": "w4a16", "method": "rtn"} | values))


def test_the_group_size_is_the_largest_that_divides_everything():
    recipe = Recipe(scheme="w4a16", method="rtn")
    assert choose_group_size(recipe, {"a": 4096, "b": 14336}) == 128
    assert choose_group_size(recipe, {"a": 4096, "b": 96}) == 32
    assert choose_group_size(recipe, {"a": 4096, "b": 40}) == PER_CHANNEL
    assert choose_group_size(Recipe(scheme="fp8-block", method="rtn"), {"a": 40}) == 128
    with pytest.raises(ConfigError, match="wants blocks of 128 inputs, and b has 200"):
        choose_group_size(Recipe(scheme="fp8-block", method="rtn"), {"a": 256, "b": 200})
    asked = Recipe(scheme="w4a16", method="rtn", group_size=64)
    assert choose_group_size(asked, {"a": 128}) == 64
    with pytest.raises(ConfigError, match="does not divide the 96 inputs of b; these fit: 32, 16, -1"):
        choose_group_size(asked, {"a": 128, "b": 96})
