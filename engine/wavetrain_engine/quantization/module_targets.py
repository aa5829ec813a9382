# SPDX-License-Identifier: Apache-2.0
"""Which layers an entry of config.json means: by name, by regular expression, by class. Without torch.

Expressions come from strangers. Python's matcher can take exponential time, so those with nested repetition, or with
many repetitions, are refused: names have at most a few dozen characters, and real expressions two or three stars.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from wavetrain_engine.errors import ConfigError
from wavetrain_engine.quantization.stored_format import LayerKind

REGEX_PREFIX = "re:"
_MAX_LENGTH = 200
_MAX_REPETITIONS = 6
_MAX_ENTRIES = 20_000
_REPETITION = re.compile(r"(?<!\\)[*+]|(?<!\\)\{\d*,\d*\}")
_REPEATED_GROUP = re.compile(r"\)(?:[*+]|\{)")
_EXPRESSION_SIGN = re.compile(r"[*+?^$|()\[\]{}\\]")


def compile_pattern(text: str, where: str, *, ends_with_step: bool = False) -> re.Pattern[str]:
    """Returns the regular expression.

    Args:
        ends_with_step: what it matches has to end where a step of a dotted name does.

    Raises:
        ConfigError: it is none, is too long, or may take for ever to match.
    """
    if len(text) > _MAX_LENGTH:
        raise ConfigError(f"{where}: a pattern of {len(text)} characters is too long; {_MAX_LENGTH} are allowed")
    if _REPEATED_GROUP.search(text) or len(_REPETITION.findall(text)) > _MAX_REPETITIONS:
        raise ConfigError(
            f"{where}: the pattern {text!r} repeats a group or has more than {_MAX_REPETITIONS} repetitions; such "
            "patterns are not served, as they may take for ever to match"
        )
    try:
        return re.compile(rf"(?:{text})(?:(?<=\.)|(?=\.|$))" if ends_with_step else text)
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(f"{where}: {text!r} is not a valid regular expression: {error}") from error


class LayerTargets:
    """The layers that a list of targets means, as compressed-tensors reads it.

    Each is the name of a layer, `re:` and an expression for the start of a name, or a class: Linear, Embedding.
    """

    def __init__(self, targets: Iterable[str], where: str) -> None:
        entries = list(targets)
        if len(entries) > _MAX_ENTRIES:
            raise ConfigError(f"{where} has {len(entries)} entries; {_MAX_ENTRIES} are allowed")
        self._plain = {entry for entry in entries if not entry.startswith(REGEX_PREFIX)}
        expressions = dict.fromkeys(entry for entry in entries if entry.startswith(REGEX_PREFIX))
        self._patterns = [compile_pattern(entry.removeprefix(REGEX_PREFIX), where) for entry in expressions]

    def matches_name(self, layer: str) -> bool:
        """Whether one of them is the name, or an expression for it."""
        return layer in self._plain or any(pattern.match(layer) for pattern in self._patterns)

    def matches_class(self, kind: LayerKind) -> bool:
        """Whether one of them is the class."""
        return kind in self._plain

    def matches(self, layer: str, kind: LayerKind) -> bool:
        """Whether one of them means the layer."""
        return self.matches_class(kind) or self.matches_name(layer)


class SkippedModules:
    """The layers that lists such as `modules_to_not_convert` leave out.

    An entry is a layer, a module that layers are in, or the end or middle of such a name, in whole steps of it; one
    with signs of a regular expression is matched from the start of the name, as transformers does.
    """

    def __init__(self, entries: Iterable[str], where: str) -> None:
        listed = list(entries)
        if len(listed) > _MAX_ENTRIES:
            raise ConfigError(f"{where} has {len(listed)} entries; {_MAX_ENTRIES} are allowed")
        self._names = [f".{entry.strip('.')}." for entry in listed if not _EXPRESSION_SIGN.search(entry)]
        self._patterns = [
            compile_pattern(entry, where, ends_with_step=True) for entry in listed if _EXPRESSION_SIGN.search(entry)
        ]

    def matches(self, layer: str) -> bool:
        """Whether an entry means the layer."""
        dotted = f".{layer}."
        return any(name in dotted for name in self._names) or any(item.match(layer) for item in self._patterns)
