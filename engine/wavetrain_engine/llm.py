# SPDX-License-Identifier: Apache-2.0
"""The offline API: `LLM(model=dir).generate(prompts)`, the in-process twin of the served engine."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import queue
import threading
import weakref
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

from wavetrain_engine.config import EngineConfig
from wavetrain_engine.errors import RequestError, RequestFailed
from wavetrain_engine.facts import EngineFacts
from wavetrain_engine.local_engine import LocalEngine
from wavetrain_engine.outputs import RequestOutput
from wavetrain_engine.plan import Executor
from wavetrain_engine.prompt import PromptLike, listed_prompts
from wavetrain_engine.request import EngineRequest, RequestUpdate
from wavetrain_engine.request_factory import PreparedRequest, RequestFactory, load_text
from wavetrain_engine.sampling_params import SamplingParams
from wavetrain_engine.stats import EngineStats
from wavetrain_engine.text.chat_template import ChatTemplate
from wavetrain_engine.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from rich.progress import Progress

Conversation = Sequence[Mapping[str, Any]]


class LLM:
    """A model in this process that runs many requests together.

    Its methods may be called from several threads; their requests share the batch. Close it, or use it as
    a context manager: it holds the model's memory and a thread until then.

    Args:
        model: checkpoint directory in Hugging Face's layout, or a GGUF file.
        dtype: of weights and activations; `auto` is the checkpoint's.
        skip_tokenizer_init: take and return token ids only.
        flags: engine options by their names (`max_num_seqs=64`, ...).

    Raises:
        ConfigError: an unknown flag, or one with a wrong value.
        CheckpointError: the checkpoint is missing, broken or not supported.
    """

    def __init__(self, model: str, *, dtype: str = "auto", skip_tokenizer_init: bool = False, **flags: Any) -> None:
        config = EngineConfig.from_flags(
            {"model": str(model), "dtype": dtype, "skip_tokenizer_init": skip_tokenizer_init, **flags}
        )
        tokenizer, chat_template = load_text(config)
        self._start(config, LocalEngine.load(_with_room_for_all(config)), tokenizer, chat_template)

    @classmethod
    def from_executor(
        cls,
        config: EngineConfig,
        facts: EngineFacts,
        executor: Executor,
        tokenizer: Tokenizer | None = None,
        chat_template: ChatTemplate | None = None,
    ) -> LLM:
        """Makes an LLM of an executor that is loaded already, and now belongs to it."""
        llm = cls.__new__(cls)
        llm._start(config, LocalEngine(_with_room_for_all(config), lambda: (executor, facts)), tokenizer, chat_template)
        return llm

    def _start(
        self,
        config: EngineConfig,
        engine: LocalEngine,
        tokenizer: Tokenizer | None,
        chat_template: ChatTemplate | None,
    ) -> None:
        self._engine = engine
        self._factory = RequestFactory(engine.facts, tokenizer, chat_template)
        self._request_ids = itertools.count()
        # Where a server refuses requests, here they wait.
        self._seats = threading.Semaphore(_num_seats(config))
        self._close = weakref.finalize(self, _close, engine, self._factory)

    @property
    def facts(self) -> EngineFacts:
        """What was found out at load."""
        return self._engine.facts

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer.

        Raises:
            RequestError: there is none (skip_tokenizer_init).
        """
        if self._factory.tokenizer is None:
            raise RequestError("there is no tokenizer (skip_tokenizer_init)")
        return self._factory.tokenizer

    def generate(
        self,
        prompts: PromptLike | Sequence[PromptLike],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int | Sequence[int] = 0,
        cache_salt: str = "",
        echo: bool = False,
        show_progress: bool = False,
    ) -> list[RequestOutput]:
        """Generates for all prompts together; returns when the last is done, in the order of the prompts.

        Nothing runs if one prompt or parameter is wrong. A request that fails while it runs (NaN logits)
        does not disturb the others: its output has the finish reason `error`, and its `error` says why.

        Args:
            prompts: one or a list of: text, token ids, {"prompt": ...}, {"prompt_token_ids": ...}.
            sampling_params: for all, or one for each prompt; None means the checkpoint's defaults.
            priority: lower runs earlier; for all, or one for each prompt.
            echo: outputs begin with their prompt.

        Raises:
            RequestError: a prompt or parameter is wrong.
            EngineDead: the engine is closed, or failed.
        """
        listed = listed_prompts(prompts)
        params = _per_prompt("sampling_params", sampling_params, len(listed), SamplingParams | None)
        priorities = _per_prompt("priority", priority, len(listed), int)
        prepared = [
            self._factory.prepare(
                str(next(self._request_ids)),
                prompt,
                params[index],
                priority=priorities[index],
                cache_salt=cache_salt,
                echo=echo,
            )
            for index, prompt in enumerate(listed)
        ]
        with _progress_bar(len(prepared), show_progress) as bar:
            return _Batch(self._engine, self._seats, prepared, bar).run()

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        priority: int | Sequence[int] = 0,
        cache_salt: str = "",
        show_progress: bool = False,
    ) -> list[RequestOutput]:
        """Generates the next message of one conversation or of several, by the checkpoint's chat template.

        Args:
            messages: conversations are lists of {"role": ..., "content": ...}.
            chat_template: a Jinja template instead of the checkpoint's.
            chat_template_kwargs: what else the template may use.

        Raises:
            RequestError: as `generate`; or there is no template, or it refuses the messages.
            CheckpointError: the checkpoint's template is not valid.
            EngineDead: the engine is closed, or failed.
        """
        is_single = bool(messages) and isinstance(messages[0], Mapping)
        conversations = cast("Sequence[Conversation]", [messages] if is_single else messages)
        prompts = [
            self._factory.chat_prompt(
                conversation,
                add_generation_prompt=add_generation_prompt,
                tools=tools,
                source=chat_template,
                **(chat_template_kwargs or {}),
            )
            for conversation in conversations
        ]
        outputs = self.generate(
            [{"prompt_token_ids": prompt.token_ids} for prompt in prompts],
            sampling_params,
            priority=priority,
            cache_salt=cache_salt,
            show_progress=show_progress,
        )
        return [output.with_prompt(prompt.text) for output, prompt in zip(outputs, prompts, strict=True)]

    def read_stats(self) -> EngineStats:
        """Returns the engine's counters, taken between two steps. Raises EngineDead when it is closed."""
        return self._engine.read_stats()

    def close(self) -> None:
        """Ends the engine thread and frees the model. Idempotent; running requests end with EngineDead."""
        self._close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Batch:
    """The requests of one `generate`: feeds them in as there are seats, until the last has ended."""

    def __init__(
        self, engine: LocalEngine, seats: threading.Semaphore, prepared: list[PreparedRequest], bar: _Bar | None
    ) -> None:
        self._engine = engine
        self._seats = seats
        self._prepared = prepared
        self._bar = bar
        self._updates: queue.SimpleQueue[RequestUpdate] = queue.SimpleQueue()
        self._waiting = deque(
            (request, item, index) for item in prepared for index, request in enumerate(item.children)
        )
        self._running: dict[str, tuple[PreparedRequest, int]] = {}

    def run(self) -> list[RequestOutput]:
        """Returns the outputs; on an error or an interrupt nothing of the batch goes on."""
        try:
            while self._waiting or self._running:
                self._submit()
                self._take(self._updates.get())
        except BaseException:
            self._engine.cancel(list(self._running))
            raise
        return [item.collector.output() for item in self._prepared]

    def _submit(self) -> None:
        while self._waiting and self._seats.acquire(blocking=not self._running):
            request, item, index = self._waiting.popleft()
            self._running[request.request_id] = (item, index)
            self._hand_over(request)

    def _hand_over(self, request: EngineRequest) -> None:
        try:
            self._engine.submit(request, self._sink)
        except BaseException:
            self._seats.release()
            raise

    def _sink(self, update: RequestUpdate) -> None:
        self._updates.put(update)
        if update.finish_reason is not None:
            self._seats.release()

    def _take(self, update: RequestUpdate) -> None:
        item, index = self._running[update.request_id]
        if item.collector.push(index, update):
            self._engine.cancel([update.request_id])
        if update.finish_reason is not None:
            del self._running[update.request_id]
            error = item.collector.error
            if error is not None and not isinstance(error, RequestFailed):
                raise error
            if self._bar is not None and item.collector.is_finished:
                self._bar.advance()


class _Bar:
    """Counts finished requests on a progress bar."""

    def __init__(self, progress: Progress, num_requests: int) -> None:
        self._progress = progress
        self._task = progress.add_task("requests", total=num_requests)

    def advance(self) -> None:
        self._progress.advance(self._task)


@contextlib.contextmanager
def _progress_bar(num_requests: int, is_shown: bool) -> Generator[_Bar | None, None, None]:
    if not is_shown:
        yield None
        return
    # Imported here, as it takes longer than all of this package and is seldom wanted.
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()) as progress:
        yield _Bar(progress, num_requests)


def _num_seats(config: EngineConfig) -> int:
    """How many requests the core is given at a time."""
    return config.scheduler.max_num_seqs + config.scheduler.max_queue_size


def _with_room_for_all(config: EngineConfig) -> EngineConfig:
    """Returns the core's configuration: with blocks short, all it is given may have to wait, and none is refused."""
    scheduler = dataclasses.replace(config.scheduler, max_queue_size=_num_seats(config))
    return dataclasses.replace(config, scheduler=scheduler)


def _per_prompt(name: str, value: Any, num_prompts: int, kind: Any) -> list[Any]:
    """Returns one value for each prompt.

    Raises:
        RequestError: as many values as prompts are needed.
    """
    if isinstance(value, kind):
        return [value] * num_prompts
    values = list(cast("Sequence[Any]", value)) if isinstance(value, Sequence) else [value]
    if len(values) != num_prompts or not all(isinstance(item, kind) for item in values):
        raise RequestError(f"{name} must be one value or one for each of the {num_prompts} prompts")
    return values


def _close(engine: LocalEngine, factory: RequestFactory) -> None:
    engine.close()
    factory.close()
