# SPDX-License-Identifier: Apache-2.0
"""Which matrices a decoder layer has, which of them read the same input, and what that input comes from.

Names are those of a checkpoint, relative to the layer: `self_attn.q_proj`. What is found out here is all that the
methods know of a family; embeddings, the output head and routers are no matrices in this sense: they stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from wavetrain_engine.layers.linear import Linear, MergedLinear
from wavetrain_engine.layers.moe import ExpertProjection, MixtureOfExperts, Router
from wavetrain_engine.layers.norm import RMSNorm
from wavetrain_engine.models.model_config import ModelConfig

_FEED_FORWARD_NORMS = ("pre_feedforward_layernorm", "post_attention_layernorm")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where the numbers of an input are made, so that they can be multiplied there: a norm, or rows of a matrix.

    Attributes:
        name: of the norm or the matrix.
        norm_offset: what the norm adds to its weight; None: a matrix.
        num_copies, copy_size: row i of the matrix is seen num_copies times in the input: runs of copy_size rows, the
            heads of a value, are repeated one after the other.
    """

    name: str
    norm_offset: float | None = None
    num_copies: int = 1
    copy_size: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedInput:
    """An input, and the matrices that read it.

    Attributes:
        module: of the layer, whose input it is.
        matrices: name of each → its numbers of outputs and inputs.
        source: None: what makes it cannot be scaled.
        unquantized: further matrices that read it, and stay as they are: a router.
    """

    module: str
    matrices: dict[str, tuple[int, int]]
    source: Source | None
    unquantized: tuple[str, ...] = ()

    @property
    def in_features(self) -> int:
        """K."""
        return next(iter(self.matrices.values()))[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertInputs:
    """The two inputs of an expert; the first is the mixture's, as far as it goes to this expert."""

    gate_up: SharedInput
    down: SharedInput
    gate: str
    up: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureInputs:
    """A mixture of experts.

    Attributes:
        module: of the layer.
        shared: the mixture's input, with the matrices of all experts that read it.
    """

    module: str
    shared: SharedInput
    experts: list[ExpertInputs]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerStructure:
    """The inputs of a layer's matrices, in the order they are computed in."""

    inputs: list[SharedInput] = field(default_factory=list[SharedInput])
    mixture: MixtureInputs | None = None

    @classmethod
    def of(cls, layer: nn.Module, config: ModelConfig) -> LayerStructure:
        """Looks at a layer that need not have memory."""
        inputs: list[SharedInput] = []
        mixture = None
        for path, module in layer.named_modules():
            if isinstance(module, MixtureOfExperts):
                mixture = _mixture(path, module, _norm(layer, *_FEED_FORWARD_NORMS))
            elif isinstance(module, Linear) and not isinstance(module, Router):
                inputs.append(_shared_input(path, module, _source(path, layer, config)))
        return cls(inputs=inputs, mixture=mixture)

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Returns the name of each matrix → its numbers of outputs and inputs."""
        found = {name: sizes for item in self.inputs for name, sizes in item.matrices.items()}
        for expert in self.mixture.experts if self.mixture is not None else ():
            found |= expert.gate_up.matrices | expert.down.matrices
        return found

    def routers(self) -> tuple[str, ...]:
        """Returns the names of matrices that decide and do not compute."""
        return () if self.mixture is None else self.mixture.shared.unquantized


def _shared_input(path: str, module: Linear, source: Source | None) -> SharedInput:
    rows, columns = module.weight.shape
    parent = path.rpartition(".")[0]
    is_merged = isinstance(module, MergedLinear)
    parts = {f"{parent}.{part}": size for part, size in module.parts.items()} if is_merged else {path: rows}
    return SharedInput(module=path, matrices={name: (size, columns) for name, size in parts.items()}, source=source)


def _source(path: str, layer: nn.Module, config: ModelConfig) -> Source | None:
    if path == "self_attn.qkv_proj":
        return _norm(layer, "input_layernorm")
    if path == "self_attn.o_proj":
        num_copies = config.num_heads // config.num_kv_heads
        return Source(name="self_attn.v_proj", num_copies=num_copies, copy_size=config.head_dim)
    if path == "mlp.gate_up_proj":
        return _norm(layer, *_FEED_FORWARD_NORMS)
    return Source(name="mlp.up_proj") if path == "mlp.down_proj" else None


def _norm(layer: nn.Module, *names: str) -> Source:
    """The first of these norms that the layer has."""
    name = next(name for name in names if hasattr(layer, name))
    norm = layer.get_submodule(name)
    assert isinstance(norm, RMSNorm), "a layer's norms are RMS norms"
    return Source(name=name, norm_offset=norm.weight_offset)


def _mixture(path: str, module: MixtureOfExperts, source: Source) -> MixtureInputs:
    names, experts = module.names, []
    for index, expert in enumerate(module.experts):
        gate_up, down = expert.get_submodule("gate_up"), expert.get_submodule("down")
        assert isinstance(gate_up, ExpertProjection), "an expert is made of projections"
        assert isinstance(down, ExpertProjection), "an expert is made of projections"
        units = next(iter(gate_up.parts.values()))
        place = f"{path}.experts.{index}"
        first = {f"{place}.{name}": (units, gate_up.weight.shape[1]) for name in (names.gate, names.up)}
        second = {f"{place}.{names.down}": (down.weight.shape[0], units)}
        up = f"{place}.{names.up}"
        experts.append(
            ExpertInputs(
                gate_up=SharedInput(module=f"{place}.gate_up", matrices=first, source=source),
                down=SharedInput(module=f"{place}.down", matrices=second, source=Source(name=up)),
                gate=f"{place}.{names.gate}",
                up=up,
            )
        )
    every = {name: sizes for expert in experts for name, sizes in expert.gate_up.matrices.items()}
    shared = SharedInput(module=path, matrices=every, source=source, unquantized=(f"{path}.gate",))
    return MixtureInputs(module=path, shared=shared, experts=experts)
