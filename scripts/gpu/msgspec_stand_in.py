# SPDX-License-Identifier: Apache-2.0
"""As much of msgspec as the engine needs within one process, for a machine that has only torch, triton, transformers.

The GPU scripts run from a checkout where nothing can be installed. Served engines use msgspec itself: its structs are
made several times as fast as these, and it encodes them.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from types import ModuleType
from typing import Any

from typing_extensions import dataclass_transform


class ValidationError(ValueError):
    """A value does not fit; raised by nothing here, as nothing is validated."""


@dataclass_transform(kw_only_default=False)
class Struct:
    """Fields by annotation, made into a dataclass with slots as the class is defined."""

    __struct_fields__: tuple[str, ...] = ()

    def __init_subclass__(
        cls,
        frozen: bool = False,
        kw_only: bool = False,
        **_only_for_encoding: Any,
    ) -> None:
        # A dataclass refuses a list as a default, which a struct copies.
        for name, default in list(vars(cls).items()):
            if not name.startswith("__") and isinstance(default, list | dict | set):
                setattr(cls, name, dataclasses.field(default_factory=default.copy))
        # Not frozen: such a dataclass takes several times as long to make, and a step makes one for each request.
        dataclasses.dataclass(unsafe_hash=frozen, kw_only=kw_only)(cls)
        cls.__struct_fields__ = tuple(field.name for field in dataclasses.fields(cls))  # pyright: ignore


def replace(struct: Any, /, **changes: Any) -> Any:
    """Returns a copy with other values."""
    return dataclasses.replace(struct, **changes)


def asdict(struct: Any) -> dict[str, Any]:
    """Returns the fields by name; not of structs within."""
    return {name: getattr(struct, name) for name in struct.__struct_fields__}


def convert(values: dict[str, Any], kind: type) -> Any:
    """Makes a struct of its fields by name. Types are taken on trust."""
    return kind(**values)


def install_where_missing() -> bool:
    """Puts this in msgspec's place where it is not installed; returns whether it did."""
    if "msgspec" in sys.modules or importlib.util.find_spec("msgspec") is not None:
        return False
    sys.modules.update(as_modules())
    return True


def as_modules() -> dict[str, ModuleType]:
    """Returns the module, and its `structs`, by their names."""
    module, structs = ModuleType("msgspec"), ModuleType("msgspec.structs")
    for name, value in {"replace": replace, "asdict": asdict, "force_setattr": object.__setattr__}.items():
        setattr(structs, name, value)
    for name, value in {
        "Struct": Struct,
        "ValidationError": ValidationError,
        "convert": convert,
        "structs": structs,
    }.items():
        setattr(module, name, value)
    return {"msgspec": module, "msgspec.structs": structs}
