# SPDX-License-Identifier: Apache-2.0
"""Renders chat templates in a process of its own: the child of `chat_template.ChatTemplate`.

A template comes with a checkpoint, so it is a stranger's program. The sandbox keeps it from the
interpreter; only a process can be kept from running for ever or eating all memory, whatever loop or C
function it is in. So the child lets the kernel end it: SIGALRM, not handled, when a rendering takes too
long, and a limit on its address space.

One JSON object per line comes in and goes out. The process ends with its stdin.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any, cast

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

_MEMORY_BYTES = 1 << 30
_MAX_TEMPLATES = 16


class TemplateRenderer:
    """Compiles and renders with Hugging Face's environment."""

    def __init__(self) -> None:
        self._environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationBlock]
        )
        environment = cast("Any", self._environment)  # jinja2 leaves the types of these two open
        environment.filters["tojson"] = _tojson
        environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        self._templates: dict[str, jinja2.Template] = {}

    def render(self, source: str, variables: dict[str, Any]) -> str:
        """Returns the text.

        Raises:
            jinja2.TemplateError: the template is not valid, or refuses its input.
        """
        template = self._templates.get(source)
        if template is None:
            if len(self._templates) >= _MAX_TEMPLATES:
                self._templates.clear()
            template = self._templates[source] = self._environment.from_string(source)
        return template.render(variables)


def answer(renderer: TemplateRenderer, request: dict[str, Any]) -> dict[str, Any]:
    """Returns {"text": ...}, or {"error": message, "kind": "syntax" | "refused" | "failed" | "size"}."""
    try:
        text = renderer.render(request["source"], request["variables"])
    except jinja2.TemplateSyntaxError as error:
        return {"error": f"line {error.lineno}: {error.message}", "kind": "syntax"}
    except _Refused as error:
        return {"error": str(error), "kind": "refused"}
    except MemoryError:
        return {"error": "", "kind": "size"}
    except Exception as error:  # a template can raise anything: it is a program
        return {"error": f"{type(error).__name__}: {error}"[:1000], "kind": "failed"}
    if len(text) > request["max_chars"]:
        return {"error": "", "kind": "size"}
    return {"text": text}


def main() -> None:
    """Answers requests until stdin ends."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    renderer = TemplateRenderer()
    for line in sys.stdin.buffer:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, request["timeout_s"])
        reply = json.dumps(answer(renderer, request))
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.stdout.buffer.write(reply.encode("ascii") + b"\n")
        sys.stdout.buffer.flush()


class _GenerationBlock(Extension):
    """{% generation %} marks what a model wrote, for training; a prompt has just its text."""

    tags = {"generation"}  # noqa: RUF012, jinja2's own way

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Refused(jinja2.TemplateError):
    """The template called raise_exception."""


def _raise_exception(message: str) -> None:
    raise _Refused(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own escapes HTML characters, which a prompt must not have.
    dumps: Callable[..., str] = json.dumps
    return dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


if __name__ == "__main__":
    main()
