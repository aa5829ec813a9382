# SPDX-License-Identifier: Apache-2.0
"""Chat messages as OpenAI has them, and as chat templates want them."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeAlias, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from wavetrain_gateway.errors import InvalidRequest

_Name = Annotated[str, Field(max_length=256)]
_KNOWN_PARTS = ("text",)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class TextPart(_Strict):
    """A part of a message's content; text is the only kind there is."""

    type: Literal["text"]
    text: str


def _refuse_other_parts(value: object) -> Any:
    """Once for all parts of a message: a call for each would be most of the work on them."""
    for part in cast("list[Any]", value) if isinstance(value, list) else []:
        kind: object = cast("dict[str, Any]", part).get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind not in _KNOWN_PARTS:
            raise ValueError(f"content parts of type {kind[:32]!r} are not supported: the models here take text only")
    return cast("Any", value)


Content: TypeAlias = (
    str | Annotated[list[TextPart], Field(max_length=256, fail_fast=True), BeforeValidator(_refuse_other_parts)]
)


class SystemMessage(_Strict):
    """What the conversation is about. `developer` is OpenAI's newer word; templates know `system`."""

    role: Literal["system", "developer"]
    content: Content
    name: _Name | None = None


class UserMessage(_Strict):
    """What the user says."""

    role: Literal["user"]
    content: Content
    name: _Name | None = None


class FunctionCall(_Strict):
    """A call that the assistant asked for; its arguments are JSON text."""

    name: _Name
    arguments: str


class ToolCall(_Strict):
    """A tool call of an earlier turn."""

    id: _Name
    type: Literal["function"] = "function"
    function: FunctionCall


class AssistantMessage(_Strict):
    """What the model said before."""

    role: Literal["assistant"]
    content: Content | None = None
    name: _Name | None = None
    refusal: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=128)] | None = None


class ToolMessage(_Strict):
    """What a tool answered."""

    role: Literal["tool"]
    content: Content
    tool_call_id: _Name
    name: _Name | None = None


Message: TypeAlias = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")
]


def template_messages(messages: list[Message]) -> list[dict[str, Any]]:
    """The messages as templates want them: content as one text, arguments of calls as objects.

    Raises:
        InvalidRequest: the arguments of an earlier call are no JSON object.
    """
    return [_template_message(message, index) for index, message in enumerate(messages)]


def _template_message(message: Message, index: int) -> dict[str, Any]:
    found: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": _text_of(message.content),
    }
    if message.name is not None:
        found["name"] = message.name
    if isinstance(message, ToolMessage):
        found["tool_call_id"] = message.tool_call_id
    if isinstance(message, AssistantMessage) and message.tool_calls:
        found["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments, index)},
            }
            for call in message.tool_calls
        ]
    return found


def _text_of(content: str | list[TextPart] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(part.text for part in content)


def _arguments(text: str, index: int) -> dict[str, Any]:
    try:
        value: object = json.loads(text or "{}")
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise InvalidRequest(
            "the arguments of a tool call must be the text of a JSON object", param=f"messages.{index}.tool_calls"
        )
    return cast("dict[str, Any]", value)
