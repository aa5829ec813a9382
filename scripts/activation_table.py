#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""What it costs to round inputs of quantized weights to int8, by the number of inputs that share a scale.

    scripts/activation_table.py /tmp/demo-w4a16 /tmp/demo-w8a16      checkpoints that `wavetrain quantize` has written
    scripts/activation_table.py                                      errors of a layer alone, with and without outliers

Of checkpoints: the perplexity of text that the demo model was not trained on, as the engine serves them. Of a layer of
2,048 random inputs: what rounding them adds, root mean square over that of the outputs, and beside it what rounding the
weight does; some channels of the inputs are 20 or 100 times as large as the others, as in large models.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from wavetrain_engine.environment import Environment
from wavetrain_engine.models.model_config import ModelConfig
from wavetrain_engine.models.registry import create_model, resolve_dtype
from wavetrain_engine.quantization import int8_inputs
from wavetrain_engine.quantizer.layer_runner import LayerRunner
from wavetrain_engine.quantizer.recipe import Recipe
from wavetrain_engine.quantizer.text_windows import TextWindows
from wavetrain_engine.text.tokenizer import Tokenizer
from wavetrain_engine.weights import stored_weight
from wavetrain_engine.weights.loader import load_weights
from wavetrain_kernels.ops import QuantizationScheme, QuantizedWeight, choose_kernels
from wavetrain_kernels.reference.quantized_linear import dequantize, round_inputs

CPU = torch.device("cpu")
WHOLE_ROW = None
GROUPS = (32, 64, 128, WHOLE_ROW)
CHANNELS, OUTPUTS, TOKENS = 2048, 512, 256
# How many channels are how many times as large.
OUTLIERS = ((0, 1), (8, 20), (8, 100), (64, 20))


def main() -> None:
    """Parses the arguments, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="*", type=Path)
    args = parser.parse_args()
    environment = Environment.read()
    choose_kernels(environment.kernels, CPU, environment.kernel_cache_dir)
    with torch.inference_mode():
        if not args.checkpoints:
            print_layers()
        for checkpoint in args.checkpoints:
            print_perplexities(checkpoint)


def print_perplexities(checkpoint: Path) -> None:
    """One line for each way to round inputs."""
    recipe = Recipe(scheme="w8a16", method="rtn")
    windows = TextWindows.make(Tokenizer.load(checkpoint), recipe, None).held_out
    base = perplexity(checkpoint, windows, has_int8_inputs=False)
    print(f"| {checkpoint.name} | none | {base:.4f} | |", flush=True)
    for group in GROUPS:
        with_group = _rounding_to(group)
        stored_weight.with_int8_inputs = with_group
        found = perplexity(checkpoint, windows, has_int8_inputs=True)
        print(f"| {checkpoint.name} | {_name(group)} | {found:.4f} | {100 * (found / base - 1):+.3f} % |", flush=True)


def perplexity(checkpoint: Path, windows: Tensor, *, has_int8_inputs: bool) -> float:
    """Returns e to the mean negative log-likelihood of the windows' tokens."""
    config = ModelConfig.load(checkpoint)
    model = create_model(config, resolve_dtype(config), "cpu", max_model_len=windows.shape[1])
    load_weights(model, checkpoint, config, has_int8_inputs=has_int8_inputs)
    norm = model.norm
    assert isinstance(norm, torch.nn.Module), "every family ends with a norm"
    sums: list[float] = []

    def take(start: int, hidden: Tensor) -> None:
        for offset, window in enumerate(hidden):
            logits = model.compute_logits(norm(window[:-1].contiguous())).double()
            targets = windows[start + offset, 1:, None]
            sums.append(-logits.log_softmax(-1).gather(1, targets).mean().item())

    LayerRunner(windows.shape[1]).run(model, windows, take)
    return math.exp(sum(sums) / len(sums))


def print_layers() -> None:
    """A line for each scheme, number of outliers, and group."""
    print(f"| weights | outliers | {' | '.join(map(_name, GROUPS))} | of the weight |")
    print("|---|---|---|" + "---|" * len(GROUPS))
    for scheme in (
        QuantizationScheme(values="int4", group_size=128),
        QuantizationScheme(values="int8", group_size=CHANNELS),
    ):
        for number, size in OUTLIERS:
            errors = [layer_errors(scheme, group, number, size) for group in GROUPS]
            cells = " | ".join(f"{100 * error:.2f} %" for error in (*(own for own, _ in errors), errors[0][1]))
            print(f"| {scheme.values} | {number} of {size} times | {cells} |", flush=True)


def layer_errors(scheme: QuantizationScheme, group: int | None, num_outliers: int, size: float) -> tuple[float, float]:
    """Returns the errors by rounding the inputs, and by rounding the weight: root mean squares over the outputs'."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, CHANNELS, generator=generator)
    x[:, torch.randperm(CHANNELS, generator=generator)[:num_outliers]] *= size
    x = x.bfloat16()
    dense = torch.randn(OUTPUTS, CHANNELS, generator=generator) * CHANNELS**-0.5
    weight = _rounding_to(group)(_rounded(dense, scheme))
    exact = x.double() @ dequantize(weight).double().T
    found = round_inputs(x, weight).double() @ dequantize(weight).double().T
    original = x.double() @ dense.double().T

    def error(found: Tensor, wanted: Tensor) -> float:
        return ((found - wanted).square().mean() / original.square().mean()).sqrt().item()

    return error(found, exact), error(exact, original)


def _rounded(dense: Tensor, scheme: QuantizationScheme) -> QuantizedWeight:
    largest = 7 if scheme.values == "int4" else 127
    grouped = dense.unflatten(1, (-1, scheme.group_size))
    scales = grouped.abs().amax(-1) / largest
    values = (grouped / scales[..., None]).round().flatten(1)
    if scheme.values == "int8":
        packed = values.to(torch.int8)
    else:
        codes = (values + 8).to(torch.uint8)
        packed = codes[:, ::2] | codes[:, 1::2] << 4
    return QuantizedWeight(scheme=scheme, in_features=CHANNELS, values=packed, scales=scales)


def _rounding_to(group: int | None) -> Callable[[QuantizedWeight], QuantizedWeight]:
    """As int8_inputs.with_int8_inputs, with groups of this size, or of the weight where those are smaller."""

    def rounding(weight: QuantizedWeight) -> QuantizedWeight:
        rounded = int8_inputs.with_int8_inputs(weight)
        if rounded.scheme.inputs is None:
            return rounded
        is_finer = group is not None and weight.scheme.group_size < group
        size = weight.scheme.group_size if is_finer else group
        return dataclasses.replace(rounded, scheme=dataclasses.replace(rounded.scheme, input_group_size=size))

    return rounding


def _name(group: int | None) -> str:
    return "the row" if group is None else str(group)


if __name__ == "__main__":
    sys.exit(main())
