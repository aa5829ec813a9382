# SPDX-License-Identifier: Apache-2.0
"""Chat messages to one prompt, by the template that comes with a checkpoint.

The template is rendered in a child process (`template_worker` has the reasons), started with the first
rendering and kept: a rendering costs about 0.2 ms, the first one a tenth of a second.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from wavetrain_engine.errors import CheckpointError, RequestError
from wavetrain_engine.gguf.gguf_file import GgufFile
from wavetrain_engine.gguf.vocabulary import chat_templates
from wavetrain_engine.model_location import ModelLocation
from wavetrain_engine.text.tokenizer_files import read_json

Message = Mapping[str, Any]

TIMEOUT_S = 5.0
MAX_CHARS = 16 << 20


class ChatTemplate:
    """One checkpoint's template. Thread-safe; renderings take turns.

    Args:
        sources: template by name; `default` is used, or `tool_use` where there are tools.
        named_tokens: `bos_token` and so on, for the template to use.
    """

    def __init__(
        self,
        sources: Mapping[str, str],
        named_tokens: Mapping[str, str],
        *,
        timeout_s: float = TIMEOUT_S,
        max_chars: int = MAX_CHARS,
    ) -> None:
        self._sources = dict(sources)
        self._named_tokens = dict(named_tokens)
        self._timeout_s = timeout_s
        self._max_chars = max_chars
        self._worker = _Worker()
        self._close = weakref.finalize(self, self._worker.stop)

    @classmethod
    def load(
        cls, model_dir: Path | str, named_tokens: Mapping[str, str], *, timeout_s: float = TIMEOUT_S
    ) -> ChatTemplate | None:
        """Reads chat_template.jinja, or else `chat_template` of tokenizer_config.json; None where there is neither.

        Of a GGUF file it is what its metadata has.

        Raises:
            CheckpointError: it is there and is not a template's text.
        """
        gguf = ModelLocation.find(model_dir).gguf
        if gguf is not None:
            templates = chat_templates(GgufFile.open(gguf).metadata)
            return cls(templates, named_tokens, timeout_s=timeout_s) if templates else None
        path = Path(model_dir) / "chat_template.jinja"
        if path.is_file():
            try:
                return cls({"default": path.read_text(encoding="utf-8")}, named_tokens, timeout_s=timeout_s)
            except (OSError, ValueError) as error:
                raise CheckpointError("chat_template.jinja cannot be read as UTF-8 text") from error
        value: object = read_json(Path(model_dir) / "tokenizer_config.json").get("chat_template")
        if value is None:
            return None
        sources = {"default": value} if isinstance(value, str) else _named_sources(value)
        return cls(sources, named_tokens, timeout_s=timeout_s)

    @property
    def source(self) -> str:
        """The template that is used where there are no tools."""
        return self._sources["default"]

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        source: str | None = None,
        **variables: Any,
    ) -> str:
        """Returns the prompt's text. It has its special tokens: encode it with `add_special_tokens=False`.

        Args:
            source: a template instead of the checkpoint's.
            variables: what else the template may use (`enable_thinking`, ...); JSON values.

        Raises:
            RequestError: the template refuses the messages or fails on them, takes too long, or gives too
                much text; or the messages are no JSON values.
            CheckpointError: the checkpoint's template is not valid.
        """
        own = self._sources["tool_use" if tools and "tool_use" in self._sources else "default"]
        request = {
            "source": own if source is None else source,
            "variables": {
                **self._named_tokens,
                **variables,
                "messages": messages,
                "tools": tools,
                "add_generation_prompt": add_generation_prompt,
            },
            "timeout_s": self._timeout_s,
            "max_chars": self._max_chars,
        }
        try:
            line = json.dumps(request).encode("ascii")
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError("chat messages must be JSON values: objects, lists, strings and numbers") from error
        return self._text_of(self._worker.ask(line), is_own=source is None)

    def close(self) -> None:
        """Ends the child process. Idempotent; a later rendering starts a new one."""
        self._worker.stop()

    def _text_of(self, reply: dict[str, Any] | None, *, is_own: bool) -> str:
        if reply is None:
            raise RequestError(
                f"the chat template took longer than {self._timeout_s:g} s or failed badly on these messages; "
                "send others, or use another template"
            )
        if "text" in reply:
            return reply["text"]
        kind, message = reply["kind"], reply["error"]
        if kind == "syntax":
            raise (CheckpointError if is_own else RequestError)(f"the chat template is not valid: {message}")
        if kind == "refused":
            raise RequestError(f"the chat template refuses the messages: {message}")
        if kind == "size":
            raise RequestError("the chat template makes too much text of these messages; send fewer or shorter ones")
        raise RequestError(f"the chat template fails on these messages: {message}")


class _Worker:
    """The child process: started when it is needed, and again after it was ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, line: bytes) -> dict[str, Any] | None:
        """Returns the reply; None where the child ended without one, which its time limit makes sure of."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._discard()
                self._process = _start()
            stdin, stdout = self._process.stdin, self._process.stdout
            if stdin is None or stdout is None:
                raise RuntimeError("the template worker was started without pipes")
            try:
                stdin.write(line + b"\n")
                stdin.flush()
                reply = stdout.readline()
            except BrokenPipeError:
                reply = b""
            except BaseException:  # an interrupt leaves a reply behind that nobody must take for theirs
                self._discard()
                raise
            if not reply.endswith(b"\n"):
                self._discard()
                return None
            return json.loads(reply)

    def stop(self) -> None:
        """Ends the child, if there is one."""
        with self._lock:
            self._discard()

    def _discard(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # what was not written yet goes with the child
                    pipe.close()


def _start() -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "wavetrain_engine.text.template_worker"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def _named_sources(value: object) -> dict[str, str]:
    """Older checkpoints list several templates as {"name": ..., "template": ...}."""
    sources: dict[str, str] = {}
    for item in cast("list[Any]", value) if isinstance(value, list) else [value]:
        entry = cast("dict[str, Any]", item) if isinstance(item, dict) else {}
        name, template = entry.get("name"), entry.get("template")
        if not isinstance(name, str) or not isinstance(template, str):
            raise CheckpointError("tokenizer_config.json: chat_template must be a text or a list of named texts")
        sources[name] = template
    if "default" not in sources:
        raise CheckpointError("tokenizer_config.json: chat_template has no template named default")
    return sources
