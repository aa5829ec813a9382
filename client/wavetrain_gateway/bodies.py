# SPDX-License-Identifier: Apache-2.0
"""A request's body: read within bounds of size and time, parsed once, checked against its schema.

A body that is meant to hurt costs no more than one of its size that is not: sizes of lists and objects are looked at
before they are validated, and validation stops at a list's first wrong element.
"""

from __future__ import annotations

import asyncio
import difflib
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, ClassVar, Protocol, TypeVar, cast

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, from_json

from wavetrain_gateway.errors import InvalidRequest, RequestTimeout, TooLarge, UnsupportedMedia

_MAX_FIELDS = 128
_MAX_SHOWN_CHARS = 64
_MAX_SMALL_BYTES = 64 << 10  # parsed within two milliseconds whatever is in it


class Schema(Protocol):
    """A request model: pydantic's, with what `parse_body` needs to know beside."""

    max_sizes: ClassVar[dict[str, int]]
    refused: ClassVar[dict[str, str]]
    model_fields: ClassVar[dict[str, Any]]

    @classmethod
    def model_validate(cls, obj: Any) -> Any: ...


SchemaT = TypeVar("SchemaT", bound=BaseModel)


class ClientGone(Exception):
    """The peer closed the connection: there is nobody to answer."""


async def read_body(receive: Any, headers: Mapping[str, str], *, max_bytes: int, timeout_s: float) -> bytes:
    """Returns the whole body.

    Raises:
        TooLarge: it has more than `max_bytes`, by its header or as it comes.
        RequestTimeout: it did not arrive in time.
        UnsupportedMedia: it is not sent as JSON, or encoded.
        ClientGone: the connection was closed before its end.
    """
    media = headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != "application/json":
        raise UnsupportedMedia("send the body as JSON, with the header content-type: application/json")
    if headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise UnsupportedMedia("send the body without a content-encoding")
    length = headers.get("content-length")
    if length is not None and length.isdigit() and int(length[:18]) > max_bytes:
        raise _too_large(max_bytes)
    try:
        return await asyncio.wait_for(_read(receive, max_bytes), timeout_s)
    except asyncio.TimeoutError:
        raise RequestTimeout(f"the body did not arrive within {timeout_s:g} s") from None


async def _read(receive: Any, max_bytes: int) -> bytes:
    parts: list[bytes] = []
    num_bytes = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        body: bytes = message.get("body", b"")
        num_bytes += len(body)
        if num_bytes > max_bytes:
            raise _too_large(max_bytes)
        parts.append(body)
        if not message.get("more_body", False):
            return b"".join(parts)


class LargeBodies:
    """Has large bodies parsed one in each turn of the event loop, so that many at once hold nobody up for longer than
    one does.
    """

    def __init__(self) -> None:
        self._lock = asyncio.Lock()

    @asynccontextmanager
    async def turn(self, num_bytes: int) -> AsyncGenerator[None, None]:
        """Waits for the turn of a body of this size; small ones need none."""
        if num_bytes <= _MAX_SMALL_BYTES:
            yield
            return
        async with self._lock:
            try:
                yield
            finally:
                await asyncio.sleep(0)


def parse_json(data: bytes | str) -> object:
    """Reads JSON.

    Raises:
        ValueError: it is none.
    """
    # Names are not cached: of a body with many different ones that is most of the work.
    return from_json(data, allow_inf_nan=False, cache_strings="none")


def parse_body(data: bytes | str, schema: type[SchemaT], max_sizes: Mapping[str, int] | None = None) -> SchemaT:
    """Reads a JSON object as `schema` has it.

    Args:
        max_sizes: the most that lists and objects may hold, before the schema's own.

    Raises:
        InvalidRequest: it is no JSON object, or a field is unknown, missing, of a wrong type or out of range; `param`
            names it.
    """
    try:
        values = parse_json(data)
    except (ValueError, RecursionError):
        raise InvalidRequest(
            "the body is not valid JSON (UTF-8, no NaN, not nested too deep)", code="invalid_json"
        ) from None
    if not isinstance(values, dict):
        raise InvalidRequest("the body must be a JSON object")
    return parse_object(cast("dict[str, Any]", values), schema, max_sizes)


def parse_object(fields: dict[str, Any], schema: type[SchemaT], max_sizes: Mapping[str, int] | None = None) -> SchemaT:
    """Does what `parse_body` does with what was parsed already."""
    kind = cast("type[Schema]", schema)
    sizes = {**kind.max_sizes, **(max_sizes or {})}
    if len(fields) > _MAX_FIELDS:
        raise InvalidRequest(f"the body has {len(fields)} fields; at most {_MAX_FIELDS} are read")
    for name, value in fields.items():
        if name not in kind.model_fields:
            raise _unknown(name, kind)
        if isinstance(value, list | dict) and len(cast("list[Any]", value)) > sizes.get(name, _MAX_FIELDS):
            most = sizes.get(name, _MAX_FIELDS)
            raise InvalidRequest(
                f"{name} holds {len(cast('list[Any]', value))} elements; at most {most} are read", param=name
            )
    try:
        return cast("SchemaT", kind.model_validate(fields))
    except ValidationError as error:
        raise _invalid(error, fields) from None


def _unknown(name: str, kind: type[Schema]) -> InvalidRequest:
    shown = name[:_MAX_SHOWN_CHARS]
    if name in kind.refused:
        return InvalidRequest(f"{name}: {kind.refused[name]}", param=name, code="unsupported_parameter")
    nearest = difflib.get_close_matches(shown, list(kind.model_fields), n=1)
    hint = f"did you mean {nearest[0]!r}?" if nearest else "leave it out"
    return InvalidRequest(f"there is no field {shown!r}; {hint}", param=shown, code="unknown_parameter")


# Fields whose values are accepted only as far as they are enforced; pydantic's message would not say so.
_ONLY_AS_FAR = {
    "response_format": "only {'type': 'text'} is supported: output is not constrained to JSON or a schema here",
    "tool_choice": "only 'none' is supported: this server does not enforce tool calls",
    "store": "nothing is stored here; only false is supported",
    "modalities": "the models here take and make text only",
    "service_tier": "only 'auto' and 'default' are supported",
    "prompt": "prompt must be a text, a list of texts, a list of token ids or a list of such lists; none empty",
}


def _invalid(error: ValidationError, fields: Mapping[str, Any]) -> InvalidRequest:
    errors = error.errors(include_url=False, include_context=False, include_input=False)
    # Of several forms that a field may have, what is said of ours is more to the point than what of text is.
    # Else what got furthest: a list with a wrong element is told of its element, not that it is no text.
    first = next((item for item in errors[:_MAX_FIELDS] if item["type"] == "value_error"), _furthest(errors))
    place = [str(part)[:_MAX_SHOWN_CHARS] for part in first["loc"]]
    name = place[0] if place else None
    if first["type"] == "missing" and len(place) == 1:
        return InvalidRequest(f"{name} is missing; send it with every request", param=name, code="missing_parameter")
    if name in _ONLY_AS_FAR and name in fields:
        code = None if name == "prompt" else "unsupported_value"
        return InvalidRequest(_ONLY_AS_FAR[name], param=name, code=code)
    path = ".".join(place[:1] + [part for part in place[1:] if not _is_form(part)])
    message = " ".join(first["msg"].removeprefix("Value error, ").split())[:300]
    return InvalidRequest(f"{path}: {message}", param=path or name)


def _furthest(errors: Sequence[ErrorDetails]) -> ErrorDetails:
    """Of what is said of the first wrong value, by each form it may have, the error that lies deepest in it."""
    place = errors[0]["loc"][:-1]
    return max((item for item in errors[:_MAX_FIELDS] if item["loc"][: len(place)] == place), key=_depth_of)


def _depth_of(error: ErrorDetails) -> int:
    return len(error["loc"])


def _is_form(part: str) -> bool:
    """Whether a part of an error's place is no field but one of the forms that a field may have."""
    return part == "str" or part.startswith(("list[", "function-", "constrained-"))


def _too_large(max_bytes: int) -> TooLarge:
    return TooLarge(f"the body has more than {max_bytes} bytes; send less, or several requests")
