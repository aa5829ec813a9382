# SPDX-License-Identifier: Apache-2.0
"""Completing one prompt at a time in a terminal: with an engine in this process, or with a server.

Both forms stream text to a callback and end early, with the request cancelled, when the person presses Ctrl-C.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from wavetrain_cli.errors import CommandError
from wavetrain_engine.config import EngineConfig

if TYPE_CHECKING:
    from wavetrain_engine import AsyncLLM

Show = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What came of a prompt. `is_cancelled` is set where Ctrl-C ended it."""

    num_output_tokens: int
    first_token_s: float
    total_s: float
    is_cancelled: bool = False

    def describe(self) -> str:
        """The numbers in one line; the rate is that of the tokens after the first."""
        rate = (self.num_output_tokens - 1) / max(self.total_s - self.first_token_s, 1e-9)
        shown = f", {rate:.1f} tokens/s" if self.num_output_tokens > 1 else ""
        return f"{self.num_output_tokens} tokens, first after {self.first_token_s * 1000:.0f} ms{shown}"


class Completer(Protocol):
    """Completes prompts, one after the other."""

    def complete(self, prompt: str, options: Mapping[str, Any], show: Show) -> Completion:
        """Streams the completion to `show`. `options` are sampling parameters by vLLM's names.

        Raises:
            WavetrainError, CommandError: the prompt or an option is refused, or the engine or the server fails.
        """
        ...

    def close(self) -> None:
        """Frees the engine or the connection."""
        ...


class LocalCompleter:
    """An engine in this process."""

    def __init__(self, config: EngineConfig) -> None:
        """Loads the model.

        Raises:
            WavetrainError: it cannot be loaded.
        """
        from wavetrain_engine import AsyncLLM

        flags = {name: value for section in config.to_mapping().values() for name, value in section.items()}
        self._llm: AsyncLLM = AsyncLLM(**flags)
        self._loop = asyncio.new_event_loop()

    def complete(self, prompt: str, options: Mapping[str, Any], show: Show) -> Completion:
        return self._loop.run_until_complete(_until_interrupt(self._complete(prompt, options, _Stopwatch(show))))

    def close(self) -> None:
        self._loop.run_until_complete(self._llm.close())
        self._loop.close()

    async def _complete(self, prompt: str, options: Mapping[str, Any], watch: _Stopwatch) -> Completion:
        from wavetrain_engine import SamplingParams

        params = SamplingParams.from_mapping(options, self._llm.facts.generation.sampling_defaults())
        outputs = self._llm.generate(prompt, params, is_delta=True)
        try:
            async with contextlib.aclosing(outputs):
                async for output in outputs:
                    watch.show(output.outputs[0].text, len(output.outputs[0].token_ids))
        except asyncio.CancelledError:
            return watch.finish(is_cancelled=True)
        return watch.finish()


class RemoteCompleter:
    """A server's model `llm`, over gRPC."""

    def __init__(self, url: str) -> None:
        """Prepares the channel; connects with the first prompt.

        Raises:
            ValueError: not an address.
        """
        from wavetrain_client import Client

        self._client = Client(url)

    def complete(self, prompt: str, options: Mapping[str, Any], show: Show) -> Completion:
        from wavetrain_client import ClientError

        watch = _Stopwatch(show)
        try:
            with self._client.stream(prompt, **options) as chunks:
                for chunk in chunks:
                    # A server that does not count its tokens sends about one per chunk.
                    watch.show(chunk.text, 1 if chunk.num_output_tokens is None else chunk.num_output_tokens)
        except KeyboardInterrupt:  # leaving the block has cancelled the request
            return watch.finish(is_cancelled=True)
        except ClientError as error:
            raise CommandError(str(error)) from error
        return watch.finish()

    def close(self) -> None:
        self._client.close()


class _Stopwatch:
    """Passes text on and takes the times."""

    def __init__(self, show: Show) -> None:
        self._show = show
        self._num_tokens = 0
        self._start_s = time.monotonic()
        self._first_s: float | None = None

    def show(self, text: str, num_new_tokens: int) -> None:
        if self._first_s is None and num_new_tokens:
            self._first_s = time.monotonic()
        self._num_tokens += num_new_tokens
        if text:
            self._show(text)

    def finish(self, *, is_cancelled: bool = False) -> Completion:
        now_s = time.monotonic()
        return Completion(
            num_output_tokens=self._num_tokens,
            first_token_s=(self._first_s or now_s) - self._start_s,
            total_s=now_s - self._start_s,
            is_cancelled=is_cancelled,
        )


async def _until_interrupt(work: Coroutine[Any, Any, Completion]) -> Completion:
    """Runs `work`; Ctrl-C cancels it instead of raising KeyboardInterrupt in the middle of the loop."""
    loop, task = asyncio.get_running_loop(), asyncio.ensure_future(work)
    loop.add_signal_handler(signal.SIGINT, task.cancel)
    try:
        return await task
    finally:
        loop.remove_signal_handler(signal.SIGINT)
