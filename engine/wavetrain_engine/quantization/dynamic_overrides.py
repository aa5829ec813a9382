# SPDX-License-Identifier: Apache-2.0
"""`dynamic` of GPTQModel: what is different for some layers, by regular expressions. Without torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast

from wavetrain_engine.config_reader import ConfigReader
from wavetrain_engine.errors import ConfigError
from wavetrain_engine.quantization.module_targets import compile_pattern

_MAX_ENTRIES = 1024
_EXCLUDED, _INCLUDED = "-:", "+:"


class DynamicOverrides:
    """Values of `quantization_config` that some layers have their own of. The first expression that matches decides."""

    def __init__(self, config: ConfigReader, where: str) -> None:
        entries = config.mapping("dynamic")
        if len(entries) > _MAX_ENTRIES:
            raise ConfigError(f"{where}: dynamic has {len(entries)} entries; {_MAX_ENTRIES} are allowed")
        self._entries: list[tuple[re.Pattern[str], dict[str, Any] | None]] = []
        for key, value in entries.items():
            if not isinstance(value, dict):
                raise ConfigError(f"{where}: dynamic {key[:60]!r} must be an object")
            expression = key.removeprefix(_EXCLUDED).removeprefix(_INCLUDED)
            pattern = compile_pattern(expression, f"{where}: dynamic")
            self._entries.append((pattern, None if key.startswith(_EXCLUDED) else cast("dict[str, Any]", value)))

    @property
    def all_values(self) -> list[Mapping[str, Any]]:
        """Every set of values, for checking them."""
        return [values for _, values in self._entries if values is not None]

    def find(self, layer: str) -> Mapping[str, Any] | None:
        """Returns the values that the layer has its own of; None: it is not quantized."""
        for pattern, values in self._entries:
            if pattern.match(layer):
                return values
        return {}
