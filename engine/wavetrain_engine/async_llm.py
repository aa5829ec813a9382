# SPDX-License-Identifier: Apache-2.0
"""The offline API for asyncio: every request is an async iterator of outputs."""

from __future__ import annotations

import asyncio
import itertools
import weakref
from collections import deque
from collections.abc import AsyncGenerator
from types import TracebackType
from typing import Any

from wavetrain_engine.config import EngineConfig
from wavetrain_engine.errors import RequestError
from wavetrain_engine.facts import EngineFacts
from wavetrain_engine.local_engine import LocalEngine
from wavetrain_engine.outputs import RequestOutput
from wavetrain_engine.plan import Executor
from wavetrain_engine.prompt import PromptLike
from wavetrain_engine.request import RequestUpdate
from wavetrain_engine.request_factory import PreparedRequest, RequestFactory, load_text
from wavetrain_engine.sampling_params import SamplingParams
from wavetrain_engine.stats import EngineStats
from wavetrain_engine.text.chat_template import ChatTemplate
from wavetrain_engine.text.tokenizer import Tokenizer


class AsyncLLM:
    """A model in this process that streams. Loading and closing are slow: `await AsyncLLM.load(...)` keeps the
    event loop free.

    `generate` may be called from any event loop, many times at once; a request belongs to its loop.

    Args, Raises: as LLM.
    """

    def __init__(self, model: str, *, dtype: str = "auto", skip_tokenizer_init: bool = False, **flags: Any) -> None:
        config = EngineConfig.from_flags(
            {"model": str(model), "dtype": dtype, "skip_tokenizer_init": skip_tokenizer_init, **flags}
        )
        tokenizer, chat_template = load_text(config)
        self._start(LocalEngine.load(config), tokenizer, chat_template)

    @classmethod
    async def load(cls, model: str, **flags: Any) -> AsyncLLM:
        """Does in a thread what the constructor does."""
        return await asyncio.to_thread(lambda: cls(model, **flags))

    @classmethod
    def from_executor(
        cls,
        config: EngineConfig,
        facts: EngineFacts,
        executor: Executor,
        tokenizer: Tokenizer | None = None,
        chat_template: ChatTemplate | None = None,
    ) -> AsyncLLM:
        """Makes an AsyncLLM of an executor that is loaded already, and now belongs to it."""
        llm = cls.__new__(cls)
        llm._start(LocalEngine(config, lambda: (executor, facts)), tokenizer, chat_template)
        return llm

    def _start(self, engine: LocalEngine, tokenizer: Tokenizer | None, chat_template: ChatTemplate | None) -> None:
        self._engine = engine
        self._factory = RequestFactory(engine.facts, tokenizer, chat_template)
        self._request_ids = itertools.count()
        self._unfinished: dict[str, list[str]] = {}
        self._mailboxes: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Mailbox] = weakref.WeakKeyDictionary()
        self._close = weakref.finalize(self, _close, engine, self._factory)

    @property
    def facts(self) -> EngineFacts:
        """What was found out at load."""
        return self._engine.facts

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer. Raises RequestError where there is none (skip_tokenizer_init)."""
        if self._factory.tokenizer is None:
            raise RequestError("there is no tokenizer (skip_tokenizer_init)")
        return self._factory.tokenizer

    async def generate(
        self,
        prompt: PromptLike,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        timeout_s: float | None = None,
        cache_salt: str = "",
        echo: bool = False,
        is_delta: bool = False,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yields the output as it grows, the last one with `finished`. Updates that came together are one output.

        The request ends with the iterator: when it is closed, or the task that runs it is cancelled.

        Args:
            request_id: for `cancel`; unique among unfinished requests. None chooses one.
            timeout_s: the request ends with DeadlineExceeded after this time.
            is_delta: each output has only what is new, instead of everything so far.

        Raises:
            RequestError: the prompt or a parameter is wrong, or the request_id is in use.
            QueueFull: as many requests wait as may.
            DeadlineExceeded: `timeout_s` passed.
            RequestFailed: the engine could not finish this request.
            EngineDead: the engine is closed, or failed.
        """
        identity = f"async-{next(self._request_ids)}" if request_id is None else request_id
        if identity in self._unfinished:
            raise RequestError(f"request_id {identity!r} is in use by an unfinished request; choose another")
        prepared = self._factory.prepare(
            identity, prompt, sampling_params, priority=priority, timeout_s=timeout_s, cache_salt=cache_salt, echo=echo
        )
        collector = prepared.collector
        child_ids = [child.request_id for child in prepared.children]
        self._unfinished[identity] = child_ids
        stream = _Stream(self._mailbox(), prepared, self._engine)
        try:
            stream.submit()
            while not collector.is_finished:
                await stream.wait()
                if collector.error is not None:
                    raise collector.error
                yield collector.take_delta() if is_delta else collector.output()
        finally:
            self._unfinished.pop(identity, None)
            stream.cancel()

    async def cancel(self, request_id: str) -> None:
        """Ends a request; its iterator ends after one last output, with finish reason `cancelled`.

        An unknown or finished id is no error.
        """
        self._engine.cancel(self._unfinished.get(request_id, []))

    async def chat_prompt(self, messages: Any, **options: Any) -> dict[str, list[int]]:
        """Renders a conversation by the checkpoint's chat template, as a prompt for `generate`.

        Raises:
            RequestError: there is no template, or it refuses the messages.
            CheckpointError: the checkpoint's template is not valid.
        """
        prompt = await asyncio.to_thread(lambda: self._factory.chat_prompt(messages, **options))
        return {"prompt_token_ids": prompt.token_ids}

    async def read_stats(self) -> EngineStats:
        """Returns the engine's counters, taken between two steps. Raises EngineDead when it is closed."""
        return await asyncio.to_thread(self._engine.read_stats)

    async def close(self) -> None:
        """Ends the engine thread and frees the model. Idempotent; running requests end with EngineDead."""
        await asyncio.to_thread(self._close)

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _mailbox(self) -> _Mailbox:
        loop = asyncio.get_running_loop()
        mailbox = self._mailboxes.get(loop)
        if mailbox is None:
            mailbox = self._mailboxes[loop] = _Mailbox(loop)
        return mailbox


class _Stream:
    """One request on its event loop: all methods but `_sink` run there."""

    def __init__(self, mailbox: _Mailbox, prepared: PreparedRequest, engine: LocalEngine) -> None:
        self._mailbox = mailbox
        self._engine = engine
        self._collector = prepared.collector
        self._children = prepared.children
        self._running = {child.request_id: index for index, child in enumerate(prepared.children)}
        self._news = asyncio.Event()

    def submit(self) -> None:
        for child in self._children:
            self._engine.submit(child, self._sink)

    async def wait(self) -> None:
        """Returns when there is news; it is in the collector then."""
        await self._news.wait()
        self._news.clear()

    def cancel(self) -> None:
        """Ends what still runs."""
        if self._running:
            self._engine.cancel(list(self._running))

    def take(self, update: RequestUpdate) -> None:
        index = self._running.get(update.request_id)
        if index is None:
            return
        if self._collector.push(index, update):
            self._engine.cancel([update.request_id])
        if update.finish_reason is not None:
            del self._running[update.request_id]
        self._news.set()

    def _sink(self, update: RequestUpdate) -> None:
        self._mailbox.put(self, update)


class _Mailbox:
    """Updates from the engine thread to one event loop, which is woken once for all that came together."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._items: deque[tuple[_Stream, RequestUpdate]] = deque()
        self._is_woken = False

    def put(self, stream: _Stream, update: RequestUpdate) -> None:
        self._items.append((stream, update))
        if self._is_woken:
            return
        self._is_woken = True
        loop = self._loop()
        try:
            if loop is not None:
                loop.call_soon_threadsafe(self._deliver)
        except RuntimeError:  # the loop was closed: nobody is left to read
            self._items.clear()

    def _deliver(self) -> None:
        # First, or an update put in while this runs might wake nobody.
        self._is_woken = False
        while self._items:
            stream, update = self._items.popleft()
            stream.take(update)


def _close(engine: LocalEngine, factory: RequestFactory) -> None:
    engine.close()
    factory.close()
