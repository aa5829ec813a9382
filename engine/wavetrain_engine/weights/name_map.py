# SPDX-License-Identifier: Apache-2.0
"""Names of a Hugging Face checkpoint → our parameters.

Our modules have the names they have in checkpoints, without the leading `model.`, so only merged projections
need a rule: each of their parts is a range of rows. A checkpoint must hold every tensor wanted here and no
other; the few harmless extras that real checkpoints carry are listed below.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from wavetrain_engine.errors import CheckpointError
from wavetrain_engine.layers.linear import MergedLinear
from wavetrain_engine.layers.moe import ExpertProjection
from wavetrain_engine.quantization.kv_scales import is_kv_scale
from wavetrain_engine.quantization.stored_format import FLOAT_DTYPES, TensorSpec
from wavetrain_engine.tensor_entry import TensorEntry
from wavetrain_engine.weights.checkpoint import first_few
from wavetrain_engine.weights.gguf_tensors import GgufTensor

EMBEDDING = "model.embed_tokens.weight"
OUTPUT_HEAD = "lm_head.weight"
# Checkpoints of transformers before 4.32 saved this buffer; we compute it.
_HARMLESS_SUFFIX = ".rotary_emb.inv_freq"


@dataclass(frozen=True, slots=True)
class Target:
    """Where one tensor of a checkpoint goes: rows [start, start + shape[0]) of parameter `attribute` of `module`.

    The parameter is looked up when it is written to, since allocation replaces it.
    """

    module: nn.Module
    attribute: str
    start: int
    shape: tuple[int, ...]

    def memory(self) -> Tensor:
        """Returns the part of the parameter to fill."""
        parameter: Tensor = getattr(self.module, self.attribute)
        return parameter[self.start : self.start + self.shape[0]]


def name_map(model: nn.Module) -> dict[str, Target]:
    """Returns every tensor that a checkpoint of `model` must hold, by its name there."""
    targets: dict[str, Target] = {}
    for path, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            shape = tuple(parameter.shape)
            if not isinstance(module, (MergedLinear, ExpertProjection)):
                targets[_checkpoint_name(path, attribute)] = Target(module, attribute, 0, shape)
                continue
            parent, start = path.rpartition(".")[0], 0
            for part, rows in module.parts.items():
                name = _checkpoint_name(f"{parent}.{part}", attribute)
                targets[name] = Target(module, attribute, start, (rows, *shape[1:]))
                start += rows
    return targets


def check_tensors(
    tensors: Mapping[str, TensorEntry], targets: Mapping[str, Target], *, architecture: str, tied: bool
) -> None:
    """Checks that a checkpoint holds exactly the tensors a model wants, none of them quantized but by GGUF.

    Raises:
        CheckpointError: as `check_specs`.
    """
    specs = {name: plain_spec(tensors.get(name), target.shape) for name, target in targets.items()}
    check_specs(tensors, specs, architecture=architecture, tied=tied)


def plain_spec(entry: TensorEntry | None, shape: tuple[int, ...]) -> TensorSpec:
    """Returns what a tensor that is not quantized, or by itself, must look like."""
    # A GGUF file's types were looked at when it was opened.
    return TensorSpec.of((entry.dtype,) if isinstance(entry, GgufTensor) else FLOAT_DTYPES, shape)


def check_specs(
    tensors: Mapping[str, TensorEntry], specs: Mapping[str, TensorSpec], *, architecture: str, tied: bool
) -> None:
    """Checks that a checkpoint holds exactly the tensors that are described.

    Raises:
        CheckpointError: names the missing, the extra, the misshapen tensors, or those of a wrong dtype.
    """
    missing = [name for name, spec in specs.items() if name not in tensors and not spec.is_optional]
    extra = [name for name in tensors if name not in specs and not is_ignored(name, tied=tied)]
    if missing:
        hint = f"; it has {first_few(extra)} instead" if extra else ""
        raise CheckpointError(
            f"the checkpoint lacks {len(missing)} of the {len(specs)} tensors that config.json's {architecture} "
            f"wants: {first_few(missing)}{hint}"
        )
    if extra:
        raise CheckpointError(
            f"the checkpoint has {len(extra)} tensors that config.json's {architecture} does not know: "
            f"{first_few(extra)}; does config.json belong to it?"
        )
    there = {name: spec for name, spec in specs.items() if name in tensors}
    wrong = [
        f"{name} ({list(tensors[name].shape)} instead of {list(spec.forms[0][1])})"
        for name, spec in there.items()
        if not spec.allows_shape(tensors[name].shape)
    ]
    if wrong:
        raise CheckpointError(f"{len(wrong)} tensors do not have the shape config.json implies: {first_few(wrong)}")
    wrong = [
        f"{name} ({tensors[name].dtype} instead of {' or '.join(dict.fromkeys(dtype for dtype, _ in spec.forms))})"
        for name, spec in there.items()
        if not spec.allows(tensors[name].dtype, tensors[name].shape)
    ]
    if wrong:
        raise CheckpointError(f"{len(wrong)} tensors are not of the dtype that config.json implies: {first_few(wrong)}")


def is_ignored(name: str, *, tied: bool) -> bool:
    """Whether a tensor that no parameter wants is harmless."""
    return name.endswith(_HARMLESS_SUFFIX) or (tied and name == OUTPUT_HEAD) or is_kv_scale(name)


def _checkpoint_name(path: str, attribute: str) -> str:
    name = f"{path}.{attribute}"
    return name if name == OUTPUT_HEAD else f"model.{name}"
