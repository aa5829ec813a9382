# SPDX-License-Identifier: Apache-2.0
"""Reads the gateway's TOML and JSON files into pydantic models, with messages that name the place and the remedy."""

from __future__ import annotations

import difflib
import json
import sys
import typing
from typing import Any, TypeVar, cast

from pydantic import BaseModel, ValidationError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

ModelT = TypeVar("ModelT", bound=BaseModel)


class FileError(ValueError):
    """A file says something that cannot be; the message has the place, what was wrong and what is expected."""


def parse_file(data: bytes, name: str, model: type[ModelT]) -> ModelT:
    """Reads `data` as JSON where `name` ends in `.json`, else as TOML, and checks it against `model`.

    Raises:
        FileError: it is no such file, or does not fit the model.
    """
    kind = "JSON" if name.endswith(".json") else "TOML"
    try:
        text = data.decode("utf-8")
        values: Any = json.loads(text) if kind == "JSON" else cast("Any", tomllib).loads(text)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{name}: is not {kind}: {error}") from None
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise FileError(f"{name}: {describe(error, model)}") from None


def describe(error: ValidationError, model: type[BaseModel]) -> str:
    """The first thing wrong, as `key[2].tokens_per_minute: Input should be ...`; an unknown name with its nearest."""
    errors = error.errors(include_url=False, include_context=False)
    # A misspelt name leaves another one missing; it is the misspelling that has to be told of.
    first = next((item for item in errors if item["type"] == "extra_forbidden"), errors[0])
    place = first["loc"]
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).removeprefix(".")
    if first["type"] == "extra_forbidden":
        known = _names_at(model, place[:-1])
        nearest = difflib.get_close_matches(str(place[-1]), known, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known are {', '.join(sorted(known))}"
        return f"{path}: there is no such setting; {hint}"
    message = first["msg"].removeprefix("Value error, ")
    given = first["input"]
    shown = f", got {str(given)[:80]!r}" if isinstance(given, (str, int, float, bool)) else ""
    return f"{path}: {message}{shown}" if path else f"{message}{shown}"


def _names_at(model: type[BaseModel], place: tuple[int | str, ...]) -> list[str]:
    """The settings that the model at this place has, by the names a file gives them."""
    for part in place:
        if isinstance(part, int):
            continue
        field = next((item for key, item in model.model_fields.items() if (item.alias or key) == part), None)
        inner = _model_in(field.annotation) if field is not None else None
        if inner is None:
            break
        model = inner
    return [item.alias or key for key, item in model.model_fields.items()]


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for item in typing.get_args(annotation):
        found = _model_in(item)
        if found is not None:
            return found
    return None
