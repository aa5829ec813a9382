# SPDX-License-Identifier: Apache-2.0
"""Products with quantized weights against the reference: every scheme, every kernel that a number of rows leads to."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from fakes.quantized_weights import every_scheme, random_quantized
from wavetrain_kernels.gpu import (
    quantized_linear,
    quantized_packing,
    quantized_product,
    quantized_rows,
    weight_only_config,
)
from wavetrain_kernels.gpu.kernels import GPU
from wavetrain_kernels.gpu.launch import A100, H200, DeviceTraits
from wavetrain_kernels.gpu.quantized_packing import pack
from wavetrain_kernels.gpu.weight_only_config import DENSE_FROM
from wavetrain_kernels.ops import QuantizationScheme, QuantizedWeight
from wavetrain_kernels.reference.kernels import REFERENCE

# NumPy's, interpreting: 1 / (1 + inf) is right, but said aloud, and so is what makes no number of no number.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]

# The interpreter's matrix products are wrong in bfloat16 (Triton 3.6).
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float16
# Relative to the norm of the result: what rounding to 16 bits costs.
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3}
SCHEMES = sorted(every_scheme(256))
ROUNDED = ["w8a8", "w8a8-static", "fp8", "fp8-static", "fp8-block"]


def product(
    weight: QuantizedWeight, x: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> tuple[Tensor, Tensor]:
    """Returns what the kernels make of it, with what lies around in memory checked, and what the reference does."""
    size = weight.out_features // (2 if activation else 1)
    memory = torch.full((x.shape[0] * size + 64,), float("nan"), dtype=x.dtype, device=x.device)
    out, expected = memory[: x.shape[0] * size].view(-1, size), x.new_empty(x.shape[0], size)
    packed = pack(weight, x.dtype, activation is not None)
    if activation is None:
        GPU.quantized_linear(out, x, packed, bias)
        REFERENCE.quantized_linear(expected, x, weight, bias)
    else:
        GPU.quantized_gated_linear(out, x, packed, bias, activation)
        REFERENCE.quantized_gated_linear(expected, x, weight, bias, activation)
    assert memory[x.shape[0] * size :].isnan().all()
    return out, expected


def assert_near(out: Tensor, expected: Tensor, tolerance: float = 1.0) -> None:
    assert out.isfinite().all()
    error = (out.double() - expected.double()).norm()
    assert error <= tolerance * TOLERANCE[out.dtype] * expected.double().norm()


def finer(weight: QuantizedWeight) -> QuantizedWeight:
    """The weight without the rounding of its inputs, which kernels of few rows leave out."""
    scheme = dataclasses.replace(weight.scheme, inputs=None, input_group_size=None, has_input_scale=False)
    return dataclasses.replace(weight, scheme=scheme, input_scale=None)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize(("num_rows", "out_features", "in_features"), [(3, 70, 256), (18, 40, 200), (1, 130, 128)])
def test_few_rows(name, num_rows, out_features, in_features, device):
    weight = random_quantized(every_scheme(in_features)[name], out_features, in_features, device=str(device))
    x = torch.randn(num_rows, in_features, device=device).to(DTYPE)
    out, expected = product(finer(weight), x)
    assert_near(out, expected)
    torch.testing.assert_close(product(weight, x)[0], out, rtol=0, atol=0)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("name", ["w4a16-g64-asym", "w8a16", "fp8a16"])
def test_few_rows_through_gates(name, activation, device):
    weight = random_quantized(every_scheme(136)[name], 150, 136, device=str(device))
    x, bias = torch.randn(5, 136, device=device).to(DTYPE), torch.randn(150, device=device).to(DTYPE)
    assert_near(*product(weight, x, bias, activation), tolerance=2)


def test_rows_that_lie_apart(device):
    weight = random_quantized(every_scheme(128)["w4a16-g128-act-order"], 50, 128, device=str(device))
    wide = torch.randn(6, 256, device=device).to(DTYPE)
    bias = torch.randn(50, device=device).to(DTYPE)
    for x in (wide[::2, :128], wide[:, ::2], wide[:1, 3:131]):
        assert_near(*product(weight, x, bias))


@pytest.mark.parametrize("name", ["w4a16-g128", "w8a8", "fp8-block"])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_no_rows(name, activation, device):
    weight = random_quantized(every_scheme(256)[name], 64, 256, device=str(device))
    out, expected = product(weight, torch.empty(0, 256, dtype=DTYPE, device=device), None, activation)
    assert out.shape == expected.shape


def test_results_in_float32(device):
    weight = random_quantized(every_scheme(256)["w4a16-g128"], 70, 256, device=str(device))
    x = torch.randn(3, 256, device=device).to(DTYPE)
    out, expected = torch.empty(3, 70, device=device), torch.empty(3, 70, device=device)
    GPU.quantized_linear(out, x, GPU.pack_quantized(weight, DTYPE, False), None)
    REFERENCE.quantized_linear(expected, x, weight, None)
    error = (out - expected).norm() / expected.norm()
    assert error < (1e-3 if torch.float16 == DTYPE else 8e-3)


@pytest.fixture
def shared_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three programs a tile, whatever the sizes."""
    monkeypatch.setattr(weight_only_config, "tuned", lambda *_: {"num_splits": 3})


@pytest.mark.usefixtures("shared_tiles")
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize(("name", "in_features"), [("w4a16-g128", 1280), ("w8a16", 300), ("w4a16-g32", 600)])
def test_programs_that_share_a_tile(name, in_features, activation, device):
    """Of 10 blocks the last program has two, of 3 one each; nothing is left of a launch for the one behind it."""
    weight = random_quantized(every_scheme(in_features)[name], 140, in_features, device=str(device))
    bias = torch.randn(140, device=device).to(DTYPE)
    for num_rows in (4, 33):
        x = torch.randn(num_rows, in_features, device=device).to(DTYPE)
        first = product(weight, x, bias, activation)
        assert_near(*first, tolerance=2)
        assert torch.equal(product(weight, x, bias, activation)[0], first[0])


@pytest.fixture
def few_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small steps go the way of large ones."""
    monkeypatch.setattr(quantized_rows, "MOST_WIDENED", 0)
    monkeypatch.setattr(weight_only_config, "DENSE_FROM", 0)


@pytest.mark.usefixtures("few_are_many")
@pytest.mark.parametrize("name", [name for name in SCHEMES if name not in ROUNDED])
def test_many_rows_of_which_the_weight_is_widened(name, device):
    weight = random_quantized(every_scheme(200)[name], 70, 200, device=str(device))
    x = torch.randn(5, 200, device=device).to(DTYPE)
    assert_near(*product(weight, x), tolerance=2)


@pytest.mark.usefixtures("few_are_many")
def test_many_rows_through_gates(device):
    weight = random_quantized(every_scheme(128)["w4a16-g128"], 70, 128, device=str(device))
    x, bias = torch.randn(5, 128, device=device).to(DTYPE), torch.randn(70, device=device).to(DTYPE)
    assert_near(*product(weight, x, bias, "silu"), tolerance=2)


@pytest.mark.usefixtures("few_are_many")
@pytest.mark.parametrize("name", ROUNDED)
@pytest.mark.parametrize(
    ("num_rows", "out_features", "in_features", "activation"),
    [(3, 70, 256, None), (67, 33, 200, None), (5, 150, 136, "silu")],
)
def test_many_rows_that_are_rounded(name, num_rows, out_features, in_features, activation, device):
    scheme = every_scheme(in_features)[name]
    weight = random_quantized(scheme, out_features, in_features, device=str(device))
    x = torch.randn(num_rows, in_features, device=device).to(DTYPE)
    x[0] = 0
    bias = torch.randn(out_features, device=device).to(DTYPE) if activation else None
    assert_near(*product(weight, x, bias, activation), tolerance=2)


@pytest.mark.usefixtures("few_are_many")
@pytest.mark.parametrize(
    "scheme",
    [
        QuantizationScheme(values="fp8", group_size=128, block_rows=128, inputs="fp8"),
        QuantizationScheme(values="fp8", group_size=256, inputs="fp8", input_group_size=128),
        QuantizationScheme(values="int8", group_size=128, inputs="int8", input_group_size=128),
        # Of these the inputs stay finer: no matrix instruction has such operands.
        QuantizationScheme(values="int4", group_size=128, inputs="int8"),
        QuantizationScheme(values="int8", group_size=64, inputs="int8"),
        QuantizationScheme(values="int8", group_size=256, inputs="int8", has_offsets=True),
    ],
    ids=lambda scheme: f"{scheme.values}-{scheme.group_size}-{scheme.input_group_size}",
)
def test_scales_of_other_shapes(scheme, device):
    weight = random_quantized(scheme, 40, 256, device=str(device))
    x = torch.randn(5, 256, device=device).to(DTYPE)
    packed = pack(weight, DTYPE, False)
    is_rounded = quantized_rows.takes_quantized(packed)
    assert is_rounded == (scheme.values == scheme.inputs and scheme.group_size >= 128 and not scheme.has_offsets)
    assert_near(*product(weight if is_rounded else finer(weight), x), tolerance=2)


@pytest.mark.usefixtures("few_are_many")
@pytest.mark.parametrize("activation", [None, "silu"])
def test_fp8_by_cublas(activation, device):
    """In bfloat16 and without a bias; torch 2.13 computes the same on a CPU, 2.11 does not."""
    if device.type == "cpu" and torch.__version__ < "2.13":
        pytest.skip("this torch scales rows on a GPU only")
    weight = random_quantized(every_scheme(256)["fp8"], 64, 256, device=str(device))
    x = torch.randn(5, 256, device=device).bfloat16()
    packed = pack(weight, torch.bfloat16, activation is not None)
    assert quantized_linear.can_scale(x.new_empty(5, 64), packed, None)
    # Gates are rounded before they are multiplied, and once more after.
    assert_near(*product(weight, x, None, activation), tolerance=2 if activation else 1)


def test_what_cublas_scales(device):
    def can_scale(name: str, size: int = 64, dtype: torch.dtype = torch.bfloat16, bias: Tensor | None = None) -> bool:
        packed = pack(random_quantized(every_scheme(256)[name], size, 256), dtype, False)
        return quantized_linear.can_scale(torch.empty(1, size, dtype=dtype, device=device), packed, bias)

    assert can_scale("fp8")
    assert can_scale("fp8-static")
    assert not can_scale("fp8-block")
    assert not can_scale("w8a8")
    assert not can_scale("fp8", size=66)
    assert not can_scale("fp8", dtype=torch.float16)
    assert not can_scale("fp8", bias=torch.empty(64))


def test_a_row_that_is_no_number_stays_so(device, monkeypatch):
    monkeypatch.setattr(quantized_rows, "MOST_WIDENED", 0)
    x = torch.randn(3, 256, device=device).to(DTYPE)
    x[1, 7] = float("nan")
    for name in ("w8a8", "fp8"):
        weight = random_quantized(every_scheme(256)[name], 32, 256, device=str(device))
        out = torch.empty(3, 32, dtype=DTYPE, device=device)
        GPU.quantized_linear(out, x, GPU.pack_quantized(weight, DTYPE, False), None)
        assert not out[1].isfinite().any()
        assert out[::2].isfinite().all()


def test_offsets_of_groups_without_a_scale(device):
    """GGUF's K quants have groups of one value: a scale of 0 and a minimum."""
    weight = random_quantized(every_scheme(256)["w4a16-g64-asym"], 20, 256, device=str(device))
    weight.scales[:, 1] = 0
    weight.scales[3:5, 2] = 0
    assert weight.offsets is not None
    weight.offsets[3, 2] = 0
    assert_near(*product(weight, torch.randn(3, 256, device=device).to(DTYPE)), tolerance=2)


def test_weights_without_a_form(device, monkeypatch):
    def packed(name: str, dtype: torch.dtype = DTYPE, in_features: int = 256) -> object | None:
        weight = random_quantized(every_scheme(256)[name], 8, in_features, device=str(device))
        return quantized_linear.pack_quantized(weight, dtype, False)

    assert packed("w4a16-g32", torch.float32) is None
    assert packed("w4a16-g32", torch.float64) is None
    odd = random_quantized(QuantizationScheme(values="int8", group_size=24), 8, 96, device=str(device))
    assert GPU.pack_quantized(odd, DTYPE, False) is None
    assert packed("nf4-g64") is not None
    blackwell = DeviceTraits("NVIDIA B200", (10, 0), 148, 227 * 1024, 126 << 20)
    monkeypatch.setattr(quantized_packing, "device_traits", lambda _: blackwell)
    assert packed("nf4-g64") is None
    assert packed("w4a16-g32") is not None


@pytest.mark.parametrize("traits", [A100, H200])
def test_fp8_products_need_instructions_for_it(traits, device, monkeypatch):
    monkeypatch.setattr(quantized_rows, "device_traits", lambda _: traits)
    packed = pack(random_quantized(every_scheme(256)["fp8"], 32, 256, device=str(device)), DTYPE, False)
    assert (quantized_rows.new_inputs(packed, 65) is not None) == (traits is H200)
    assert quantized_rows.new_inputs(packed, 64) is None


def test_rows_from_which_the_weight_is_widened():
    shape = quantized_packing.QuantizedShape.of(every_scheme(4096)["w4a16-g128"], 4096, 4096)
    device = torch.device("cpu")
    assert weight_only_config.weight_only_config(DENSE_FROM - 1, shape, device).is_fused
    assert not weight_only_config.weight_only_config(DENSE_FROM, shape, device).is_fused


@pytest.mark.parametrize("traits", [A100, H200])
@pytest.mark.parametrize("name", ["w4a16-g32", "w4a16-g128", "nf4-g64", "w8a16", "fp8-block"])
def test_launches_fit(name, traits):
    for out_features, in_features in ((4096, 4096), (28672, 4096), (4096, 14336), (64, 16), (855, 152)):
        scheme = every_scheme(in_features)[name]
        shape = quantized_packing.QuantizedShape.of(scheme, out_features, in_features)
        for bucket in (16, 32, 64, 128, 1024):
            config = weight_only_config.chosen_config(bucket, shape, traits)
            stage_bytes = config.block_n * shape.block_k * shape.bits // 8 + 2 * shape.block_k * config.block_t
            programs_per_sm = 2 if config.block_t <= 32 else 1
            assert config.num_stages * stage_bytes * programs_per_sm <= traits.shared_bytes or config.num_stages == 2
            assert 1 <= config.num_splits <= max(1, shape.num_blocks // 2)
            # No program of a tile is left without inputs.
            per_split = -(-shape.num_blocks // config.num_splits)
            assert (config.num_splits - 1) * per_split < shape.num_blocks
            assert config.block_t <= bucket


def test_what_was_measured_replaces_what_is_reckoned(monkeypatch):
    shape = quantized_packing.QuantizedShape.of(every_scheme(4096)["w4a16-g128"], 4096, 4096)
    asked: list[tuple[str, tuple[int, ...]]] = []
    monkeypatch.setattr(
        weight_only_config, "tuned", lambda name, key, _: asked.append((name, key)) or {"num_stages": 7}
    )
    found = {weight_only_config.weight_only_config(rows, shape, torch.device("cpu")) for rows in (0, 1, 16)}
    assert {config.num_stages for config in found} == {7}
    weight_only_config.weight_only_config(200, shape, torch.device("cpu"))
    assert asked == [("weight_only", (16, 4096, 4096, 4))] * 3 + [("weight_only", (256, 4096, 4096, 4))]


@pytest.mark.parametrize(
    ("bucket", "out_features", "sums_twice", "tile"),
    [
        (8192, 4096, False, (128, 256)),
        (8192, 4096, True, (128, 128)),
        (128, 4096, False, (64, 64)),
        (1, 64, True, (64, 64)),
    ],
)
def test_tiles_of_8_bit_products(bucket, out_features, sums_twice, tile):
    config = quantized_product.quantized_product_config(bucket, out_features, H200, sums_twice=sums_twice)
    assert (config.block_n, config.block_t) == tile
    measured = {"num_stages": 3}
    again = quantized_product.quantized_product_config(
        bucket, out_features, H200, sums_twice=sums_twice, measured=measured
    )
    assert again == dataclasses.replace(config, num_stages=3)
