# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts against a loop over tokens in float64, and that no token depends on the batch it is in."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import MixtralConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from wavetrain_kernels import ops
from wavetrain_kernels.errors import DtypeError, ShapeError
from wavetrain_kernels.kernel_set import KernelSet
from wavetrain_kernels.ops import PackedExperts

pytestmark = pytest.mark.usefixtures("kernels")
CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2**-5, torch.float16: 2**-8}
# Tokens, experts, experts of a token, hidden size, units: on both sides of tiles of 16 and 32.
SIZES = [
    (0, 4, 2, 8, 8),
    (1, 1, 1, 1, 1),
    (1, 8, 2, 32, 64),
    (2, 4, 4, 34, 33),
    (5, 40, 3, 31, 15),
    (17, 3, 1, 96, 48),
    (40, 5, 2, 64, 100),
    (130, 2, 2, 257, 17),
]


class Layer:
    """Random experts, packed, and tokens for them."""

    def __init__(
        self, num_tokens: int, num_experts: int, top_k: int, hidden: int, units: int, dtype: torch.dtype
    ) -> None:
        generator = torch.Generator().manual_seed(num_tokens)
        self.x = torch.randn(num_tokens, hidden, generator=generator).to(dtype)
        self.gate_up = (torch.randn(num_experts, 2 * units, hidden, generator=generator) / hidden**0.5).to(dtype)
        self.down = (torch.randn(num_experts, hidden, units, generator=generator) / units**0.5).to(dtype)
        logits = torch.randn(num_tokens, num_experts, generator=generator) * 2
        self.weights, self.expert_ids = ops.route_experts(logits, top_k, renormalize=False)
        self.packed_gate_up = pack(self.gate_up, is_gated=True)
        self.packed_down = pack(self.down)

    def run(self, rows: slice | list[int] = slice(None), activation: ops.GatedActivation = "silu") -> Tensor:
        weights, expert_ids = self.weights[rows], self.expert_ids[rows]
        return ops.fused_moe(self.x[rows], self.packed_gate_up, self.packed_down, weights, expert_ids, activation)

    def exact(self, activation: str = "silu") -> Tensor:
        """By a loop over tokens and their experts, in float64."""
        x, gate_up, down = self.x.double(), self.gate_up.double(), self.down.double()
        out = torch.zeros_like(x)
        for token, expert_ids in enumerate(self.expert_ids.tolist()):
            for rank, expert in enumerate(expert_ids):
                if not 0 <= expert < gate_up.shape[0]:
                    continue
                gate, up = (gate_up[expert] @ x[token]).chunk(2)
                gated = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
                out[token] += self.weights[token, rank].double() * (down[expert] @ (gated * up))
        return out


def pack(weights: Tensor, *, is_gated: bool = False) -> PackedExperts:
    packed = ops.empty_experts(*weights.shape, dtype=weights.dtype, device=CPU, is_gated=is_gated)
    for expert, weight in enumerate(weights):
        ops.pack_expert(packed, expert, weight)
    return packed


def assert_close(result: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCES[result.dtype]
    torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_experts_are_the_weighted_sum(size, dtype, activation):
    layer = Layer(*size, dtype)
    result = layer.run(activation=activation)
    assert result.shape == layer.x.shape
    assert result.dtype == dtype
    assert_close(result, layer.exact(activation))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_one_expert_may_get_all_tokens_and_others_none(dtype, num_threads):
    torch.set_num_threads(num_threads)
    layer = Layer(75, 9, 2, 48, 40, dtype)
    for ids in ([3, 3], [8, 0], [-1, 4], [9, 2**31 - 1], [-(2**31), -1]):
        layer.expert_ids[:] = torch.tensor(ids)
        assert_close(layer.run(), layer.exact())
    layer.expert_ids[::2] = torch.tensor([8, 1])
    assert_close(layer.run(), layer.exact())


def test_more_rows_than_a_cache_holds():
    """An expert's rows in several pieces, columns of a token's sum in several."""
    layer = Layer(1100, 3, 2, 1100, 130, torch.bfloat16)
    assert_close(layer.run(), layer.exact())


def test_a_token_is_the_same_in_any_batch(kernels: KernelSet):
    """To the bit: preempting a request, or serving it beside others, must not change its tokens."""
    if kernels.name == "reference":
        pytest.skip("PyTorch's products depend on the batch")
    layer = Layer(300, 10, 3, 98, 70, torch.bfloat16)
    together = layer.run()
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1)).tolist()
    for num_threads in (1, 2, 3, 7):
        torch.set_num_threads(num_threads)
        for part in (slice(0, 1), slice(299, 300), slice(3, 20), slice(10, 43), slice(0, 300)):
            assert torch.equal(layer.run(part), together[part])
        assert torch.equal(layer.run(order), together[order])
        assert torch.equal(layer.run([7] * 40), together[[7] * 40])


@pytest.mark.parametrize("dtype", DTYPES)
def test_bad_tokens_stay_alone(dtype):
    layer = Layer(40, 4, 2, 40, 33, dtype)
    expected = layer.run()
    layer.x[3, 7], layer.weights[20] = float("nan"), float("nan")
    result = layer.run()
    assert result[3].isnan().all()
    assert result[20].isnan().all()
    others = [row for row in range(40) if row not in (3, 20)]
    assert torch.equal(result[others], expected[others])


def test_inputs_that_lie_apart():
    layer = Layer(9, 4, 2, 40, 33, torch.bfloat16)
    x, expected = layer.x, layer.run()
    for columns in (slice(10, 50), slice(0, 80, 2)):
        layer.x = torch.zeros(9, 99, dtype=torch.bfloat16)[:, columns]
        layer.x.copy_(x)
        assert torch.equal(layer.run(), expected)
    layer.weights, layer.expert_ids = (t.T.contiguous().T for t in (layer.weights, layer.expert_ids))
    assert torch.equal(layer.run(), expected)
    turned = layer.gate_up.transpose(1, 2).contiguous().transpose(1, 2)
    layer.packed_gate_up = pack(turned, is_gated=True)
    assert torch.equal(layer.run(), expected)


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_routing_takes_the_likeliest(data: st.DataObject) -> None:
    num_tokens, num_experts = data.draw(st.integers(0, 6)), data.draw(st.integers(1, 70))
    top_k = data.draw(st.integers(1, num_experts))
    # Few values, so that many are equal.
    logits = torch.randint(-8, 8, (num_tokens, num_experts), generator=torch.Generator().manual_seed(top_k)) * 1.5
    renormalize = data.draw(st.booleans())
    weights, expert_ids = ops.route_experts(logits, top_k, renormalize=renormalize)
    assert weights.shape == expert_ids.shape == (num_tokens, top_k)
    for row, (got_weights, got_ids) in enumerate(zip(weights, expert_ids.tolist(), strict=True)):
        wanted = sorted(range(num_experts), key=lambda expert: (-logits[row, expert].item(), expert))[:top_k]
        assert got_ids == wanted
        shares = logits[row].double().softmax(-1)[wanted]
        shares = shares / shares.sum() if renormalize else shares
        torch.testing.assert_close(got_weights.double(), shares, rtol=1e-5, atol=1e-7)


def test_routing_of_rows_that_are_no_distribution():
    inf, nan = float("inf"), float("nan")
    rows = [[0.0, nan, 1.0, 2.0], [inf, 0.0, 1.0, 2.0], [-inf] * 4, [nan] * 4, [3.0, 2.0, -inf, -inf]]
    weights, expert_ids = ops.route_experts(torch.tensor(rows), 3, renormalize=True)
    assert weights[:4].isnan().all()
    assert all(len({*ids}) == 3 and min(ids) >= 0 and max(ids) < 4 for ids in expert_ids.tolist())
    assert expert_ids[4].tolist() == [0, 1, 2]
    assert weights[4, 2] == 0


def test_routing_of_logits_that_lie_apart():
    logits = torch.randn(7, 12)
    expected = ops.route_experts(logits, 2, renormalize=True)
    for view in (torch.zeros(7, 30)[:, 3:15], torch.zeros(12, 7).T):
        view.copy_(logits)
        assert all(map(torch.equal, ops.route_experts(view, 2, renormalize=True), expected))


@pytest.mark.parametrize("family", ["mixtral", "qwen3", "qwen3-renormalized"])
@torch.inference_mode()
def test_a_layer_equals_transformers(family):
    sizes = {"hidden_size": 48, "num_experts_per_tok": 3, "num_hidden_layers": 1}
    if family == "mixtral":
        block = MixtralSparseMoeBlock(MixtralConfig(intermediate_size=40, num_local_experts=6, **sizes))
    else:
        is_renormalized = family == "qwen3-renormalized"
        config = Qwen3MoeConfig(moe_intermediate_size=40, num_experts=6, norm_topk_prob=is_renormalized, **sizes)
        block = Qwen3MoeSparseMoeBlock(config)
    for parameter in block.parameters():
        parameter.copy_(torch.randn(parameter.shape) * 0.3)
    x = torch.randn(23, 48)
    expected = block(x[None])[0]
    logits = ops.linear(x, ops.pack_weight(block.gate.weight), dtype=torch.float32)
    weights, expert_ids = ops.route_experts(logits, 3, renormalize=family != "qwen3")
    gate_up, down = pack(block.experts.gate_up_proj, is_gated=True), pack(block.experts.down_proj)
    result = ops.fused_moe(x, gate_up, down, weights, expert_ids, "silu")
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("logits", "top_k", "error", "message"),
    [
        (torch.zeros(4), 1, ShapeError, r"router_logits must be \[T, E\]"),
        (torch.zeros(2, 4), 0, ShapeError, "top_k must be from 1 to 4"),
        (torch.zeros(2, 4), 5, ShapeError, "top_k must be from 1 to 4"),
        (torch.zeros(2, 0), 1, ShapeError, "top_k must be from 1 to 0"),
        (torch.zeros(2, 4).half(), 1, DtypeError, "router_logits must be float32"),
    ],
)
def test_logits_that_do_not_fit(logits, top_k, error, message):
    with pytest.raises(error, match=message):
        ops.route_experts(logits, top_k, renormalize=True)


def test_experts_that_do_not_fit():
    make = {"dtype": torch.float32, "device": CPU}
    for sizes in ((0, 4, 4), (4, 0, 4), (4, 4, 0)):
        with pytest.raises(ShapeError, match="positive in number and sizes, got"):
            ops.empty_experts(*sizes, **make)
    with pytest.raises(ShapeError, match="out even, got"):
        ops.empty_experts(4, 3, 4, is_gated=True, **make)
    with pytest.raises(DtypeError, match="floating point"):
        ops.empty_experts(4, 4, 4, dtype=torch.int8, device=CPU)
    experts = ops.empty_experts(4, 6, 5, **make)
    for expert in (-1, 4):
        with pytest.raises(ShapeError, match="expert must be from 0 to 3"):
            ops.pack_expert(experts, expert, torch.zeros(6, 5))
    with pytest.raises(ShapeError, match=r"weight must be \[6, 5\], got \[5, 6\]"):
        ops.pack_expert(experts, 0, torch.zeros(5, 6))
    with pytest.raises(DtypeError, match=r"weight must be torch\.float32"):
        ops.pack_expert(experts, 0, torch.zeros(6, 5).half())


X, WEIGHTS, IDS = torch.zeros(2, 5), torch.zeros(2, 3), torch.zeros(2, 3).int()


@pytest.mark.parametrize(
    ("x", "weights", "ids", "error", "message"),
    [
        (torch.zeros(5), WEIGHTS, IDS, ShapeError, r"x must be \[T, 5\]"),
        (torch.zeros(2, 4), WEIGHTS, IDS, ShapeError, r"x must be \[T, 5\]"),
        (X.half(), WEIGHTS, IDS, DtypeError, "x and the experts must have one dtype"),
        (X, WEIGHTS[:1], IDS, ShapeError, r"must be \[2, k\], got \[1, 3\] and \[2, 3\]"),
        (X, WEIGHTS, IDS[:1], ShapeError, r"must be \[2, k\]"),
        (X, WEIGHTS[:, 0], IDS[:, 0], ShapeError, r"must be \[2, k\]"),
        (X, WEIGHTS[:, :0], IDS[:, :0], ShapeError, r"must be \[2, k\]"),
        (X, WEIGHTS.half(), IDS, DtypeError, "weights must be float32"),
        (X, WEIGHTS, IDS.long(), DtypeError, "expert_ids int32"),
    ],
)
def test_tokens_that_do_not_fit(x, weights, ids, error, message):
    gate_up, down = pack(torch.zeros(4, 6, 5), is_gated=True), pack(torch.zeros(4, 5, 3))
    with pytest.raises(error, match=message):
        ops.fused_moe(x, gate_up, down, weights, ids, "silu")


def test_projections_that_do_not_fit():
    gate_up, down = pack(torch.zeros(4, 6, 5), is_gated=True), pack(torch.zeros(4, 5, 3))
    for pair in ((down, down), (gate_up, gate_up)):
        with pytest.raises(ShapeError, match="gate_up must be made with is_gated, and down without"):
            ops.fused_moe(X, *pair, WEIGHTS, IDS, "silu")
    for shape in ((3, 5, 3), (4, 6, 3), (4, 5, 4)):
        with pytest.raises(ShapeError, match=r"down must be 4 experts of \[5, 3\]"):
            ops.fused_moe(X, gate_up, pack(torch.zeros(shape)), WEIGHTS, IDS, "silu")
    with pytest.raises(DtypeError, match="one dtype"):
        ops.fused_moe(X, gate_up, pack(torch.zeros(4, 5, 3).half()), WEIGHTS, IDS, "silu")
