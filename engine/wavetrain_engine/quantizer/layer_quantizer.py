# SPDX-License-Identifier: Apache-2.0
"""One layer, from its tensors to those of the checkpoint: looked at with text, scaled, rounded."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from wavetrain_engine.quantizer import awq, smoothquant
from wavetrain_engine.quantizer.compressed_tensors import weight_tensors
from wavetrain_engine.quantizer.expert_inputs import MixtureWatch
from wavetrain_engine.quantizer.folding import fold
from wavetrain_engine.quantizer.gptq import gptq
from wavetrain_engine.quantizer.input_moments import InputMoments
from wavetrain_engine.quantizer.layer_runner import CacheRange, LayerRunner, Watch
from wavetrain_engine.quantizer.layer_source import LayerSource
from wavetrain_engine.quantizer.layer_structure import LayerStructure, SharedInput
from wavetrain_engine.quantizer.recipe import Recipe
from wavetrain_engine.quantizer.rounding import Grid, RoundedWeight, round_weight

# W = windows, S = tokens of a window, H = hidden size.

_LARGEST_FP8 = 448.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixError:
    """What rounding did to a matrix.

    Attributes:
        weight_error: the squared error of the weights, over their squares.
        output_error: of the outputs, over theirs, for the text; None: no text went through it.
    """

    name: str
    weight_error: float
    output_error: float | None


@dataclass(slots=True)
class QuantizedLayer:
    """What a layer became.

    Attributes:
        stored: tensors by their names in the checkpoint, relative to the layer.
        dense: all of the layer's tensors as they compute now, in float32.
        folded: names of the inputs that were scaled.
        unseen: names of matrices that no token of the text went through.
    """

    stored: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    dense: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    errors: list[MatrixError] = field(default_factory=list[MatrixError])
    folded: list[str] = field(default_factory=list[str])
    unseen: list[str] = field(default_factory=list[str])

    def facts(self) -> dict[str, Any]:
        """Returns what the report says of it."""
        return {"matrices": [asdict(error) for error in self.errors], "scaled": self.folded, "unseen": self.unseen}


class LayerQuantizer:
    """Quantizes layers by a recipe.

    Args:
        structures: of all layers.
    """

    def __init__(
        self, source: LayerSource, structures: list[LayerStructure], recipe: Recipe, grid: Grid, runner: LayerRunner
    ) -> None:
        self._source = source
        self._structures = structures
        self._recipe = recipe
        self._grid = grid
        self._runner = runner

    def quantize(self, index: int, tensors: dict[str, Tensor], hidden: Tensor) -> QuantizedLayer:
        """Quantizes a layer.

        Args:
            tensors: of the layer, in float32; changed.
            hidden: [W, S, H], what flows into it.
        """
        structure, result = self._structures[index], QuantizedLayer()
        moments = {shared.module: InputMoments(shared.in_features) for shared in structure.inputs}
        mixture = None if structure.mixture is None else MixtureWatch(structure.mixture, self._source.config)
        cache_range = CacheRange()
        self._look(index, tensors, hidden, moments, mixture, cache_range)
        for shared in structure.inputs:
            self._fold(tensors, shared, moments[shared.module], [moments[shared.module]], result)
        for shared in structure.inputs:
            self._round(tensors, shared, moments[shared.module], result)
        if mixture is not None:
            self._quantize_experts(tensors, mixture, result)
        self._keep_rest(tensors, result)
        if self._recipe.has_kv_scales:
            for name, largest in (("k_scale", cache_range.key), ("v_scale", cache_range.value)):
                scale = largest / _LARGEST_FP8 or 1.0
                result.stored[f"self_attn.{name}"] = torch.tensor([scale], dtype=self._source.dtype)
        return result

    def _look(
        self,
        index: int,
        tensors: dict[str, Tensor],
        hidden: Tensor,
        moments: dict[str, InputMoments],
        mixture: MixtureWatch | None,
        cache_range: CacheRange,
    ) -> None:
        """Runs the text through the layer as it was."""
        if not hidden.shape[0]:
            return
        watched: dict[str, Watch] = {f"layers.0.{name}": item.add for name, item in moments.items()}
        if mixture is not None:
            watched[f"layers.0.{mixture.mixture.module}"] = mixture.add
        stage = self._source.stage(self._source.build_layer(index, tensors))
        self._runner.run(stage, hidden, lambda _start, _output: None, watched=watched, cache_range=cache_range)

    def _fold(
        self,
        tensors: dict[str, Tensor],
        shared: SharedInput,
        moments: InputMoments,
        rescaled: list[InputMoments],
        result: QuantizedLayer,
    ) -> Tensor | None:
        """Scales an input if the method gains by it, and returns by what it was divided."""
        if self._recipe.method == "awq":
            scales = awq.search_scales(tensors, shared, self._grid, moments)
        elif self._recipe.method == "smoothquant":
            scales = smoothquant.smoothing_scales(tensors, shared, moments, self._recipe.smoothing)
        else:
            return None
        if scales is None:
            return None
        result.folded.append(shared.module)
        return fold(tensors, shared, scales, rescaled, self._source.dtype)

    def _round(
        self, tensors: dict[str, Tensor], shared: SharedInput, moments: InputMoments, result: QuantizedLayer
    ) -> None:
        for name in shared.matrices:
            weight = tensors.pop(f"{name}.weight")
            rounded = self._round_matrix(weight, moments)
            dense = rounded.dequantize()
            result.stored |= weight_tensors(name, rounded, self._recipe)
            result.dense[f"{name}.weight"] = dense
            result.errors.append(_error(name, weight, dense, moments))
            if moments.count == 0:
                result.unseen.append(name)

    def _round_matrix(self, weight: Tensor, moments: InputMoments) -> RoundedWeight:
        if self._recipe.method == "gptq":
            return gptq(weight, self._grid, moments, has_act_order=self._recipe.has_act_order)
        is_weighted = self._recipe.method == "awq" and moments.count > 0
        return round_weight(weight, self._grid, moments.second if is_weighted else None)

    def _quantize_experts(self, tensors: dict[str, Tensor], watch: MixtureWatch, result: QuantizedLayer) -> None:
        """Expert by expert: the moments of all at once would not fit."""
        watch.route(tensors[f"{watch.mixture.shared.unquantized[0]}.weight"])
        shared = watch.moments()
        factors = self._fold(tensors, watch.mixture.shared, shared, [shared], result)
        for number, expert in enumerate(watch.mixture.experts):
            gate_up = watch.expert_moments(number, factors)
            down = watch.down_moments(number, tensors, factors)
            self._fold(tensors, expert.down, down, [down], result)
            # An expert that no token went to reads what the others read.
            self._round(tensors, expert.gate_up, gate_up if gate_up.count else shared, result)
            self._round(tensors, expert.down, down, result)

    def _keep_rest(self, tensors: dict[str, Tensor], result: QuantizedLayer) -> None:
        """Norms, biases and routers stay in the checkpoint's dtype."""
        for name, tensor in tensors.items():
            result.stored[name] = tensor.to(self._source.dtype)
            result.dense[name] = tensor


def _error(name: str, weight: Tensor, rounded: Tensor, moments: InputMoments) -> MatrixError:
    errors = rounded - weight
    weight_error = (errors.square().sum() / weight.square().sum().clamp(min=1e-30)).item()
    if moments.count == 0:
        return MatrixError(name=name, weight_error=weight_error, output_error=None)
    output_error = moments.loss(errors).sum() / moments.loss(weight).sum().clamp(min=1e-30)
    return MatrixError(name=name, weight_error=weight_error, output_error=output_error.clamp(min=0).item())
