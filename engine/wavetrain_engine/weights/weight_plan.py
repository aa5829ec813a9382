# SPDX-License-Identifier: Apache-2.0
"""Which tensors of a checkpoint each weight of a model is read from; complete and of the right form, or an error.

Nothing is read yet, and no memory asked for: every name, shape and dtype follows from config.json.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping

from wavetrain_engine.errors import CheckpointError
from wavetrain_engine.layers.embedding import Embedding, TiedEmbedding
from wavetrain_engine.layers.linear import Linear
from wavetrain_engine.layers.moe import ExpertProjection
from wavetrain_engine.models.model_config import ModelConfig
from wavetrain_engine.quantization.kv_scales import is_kv_scale
from wavetrain_engine.quantization.stored_format import FLOAT_DTYPES, QuantizationConfig, StoredFormat, TensorSpec
from wavetrain_engine.tensor_entry import TensorEntry
from wavetrain_engine.weights.name_map import Target, check_specs, plain_spec
from wavetrain_engine.weights.stored_weight import StoredLayer, StoredTensor, StoredWeight

_LOG = logging.getLogger(__name__)
_WEIGHT = ".weight"


def plan_weights(
    tensors: Mapping[str, TensorEntry], targets: Mapping[str, Target], config: ModelConfig
) -> dict[str, StoredWeight]:
    """Returns where each of the targets is read from, by its name.

    Raises:
        CheckpointError: names what is missing, not known, misshapen or of a wrong dtype.
    """
    formats = {name: _format_of(name, target, tensors, config.quantization) for name, target in targets.items()}
    specs: dict[str, TensorSpec] = {}
    for name, target in targets.items():
        specs.update(_specs(name, target, formats[name], tensors.get(name)))
    check_specs(tensors, specs, architecture=config.architecture, tied=config.tie_word_embeddings)
    if any(is_kv_scale(name) for name in tensors):
        _LOG.info("the checkpoint's scales for a KV cache are not needed: the cache finds finer ones by itself")
    return {name: _stored(name, target, formats[name], tensors) for name, target in targets.items()}


def describe_plan(weights: Mapping[str, StoredWeight], config: ModelConfig) -> str | None:
    """Returns how the weights are quantized, for the log; None: they are not."""
    counts = Counter(scheme for weight in weights.values() if (scheme := weight.scheme) is not None)
    if not counts:
        return None
    method = "GGUF" if config.quantization is None else config.quantization.method
    return f"{method} {'; '.join(f'{scheme} ({number} weights)' for scheme, number in counts.most_common())}"


def _format_of(
    name: str, target: Target, tensors: Mapping[str, TensorEntry], quantization: QuantizationConfig | None
) -> StoredFormat | None:
    """Returns the format that config.json has for a weight.

    Many lists of unquantized layers are incomplete: routers and output heads go without saying. So a layer that holds
    nothing but a plain weight is one.
    """
    if quantization is None or not name.endswith(_WEIGHT) or len(target.shape) != 2:
        return None
    if not isinstance(target.module, (Linear, ExpertProjection, Embedding, TiedEmbedding)):
        return None
    layer = name.removesuffix(_WEIGHT)
    kind = "Embedding" if isinstance(target.module, (Embedding, TiedEmbedding)) else "Linear"
    stored = quantization.format_of(layer, kind)
    if stored is None or name not in tensors or tensors[name].dtype not in FLOAT_DTYPES:
        return stored
    try:
        wanted = _layer_specs(layer, target, stored)
    except CheckpointError:  # of sizes that cannot be stored so, which a plain weight is no wonder then
        return None
    others = [item for item, spec in wanted.items() if item != name and not spec.is_optional]
    return stored if any(item in tensors for item in others) else None


def _specs(name: str, target: Target, stored: StoredFormat | None, entry: TensorEntry | None) -> dict[str, TensorSpec]:
    if stored is None:
        return {name: plain_spec(entry, target.shape)}
    return _layer_specs(name.removesuffix(_WEIGHT), target, stored)


def _layer_specs(layer: str, target: Target, stored: StoredFormat) -> dict[str, TensorSpec]:
    rows, columns = target.shape
    try:
        return {f"{layer}.{suffix}": spec for suffix, spec in stored.tensors(rows, columns).items()}
    except CheckpointError as error:
        raise CheckpointError(f"{layer}: {error}") from error


def _stored(name: str, target: Target, stored: StoredFormat | None, tensors: Mapping[str, TensorEntry]) -> StoredWeight:
    if stored is None:
        return StoredTensor(tensors[name])
    layer = name.removesuffix(_WEIGHT)
    rows, columns = target.shape
    names = [suffix for suffix in stored.tensors(rows, columns) if f"{layer}.{suffix}" in tensors]
    return StoredLayer(layer, stored, {suffix: tensors[f"{layer}.{suffix}"] for suffix in names}, (rows, columns))
