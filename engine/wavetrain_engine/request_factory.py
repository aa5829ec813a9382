# SPDX-License-Identifier: Apache-2.0
"""Makes core requests of what a caller of the offline API asks for, and refuses what is wrong with it."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wavetrain_engine.config import EngineConfig
from wavetrain_engine.core.admission import check_prompt, check_sampling_params
from wavetrain_engine.errors import RequestError
from wavetrain_engine.facts import EngineFacts
from wavetrain_engine.fan_out import child_requests, resolve_params
from wavetrain_engine.output_collector import OutputCollector
from wavetrain_engine.prompt import Prompt, PromptLike
from wavetrain_engine.request import EngineRequest
from wavetrain_engine.sampling_params import SamplingParams
from wavetrain_engine.text.chat_template import ChatTemplate
from wavetrain_engine.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A checked request: what the core runs, and who gathers its outputs."""

    children: list[EngineRequest]
    collector: OutputCollector


class RequestFactory:
    """Knows the tokenizer, the chat template and the model's limits. Thread-safe."""

    def __init__(self, facts: EngineFacts, tokenizer: Tokenizer | None, chat_template: ChatTemplate | None) -> None:
        self.tokenizer = tokenizer
        self._facts = facts
        self._chat_template = chat_template
        self._defaults = facts.generation.sampling_defaults()

    def prepare(
        self,
        request_id: str,
        prompt: PromptLike,
        params: SamplingParams | None,
        *,
        priority: int = 0,
        timeout_s: float | None = None,
        cache_salt: str = "",
        echo: bool = False,
    ) -> PreparedRequest:
        """Checks everything that can be checked before it runs.

        Args:
            params: None means the checkpoint's defaults.

        Raises:
            RequestError: the prompt or a parameter is wrong.
        """
        asked = self._defaults if params is None else params
        _check_options(asked, priority, timeout_s, cache_salt)
        asked = resolve_params(asked, self.tokenizer)
        parsed = Prompt.parse(prompt, self.tokenizer, max_tokens=self._facts.max_model_len)
        request = EngineRequest(
            request_id=request_id,
            prompt_token_ids=parsed.token_ids,
            sampling_params=asked,
            priority=priority,
            deadline_s=None if timeout_s is None else time.monotonic() + timeout_s,
            cache_salt=cache_salt,
            arrival_time_ns=time.time_ns(),
        )
        check_prompt(request, self._facts)
        check_sampling_params(asked.replace(n=1), self._facts)
        collector = OutputCollector(
            request_id=request_id,
            prompt=parsed.text,
            prompt_token_ids=parsed.token_ids,
            params=asked,
            tokenizer=self.tokenizer,
            echo=echo,
        )
        return PreparedRequest(child_requests(request), collector)

    def chat_prompt(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> Prompt:
        """Renders a conversation; `options` are those of `ChatTemplate.render`.

        Raises:
            RequestError: there is no tokenizer or no template, or the template refuses the messages.
            CheckpointError: the template is not valid.
        """
        if self.tokenizer is None:
            raise RequestError("there is no tokenizer (skip_tokenizer_init), so there is no chat; give token ids")
        template = self._chat_template
        if template is None:
            if options.get("source") is None:
                raise RequestError("the checkpoint has no chat template; give one as chat_template")
            template = ChatTemplate({"default": ""}, self.tokenizer.named_tokens)
        text = template.render(messages, **options)
        return Prompt(text, self.tokenizer.encode(text, False, max_tokens=self._facts.max_model_len))

    def close(self) -> None:
        """Ends what renders chat templates."""
        if self._chat_template is not None:
            self._chat_template.close()


def _check_options(params: object, priority: object, timeout_s: object, cache_salt: object) -> None:
    """Over IPC the types are checked when a frame is decoded; here a wrong one would end the engine thread.

    Raises:
        RequestError: one has a wrong type or value.
    """
    if not isinstance(params, SamplingParams):
        raise RequestError(f"sampling_params must be SamplingParams, got {type(params).__name__}")
    if isinstance(priority, bool) or not isinstance(priority, int):
        raise RequestError(f"priority must be an integer, got {type(priority).__name__}")
    if not isinstance(cache_salt, str):
        raise RequestError(f"cache_salt must be a string, got {type(cache_salt).__name__}; empty is none")
    if timeout_s is None:
        return
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float) or not timeout_s > 0:
        raise RequestError(f"timeout_s must be a number, more than 0, got {timeout_s!r:.40}")


def load_text(config: EngineConfig) -> tuple[Tokenizer | None, ChatTemplate | None]:
    """Loads the tokenizer and the chat template of a checkpoint; neither with skip_tokenizer_init.

    Raises:
        CheckpointError: tokenizer.json is missing, or a file is broken.
    """
    model_dir = Path(config.model.model)
    # A missing checkpoint is the loader's to report: it is not the tokenizer that is missing.
    if config.model.skip_tokenizer_init or not config.model.model or not os.path.exists(model_dir):
        return None, None
    tokenizer = Tokenizer.load(model_dir)
    return tokenizer, ChatTemplate.load(model_dir, tokenizer.named_tokens)
