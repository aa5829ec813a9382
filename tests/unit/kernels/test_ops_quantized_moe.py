# SPDX-License-Identifier: Apache-2.0
"""Mixtures of quantized experts against a loop over tokens, and that no token depends on the batch it is in."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from fakes.quantized_weights import every_scheme, random_quantized
from wavetrain_kernels import ops
from wavetrain_kernels.errors import DtypeError, ShapeError
from wavetrain_kernels.kernel_set import KernelSet
from wavetrain_kernels.ops import PackedExperts, QuantizedWeight, dispatch
from wavetrain_kernels.reference.quantized_linear import round_inputs

pytestmark = pytest.mark.usefixtures("kernels")

CPU = torch.device("cpu")
NAMES = sorted(every_scheme(32))
# Beside bfloat16 the reference answers, which dequantizes.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2**-5, torch.float16: 2**-8}
# What rounding the inputs of both projections leaves of a result: kernels may keep them finer.
ROUNDING = {None: 0.0, "int8": 2**-5, "fp8": 2**-3}
# Tokens, experts, experts of a token, hidden size, units.
SIZES = [
    (0, 4, 2, 32, 16),
    (1, 1, 1, 16, 8),
    (1, 8, 2, 256, 128),
    (5, 40, 3, 96, 40),
    (9, 3, 2, 200, 72),
    (40, 2, 2, 130, 64),
]


def random_experts(name: str, num_experts: int, rows: int, columns: int) -> list[QuantizedWeight]:
    weights = [random_quantized(every_scheme(columns)[name], rows, columns, seed=seed) for seed in range(num_experts)]
    if not weights[0].scheme.has_input_scale:
        return weights
    # Wide enough for gated units: kernels that keep inputs finer do not cut them off.
    return [replace_scale(weight, 16.0) for weight in weights]


def replace_scale(weight: QuantizedWeight, largest: float) -> QuantizedWeight:
    steps = 127 if weight.scheme.inputs == "int8" else 448
    return dataclasses.replace(weight, input_scale=torch.full((1,), largest / steps))


def pack(weights: list[QuantizedWeight] | list[Tensor], dtype: torch.dtype, *, is_gated: bool = False) -> PackedExperts:
    first = weights[0]
    if isinstance(first, Tensor):
        packed = ops.empty_experts(len(weights), *first.shape, dtype=dtype, device=CPU, is_gated=is_gated)
    else:
        packed = ops.empty_quantized_experts(len(weights), first, dtype=dtype, is_gated=is_gated)
    for expert, weight in enumerate(weights):
        ops.pack_expert(packed, expert, weight)
    return packed


class Layer:
    """Random experts, packed, and tokens for them. A projection whose scheme is `dense` is not quantized."""

    def __init__(
        self, size: tuple[int, int, int, int, int], gate_up: str, down: str, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        num_tokens, num_experts, top_k, hidden, units = size
        generator = torch.Generator().manual_seed(num_tokens)
        self.x = torch.randn(num_tokens, hidden, generator=generator).to(dtype)
        logits = torch.randn(num_tokens, num_experts, generator=generator) * 2
        self.weights, self.expert_ids = ops.route_experts(logits, top_k, renormalize=True)
        self.gate_up = self._make(gate_up, num_experts, 2 * units, hidden, generator)
        self.down = self._make(down, num_experts, hidden, units, generator)
        self.packed = pack(self.gate_up, dtype, is_gated=True), pack(self.down, dtype)

    def _make(self, name: str, num_experts: int, rows: int, columns: int, generator: torch.Generator):
        if name != "dense":
            return random_experts(name, num_experts, rows, columns)
        return list((torch.randn(num_experts, rows, columns, generator=generator) / columns**0.5).to(self.x.dtype))

    def run(self, rows: slice | list[int] = slice(None), activation: ops.GatedActivation = "silu") -> Tensor:
        weights, expert_ids = self.weights[rows], self.expert_ids[rows]
        return ops.fused_moe(self.x[rows], *self.packed, weights, expert_ids, activation)

    def exact(self, activation: str = "silu") -> Tensor:
        """By a loop over tokens and their experts, in float64; inputs are rounded as the schemes say."""
        out = torch.zeros_like(self.x, dtype=torch.float64)
        matrices = [[dense(weight) for weight in weights] for weights in (self.gate_up, self.down)]
        for token, expert_ids in enumerate(self.expert_ids.tolist()):
            for rank, expert in enumerate(expert_ids):
                if not 0 <= expert < len(self.gate_up):
                    continue
                x = rounded(self.x[token], self.gate_up[expert])
                gate, up = (matrices[0][expert] @ x).chunk(2)
                gated = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
                units = rounded((gated * up).to(self.x.dtype), self.down[expert])
                out[token] += self.weights[token, rank].double() * (matrices[1][expert] @ units)
        return out

    def check(self, activation: ops.GatedActivation = "silu") -> None:
        result = self.run(activation=activation)
        assert result.shape == self.x.shape
        assert result.dtype == self.x.dtype
        tolerance = TOLERANCES[result.dtype]
        if self.x.dtype == torch.bfloat16:
            tolerance += max(
                ROUNDING[weights[0].scheme.inputs]
                for weights in (self.gate_up, self.down)
                if isinstance(weights[0], QuantizedWeight)
            )
        elif any(isinstance(w[0], QuantizedWeight) and w[0].scheme.inputs for w in (self.gate_up, self.down)):
            tolerance = 2**-3  # a sum in another order may round to the next step
        torch.testing.assert_close(result.double(), self.exact(activation), rtol=tolerance, atol=tolerance)


def dense(weight: Tensor | QuantizedWeight) -> Tensor:
    return (weight if isinstance(weight, Tensor) else ops.dequantize(weight)).double()


def rounded(x: Tensor, weight: Tensor | QuantizedWeight) -> Tensor:
    return (x if isinstance(weight, Tensor) else round_inputs(x[None], weight)[0]).double()


@pytest.mark.parametrize("name", NAMES)
def test_experts_are_the_weighted_sum(name: str) -> None:
    for size in SIZES:
        Layer(size, name, name).check()
    Layer(SIZES[2], name, name).check("gelu_tanh")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_experts_of_other_inputs(name: str, dtype: torch.dtype) -> None:
    Layer((5, 4, 2, 96, 40), name, name, dtype).check()


@pytest.mark.parametrize(
    ("gate_up", "down"),
    [
        ("dense", "w4a16-g32"),
        ("w4a16-g32", "dense"),
        ("dense", "w8a8"),
        ("w8a8", "dense"),
        ("w4a16-g64-asym", "w8a16-g16"),  # as GGUF files have more bits for some layers' second projection
        ("fp8", "nf4-g64"),
        ("w8a8", "w4a16-g128-act-order"),
    ],
)
def test_projections_of_different_schemes(gate_up: str, down: str) -> None:
    for size in SIZES:
        Layer(size, gate_up, down).check()


@pytest.mark.parametrize("name", ["w4a16-g32", "w8a8"])
@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_one_expert_may_get_all_tokens_and_others_none(name: str, num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    layer = Layer((75, 9, 2, 48, 40), name, name)
    for ids in ([3, 3], [8, 0], [-1, 4], [9, 2**31 - 1], [-(2**31), -1]):
        layer.expert_ids[:] = torch.tensor(ids)
        layer.check()
    layer.expert_ids[::2] = torch.tensor([8, 1])
    layer.check()


def test_more_rows_than_a_cache_holds() -> None:
    """An expert's rows in several pieces, columns of a token's sum in several."""
    layer = Layer((1100, 2, 2, 1100, 64), "w8a16", "w8a16")
    gate_up, down = (torch.stack([dense(weight) for weight in part]) for part in (layer.gate_up, layer.down))
    gate, up = torch.einsum("th,eih->tei", layer.x.double(), gate_up).chunk(2, dim=-1)
    made = torch.einsum("tei,ehi->teh", F.silu(gate) * up, down)
    shares = torch.zeros(1100, 2).scatter(1, layer.expert_ids.long(), layer.weights).double()
    tolerance = TOLERANCES[torch.bfloat16]
    torch.testing.assert_close(layer.run().double(), (made * shares[..., None]).sum(1), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", [*NAMES, "dense"])
def test_a_token_is_the_same_in_any_batch(kernels: KernelSet, name: str) -> None:
    """To the bit, as of experts that are not quantized."""
    if kernels.name == "reference":
        pytest.skip("PyTorch's products depend on the batch")
    layer = Layer((300, 10, 3, 200, 72), name, name if name != "dense" else "w4a16-g32")
    together = layer.run()
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1)).tolist()
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        for part in (slice(0, 1), slice(299, 300), slice(3, 20), slice(10, 43), slice(0, 300)):
            assert torch.equal(layer.run(part), together[part])
        assert torch.equal(layer.run(order), together[order])
        assert torch.equal(layer.run([7] * 40), together[[7] * 40])


@pytest.mark.parametrize("name", ["w4a16-g32", "fp8"])
def test_bad_tokens_stay_alone(name: str) -> None:
    layer = Layer((40, 4, 2, 96, 40), name, name)
    expected = layer.run()
    layer.x[3, 7], layer.weights[20] = float("nan"), float("nan")
    result = layer.run()
    assert result[3].isnan().all()
    assert result[20].isnan().all()
    others = [row for row in range(40) if row not in (3, 20)]
    assert torch.equal(result[others], expected[others])


@pytest.mark.parametrize("name", ["w4a16-g64-asym", "w4a16-g128-act-order"])
def test_single_experts_may_lack_offsets_or_an_order(name: str) -> None:
    """Files leave out those that change nothing."""
    layer = Layer((9, 4, 2, 256, 128), name, name)
    for weights in (layer.gate_up, layer.down):
        for expert, lacking in ((0, ("has_offsets",)), (1, ("is_reordered",)), (2, ("has_offsets", "is_reordered"))):
            fields = {"has_offsets": "offsets", "is_reordered": "column_order"}
            scheme = dataclasses.replace(weights[expert].scheme, **dict.fromkeys(lacking, False))
            without = {fields[flag]: None for flag in lacking}
            weights[expert] = dataclasses.replace(weights[expert], scheme=scheme, **without)
    for order in (slice(None), slice(None, None, -1)):
        layer.gate_up, layer.down = layer.gate_up[order], layer.down[order]
        layer.packed = pack(layer.gate_up, torch.bfloat16, is_gated=True), pack(layer.down, torch.bfloat16)
        layer.check()


def test_scales_that_float16_holds_are_held_so_by_expert() -> None:
    layer = Layer((30, 4, 2, 64, 32), "w4a16-g32", "w4a16-g32")
    for weights in (layer.gate_up, layer.down):
        for expert in (1, 2):
            weights[expert] = dataclasses.replace(weights[expert], scales=weights[expert].scales.half().float())
    layer.packed = pack(layer.gate_up, torch.bfloat16, is_gated=True), pack(layer.down, torch.bfloat16)
    layer.check()


def test_each_expert_has_an_input_scale_of_its_own() -> None:
    layer = Layer((20, 4, 2, 64, 32), "w8a8-static", "w8a8-static")
    for weights in (layer.gate_up, layer.down):
        for expert in range(4):
            weights[expert] = replace_scale(weights[expert], expert + 4.0)
    layer.packed = pack(layer.gate_up, torch.bfloat16, is_gated=True), pack(layer.down, torch.bfloat16)
    layer.check()


def test_a_recorded_step_is_what_was_recorded(kernels: KernelSet) -> None:
    program = ops.new_program(CPU, 20, torch.bfloat16)
    if program is None:
        pytest.skip(f"{kernels.name} records nothing")
    layer = Layer((20, 6, 2, 96, 40), "w4a16-g32", "w8a8")
    expected = layer.run()
    out: list[Tensor] = []
    with program.record():
        out.append(layer.run())
    places = torch.arange(20)
    for count in (20, 3, 1):
        metadata = ops.AttentionMetadata.build([count], [count], torch.zeros(1, 1, dtype=torch.int32), places[:count])
        program.run(places[:count], places[:count], metadata)
        assert torch.equal(out[0][:count], expected[:count])


def test_a_scheme_without_a_kernel_is_held_unquantized(kernels: KernelSet, monkeypatch, caplog) -> None:
    name = f"narrow {kernels.name} {id(monkeypatch)}"  # it is said once for each set and scheme
    narrow = dataclasses.replace(kernels, name=name, empty_quantized_experts=lambda *_: None)
    monkeypatch.setattr(dispatch, "_CHOSEN", {"cpu": narrow})
    with caplog.at_level(logging.WARNING):
        layer = Layer((5, 4, 2, 96, 40), "w4a16-g32", "w4a16-g32")
    assert [experts.scheme for experts in layer.packed] == [None, None]
    assert [record for record in caplog.records if name in record.message]
    layer.check()


def test_experts_that_do_not_fit() -> None:
    weights = random_experts("w4a16-g32", 4, 8, 64)
    with pytest.raises(ShapeError, match="positive in number"):
        ops.empty_quantized_experts(0, weights[0], dtype=torch.bfloat16)
    odd = random_experts("w4a16-g32", 1, 7, 64)[0]
    with pytest.raises(ShapeError, match="gated ones even"):
        ops.empty_quantized_experts(2, odd, dtype=torch.bfloat16, is_gated=True)
    with pytest.raises(DtypeError, match="inputs must be floating point"):
        ops.empty_quantized_experts(2, weights[0], dtype=torch.int8)
    experts = ops.empty_quantized_experts(4, weights[0], dtype=torch.bfloat16)
    with pytest.raises(ShapeError, match="expert must be from 0 to 3"):
        ops.pack_expert(experts, 4, weights[0])
    with pytest.raises(ShapeError, match=r"weight must be \[8, 64\], got \[6, 64\]"):
        ops.pack_expert(experts, 0, random_experts("w4a16-g32", 1, 6, 64)[0])
    with pytest.raises(DtypeError, match="weight must be quantized as the experts"):
        ops.pack_expert(experts, 0, torch.zeros(8, 64).bfloat16())
    for other in ("w4a16-g64-asym", "w8a16-g16"):
        with pytest.raises(DtypeError, match="as the experts, got"):
            ops.pack_expert(experts, 0, random_experts(other, 1, 8, 64)[0])
    codes = random_experts("nf4-g64", 2, 8, 64)
    experts = ops.empty_quantized_experts(2, codes[0], dtype=torch.bfloat16)
    with pytest.raises(DtypeError, match="codebook of the other experts"):
        ops.pack_expert(experts, 1, dataclasses.replace(codes[1], codebook=torch.linspace(-1, 1, 16)))
