# SPDX-License-Identifier: Apache-2.0
"""Gathers the updates of a request's children into RequestOutputs. Never imports torch."""

from __future__ import annotations

from collections.abc import Sequence

from wavetrain_engine.errors import WavetrainError
from wavetrain_engine.fan_out import error_of, logprob_dict, prompt_logprob_dicts
from wavetrain_engine.outputs import CompletionOutput, Logprob, RequestOutput
from wavetrain_engine.request import RequestUpdate, TokenLogprobs
from wavetrain_engine.sampling_params import SamplingParams
from wavetrain_engine.text.text_stream import TextDelta, TextStream
from wavetrain_engine.text.tokenizer import Tokenizer


class OutputCollector:
    """Follows one request from its first update to its end. Not thread-safe.

    Attributes:
        error: the first error of any child; None while all is well.

    Args:
        params: the caller's, with its n.
        echo: outputs begin with the prompt, text and token ids (logprobs stay the output's own).
    """

    def __init__(
        self,
        *,
        request_id: str,
        prompt: str | None,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        tokenizer: Tokenizer | None,
        echo: bool = False,
    ) -> None:
        self.request_id = request_id
        self.error: WavetrainError | None = None
        self._prompt = prompt
        self._prompt_token_ids = list(prompt_token_ids)
        self._tokenizer = tokenizer
        self._prompt_entries: list[TokenLogprobs] | None = None
        self._prompt_logprobs: list[dict[int, Logprob] | None] | None = None
        self._num_cached_tokens: int | None = None
        self._sequences = [_Sequence(index, params, tokenizer, self._prompt_token_ids) for index in range(params.n)]
        if echo:
            text = prompt if prompt is not None else tokenizer.decode(prompt_token_ids) if tokenizer else ""
            for sequence in self._sequences:
                sequence.begin_with(text, self._prompt_token_ids)

    @property
    def is_finished(self) -> bool:
        """Whether every child has ended."""
        return all(sequence.finish_reason is not None for sequence in self._sequences)

    def push(self, index: int, update: RequestUpdate) -> bool:
        """Takes an update of child `index`.

        Returns:
            True where a stop string has just ended the child: the core does not know, cancel it there.
        """
        sequence = self._sequences[index]
        if update.prompt_logprobs is not None:
            self._prompt_entries = [*(self._prompt_entries or []), *update.prompt_logprobs]
            self._prompt_logprobs = None
        if update.stats is not None and (index == 0 or self._num_cached_tokens is None):
            self._num_cached_tokens = update.stats.num_cached_tokens
        if sequence.finish_reason is None and self.error is None:
            self.error = error_of(update)
        return sequence.push(update).is_stopped

    def output(self) -> RequestOutput:
        """Returns everything so far."""
        return self._output([sequence.completion() for sequence in self._sequences])

    def take_delta(self) -> RequestOutput:
        """Returns what is new since the call before: text, token ids and logprobs of that stretch only."""
        return self._output([sequence.take_delta() for sequence in self._sequences])

    def _output(self, completions: list[CompletionOutput]) -> RequestOutput:
        if self._prompt_entries is not None and self._prompt_logprobs is None:
            self._prompt_logprobs = prompt_logprob_dicts(self._prompt_entries, self._tokenizer)
        return RequestOutput(
            request_id=self.request_id,
            prompt=self._prompt,
            prompt_token_ids=self._prompt_token_ids,
            prompt_logprobs=self._prompt_logprobs,
            outputs=completions,
            finished=self.is_finished,
            num_cached_tokens=self._num_cached_tokens,
            error=self.error,
        )


class _Sequence:
    """One child: everything so far, and where the last delta ended."""

    def __init__(
        self, index: int, params: SamplingParams, tokenizer: Tokenizer | None, prompt_token_ids: Sequence[int]
    ) -> None:
        self._index = index
        self._tokenizer = tokenizer
        self._stream = TextStream(tokenizer, params, prompt_token_ids)
        self._text = ""
        self._token_ids: list[int] = []
        self._logprobs: list[dict[int, Logprob]] | None = None if params.logprobs is None else []
        self._cumulative_logprob = 0.0
        self._stop_reason: str | int | None = None
        self._taken = (0, 0, 0)  # characters, tokens and logprobs that take_delta has returned
        self.finish_reason: str | None = None

    def begin_with(self, text: str, token_ids: Sequence[int]) -> None:
        self._text = text
        self._token_ids = list(token_ids)

    def push(self, update: RequestUpdate) -> TextDelta:
        delta = self._stream.push(update)
        self._text += delta.text
        self._token_ids += delta.token_ids
        if self._logprobs is not None and delta.logprobs is not None:
            self._logprobs += [logprob_dict(entry, self._tokenizer) for entry in delta.logprobs]
            self._cumulative_logprob += sum(entry.logprobs[0] for entry in delta.logprobs)
        if delta.finish_reason is not None:
            self.finish_reason = delta.finish_reason.value
            self._stop_reason = delta.stop_reason
        return delta

    def completion(self) -> CompletionOutput:
        return self._completion((0, 0, 0))

    def take_delta(self) -> CompletionOutput:
        start = self._taken
        self._taken = (len(self._text), len(self._token_ids), len(self._logprobs or ()))
        return self._completion(start)

    def _completion(self, start: tuple[int, int, int]) -> CompletionOutput:
        return CompletionOutput(
            index=self._index,
            text=self._text[start[0] :],
            token_ids=self._token_ids[start[1] :],
            cumulative_logprob=None if self._logprobs is None else self._cumulative_logprob,
            logprobs=None if self._logprobs is None else self._logprobs[start[2] :],
            finish_reason=self.finish_reason,
            stop_reason=self._stop_reason,
        )
