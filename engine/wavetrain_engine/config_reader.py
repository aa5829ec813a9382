# SPDX-License-Identifier: Apache-2.0
"""Typed, bounded access to the values of one JSON object, with messages that name the key.

config.json comes from strangers: every number read here has a range, so that none can ask for a giant
allocation or a division by zero later.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

from wavetrain_engine.errors import ConfigError


class ConfigReader:
    """Reads keys of a JSON object. A key whose value is null counts as missing, as in Hugging Face's configs.

    Every method raises ConfigError for a wrong type, a value out of range, or, without a default, a missing key.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._values = values
        self._where = where

    def has(self, name: str) -> bool:
        """Whether the key is there, if only as null."""
        return name in self._values

    def value(self, name: str) -> Any:
        """Returns the value as it is; None where it is missing."""
        return self._values.get(name)

    def integer(self, name: str, default: int | None = None, *, low: int = 1, high: int) -> int:
        """Returns an int of low..high; `default` where it is missing."""
        value = self._present(name, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(name, "an integer")
        if not low <= value <= high:
            raise ConfigError(f"{self._where}: {name} must be an integer from {low} to {high}, got {_shown(value)}")
        return value

    def number(self, name: str, default: float | None = None, *, low: float, high: float) -> float:
        """Returns a float strictly above `low`, at most `high`; `default` where it is missing."""
        value = self._present(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.wrong(name, "a number")
        # A NaN fails the comparison too.
        if not low < value <= high:
            raise ConfigError(
                f"{self._where}: {name} must be a number above {low:g}, at most {high:g}, got {_shown(value)}"
            )
        return float(value)

    def optional_number(self, name: str, *, low: float = 0.0, high: float) -> float | None:
        """As `number`, but None where it is missing."""
        return None if self.value(name) is None else self.number(name, low=low, high=high)

    def boolean(self, name: str, default: bool) -> bool:
        """Returns a bool; `default` where it is missing."""
        value = self._present(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def string(self, name: str, default: str | None = None) -> str:
        """Returns a str; `default` where it is missing."""
        value = self._present(name, default)
        if not isinstance(value, str):
            raise self.wrong(name, "a string")
        return value

    def strings(self, name: str) -> list[str]:
        """Returns a list of str; empty where it is missing."""
        value = self.value(name)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in cast("list[Any]", value)):
            raise self.wrong(name, "a list of strings")
        return cast("list[str]", value)

    def integers(self, name: str) -> list[int]:
        """Returns a list of int; empty where it is missing."""
        value = self.value(name)
        if value is None:
            return []
        if not isinstance(value, list) or not all(type(item) is int for item in cast("list[Any]", value)):
            raise self.wrong(name, "a list of integers")
        return cast("list[int]", value)

    def mapping(self, name: str) -> dict[str, Any]:
        """Returns a JSON object; empty where it is missing."""
        value = self.value(name)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self.wrong(name, "an object")
        return cast("dict[str, Any]", value)

    def wrong(self, name: str, expected: str) -> ConfigError:
        """Returns the error for a value of the wrong type."""
        return ConfigError(f"{self._where}: {name} must be {expected}, got {_shown(self.value(name))}")

    def _present(self, name: str, default: Any) -> Any:
        value = self.value(name)
        if value is None:
            value = default
        if value is None:
            raise ConfigError(f"{self._where}: {name} is missing")
        return value


def _shown(value: Any) -> str:
    """Returns a short form of any JSON value; Python refuses to print integers of thousands of digits."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 256:
        return f"an integer of about {math.ceil(value.bit_length() * math.log10(2))} digits"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
