# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint is to be quantized to, and how. Checked before any work; never torch here.

scheme      weights                                   inputs             methods
w4a16       int4, a scale for a group of inputs       as they are        rtn, gptq, awq
w2a16       int2, likewise                            as they are        rtn, gptq, awq
w8a16       int8, a scale for an output               as they are        rtn, gptq, awq
w8a8        int8, a scale for an output               int8, by token     rtn, gptq, smoothquant
fp8         e4m3, a scale for an output               e4m3, by token     rtn
fp8-block   e4m3, a scale for 128 x 128               e4m3, by 128       rtn
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from wavetrain_engine.errors import ConfigError

METHODS = ("rtn", "gptq", "awq", "smoothquant")
PER_CHANNEL = -1  # the group size of one scale for all inputs of an output, as the field writes it
BLOCK_SIZE = 128  # rows, and inputs, of a block of fp8-block
_SMALLEST_GROUP = 16  # what kernels can have


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightScheme:
    """One of the schemes above.

    Attributes:
        num_bits: of a weight.
        is_float: e4m3 and not an integer.
        group_sizes: of which the first that divides every matrix's inputs is used, where none is asked for.
        inputs: what inputs are rounded to when the model is run; None: they are not.
        methods: that suit it.
    """

    name: str
    num_bits: int
    is_float: bool = False
    group_sizes: tuple[int, ...] = (PER_CHANNEL,)
    inputs: str | None = None
    methods: tuple[str, ...] = ("rtn",)

    @property
    def has_groups(self) -> bool:
        """Whether a group size may be chosen."""
        return not self.is_float and self.inputs is None

    @property
    def is_blocked(self) -> bool:
        """Whether a scale is for a block of rows and inputs."""
        return self.is_float and self.group_sizes == (BLOCK_SIZE,)


_WEIGHT_ONLY = ("rtn", "gptq", "awq")
SCHEMES = {
    scheme.name: scheme
    for scheme in (
        WeightScheme(name="w4a16", num_bits=4, group_sizes=(128, 64, 32, 16, PER_CHANNEL), methods=_WEIGHT_ONLY),
        WeightScheme(name="w2a16", num_bits=2, group_sizes=(32, 16, PER_CHANNEL), methods=_WEIGHT_ONLY),
        WeightScheme(name="w8a16", num_bits=8, methods=_WEIGHT_ONLY),
        WeightScheme(name="w8a8", num_bits=8, inputs="int8", methods=("rtn", "gptq", "smoothquant")),
        WeightScheme(name="fp8", num_bits=8, is_float=True, inputs="fp8"),
        WeightScheme(name="fp8-block", num_bits=8, is_float=True, inputs="fp8", group_sizes=(BLOCK_SIZE,)),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything that the numbers of the result depend on, beside the checkpoint and the text.

    Attributes:
        scheme: a name of SCHEMES.
        method: one of METHODS.
        group_size: inputs that share a scale; PER_CHANNEL: all; None: what suits scheme and model.
        is_symmetric: no zero points.
        has_kv_scales: a scale for each layer's keys and one for its values, for a KV cache in fp8.
        has_act_order: GPTQ rounds the inputs that matter most first. Groups stay as they are.
        smoothing: how much of the inputs' range SmoothQuant moves into the weights, 0 to 1.
        num_windows: of calibration text.
        window_tokens: of each window, there and in the report.
        num_report_windows: of held-out text that the report is measured on; 0: no report.
        max_shard_bytes: a larger checkpoint is written in several files.
    """

    scheme: str
    method: str
    group_size: int | None = None
    is_symmetric: bool = True
    has_kv_scales: bool = False
    has_act_order: bool = True
    smoothing: float = 0.5
    num_windows: int = 128
    window_tokens: int = 512
    num_report_windows: int = 64
    max_shard_bytes: int = 5 * 10**9

    def __post_init__(self) -> None:
        """Raises: ConfigError: values out of range, or that do not go together."""
        if self.scheme not in SCHEMES:
            raise ConfigError(f"--scheme {self.scheme}: one of {', '.join(SCHEMES)} is expected")
        scheme = SCHEMES[self.scheme]
        if self.method not in METHODS:
            raise ConfigError(f"--method {self.method}: one of {', '.join(METHODS)} is expected")
        if self.method not in scheme.methods:
            suited = ", ".join(name for name, other in SCHEMES.items() if self.method in other.methods)
            raise ConfigError(
                f"--method {self.method} does not suit --scheme {self.scheme}: {self.scheme} goes with "
                f"{', '.join(scheme.methods)}; {self.method} goes with {suited}"
            )
        self._check_groups(scheme)
        self._check_numbers()

    @property
    def weight_scheme(self) -> WeightScheme:
        """What `scheme` names."""
        return SCHEMES[self.scheme]

    @property
    def needs_text(self) -> bool:
        """Whether anything is learnt from calibration text."""
        return self.method != "rtn" or self.has_kv_scales

    def to_mapping(self) -> dict[str, Any]:
        """Returns all values by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def _check_groups(self, scheme: WeightScheme) -> None:
        if not scheme.has_groups:
            if self.group_size is not None:
                raise ConfigError(
                    f"--group-size does not go with --scheme {self.scheme}, which has no groups to choose"
                )
            if not self.is_symmetric:
                raise ConfigError(f"--asymmetric does not go with --scheme {self.scheme}, which has no zero points")
        size = self.group_size
        if size is not None and size != PER_CHANNEL and (size < _SMALLEST_GROUP or size % _SMALLEST_GROUP):
            raise ConfigError(
                f"--group-size {size}: expected a multiple of {_SMALLEST_GROUP}, or {PER_CHANNEL} for one scale for "
                "each output"
            )

    def _check_numbers(self) -> None:
        if not 0 <= self.smoothing <= 1:
            raise ConfigError(f"--smoothing {self.smoothing}: expected a number from 0 to 1")
        for flag, value, lowest in (
            ("--calibration-windows", self.num_windows, 1),
            ("--window-tokens", self.window_tokens, 16),
            ("--report-windows", self.num_report_windows, 0),
            ("--max-shard-bytes", self.max_shard_bytes, 1),
        ):
            if value < lowest:
                raise ConfigError(f"{flag} {value}: expected at least {lowest}")


def choose_group_size(recipe: Recipe, in_features: dict[str, int]) -> int:
    """Returns the group size for matrices of these numbers of inputs, by name.

    Raises:
        ConfigError: the one that was asked for does not divide the inputs of one.
    """
    scheme = recipe.weight_scheme
    if scheme.is_blocked:
        wrong = next((name for name, width in in_features.items() if width > BLOCK_SIZE and width % BLOCK_SIZE), None)
        if wrong is not None:
            raise ConfigError(
                f"--scheme {scheme.name} wants blocks of {BLOCK_SIZE} inputs, and {wrong} has {in_features[wrong]}; "
                "--scheme fp8 has no blocks"
            )
        return BLOCK_SIZE
    if recipe.group_size is None:
        return next(size for size in scheme.group_sizes if _divides(size, in_features))
    if _divides(recipe.group_size, in_features):
        return recipe.group_size
    name, width = next((name, width) for name, width in in_features.items() if width % recipe.group_size)
    fitting = [str(size) for size in (128, 64, 32, 16, PER_CHANNEL) if _divides(size, in_features)]
    raise ConfigError(
        f"--group-size {recipe.group_size} does not divide the {width} inputs of {name}; "
        f"these fit: {', '.join(fitting)}"
    )


def _divides(size: int, in_features: dict[str, int]) -> bool:
    return size == PER_CHANNEL or all(width % size == 0 for width in in_features.values())
