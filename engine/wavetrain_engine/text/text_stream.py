# SPDX-License-Identifier: Apache-2.0
"""One request's updates, from token ids to text: detokenized, cut at stop strings, flushed at the end."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from wavetrain_engine.request import FinishReason, RequestUpdate, TokenLogprobs
from wavetrain_engine.sampling_params import SamplingParams
from wavetrain_engine.text.detokenizer import Detokenizer
from wavetrain_engine.text.stop import StopMatch, StopMatcher
from wavetrain_engine.text.tokenizer import Tokenizer


class TextDelta(msgspec.Struct, frozen=True, kw_only=True):
    """What an update means to the caller.

    Attributes:
        text: new text; deltas concatenate to the output's text.
        token_ids: new output tokens, EOS and stop tokens among them.
        logprobs: one entry per token of `token_ids`, where the request asked for them.
        finish_reason: set once, on the last delta that says anything.
        stop_reason: the stop string or the stop token's id that ended the text; None for EOS.
        is_stopped: a stop string ended the text: the core does not know and must be told to cancel.
    """

    text: str = ""
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    is_stopped: bool = False


class TextStream:
    """Follows one sequence. Not thread-safe: a request stays on one thread.

    Without a tokenizer, or with `detokenize=False`, the text is empty and the tokens pass through.

    A stop string is looked for in the text of the min_tokens-th output token and later ones only, so
    no output with one is shorter than that.
    """

    __slots__ = ("_detokenizer", "_includes_stop", "_is_finished", "_matcher", "_min_tokens", "_num_output_tokens")

    def __init__(
        self, tokenizer: Tokenizer | None, params: SamplingParams, prompt_token_ids: Sequence[int] = ()
    ) -> None:
        self._detokenizer: Detokenizer | None = None
        self._matcher: StopMatcher | None = None
        self._includes_stop = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        self._num_output_tokens = 0
        self._is_finished = False
        if tokenizer is not None and params.detokenize:
            self._detokenizer = Detokenizer(
                tokenizer, skip_special_tokens=params.skip_special_tokens, prompt_token_ids=prompt_token_ids
            )
            if params.stop:
                self._matcher = StopMatcher(params.stop, include_stop_str_in_output=self._includes_stop)

    @property
    def is_finished(self) -> bool:
        """Whether a delta with a finish reason was returned; all later ones are empty."""
        return self._is_finished

    def push(self, update: RequestUpdate) -> TextDelta:
        """Takes the next update of the request. After the end, every update gives an empty delta."""
        if self._is_finished:
            return TextDelta()
        if self._matcher is not None and self._detokenizer is not None:
            return self._push_matching(self._detokenizer, self._matcher, update)
        text = ""
        if self._detokenizer is not None:
            text = self._detokenizer.push(self._spoken(update))
            if update.finish_reason is not None:
                text += self._detokenizer.flush()
        self._num_output_tokens += len(update.new_token_ids)
        self._is_finished = update.finish_reason is not None
        return TextDelta(
            text=text,
            token_ids=update.new_token_ids,
            logprobs=update.logprobs,
            finish_reason=update.finish_reason,
            stop_reason=update.stop_token_id,
        )

    def _spoken(self, update: RequestUpdate) -> list[int]:
        """The ids whose text is output: not the EOS or stop token that ended the request, unless it is asked for."""
        if update.finish_reason is FinishReason.STOP and not self._includes_stop:
            return update.new_token_ids[:-1]
        return update.new_token_ids

    def _push_matching(self, detokenizer: Detokenizer, matcher: StopMatcher, update: RequestUpdate) -> TextDelta:
        # One token at a time: which token completes a stop string must not depend on how many came together.
        parts: list[str] = []
        for num_taken, token_id in enumerate(self._spoken(update), 1):
            self._num_output_tokens += 1
            if self._min_tokens and self._num_output_tokens == self._min_tokens:
                parts.append(matcher.restart())
            delta = detokenizer.push((token_id,))
            if self._num_output_tokens < self._min_tokens:
                parts.append(delta)
                continue
            # Whole characters that are held back (a run of byte tokens) are looked at too: with this
            # token as the last one they would be output as they are.
            pending = detokenizer.pending()
            if pending and "\ufffd" not in pending and matcher.would_match(delta + pending):
                delta += pending
            found = matcher.push(delta)
            if isinstance(found, StopMatch):
                return self._stopped(update, parts, found, num_taken)
            parts.append(found)
        if update.finish_reason is not None:
            found = matcher.push(detokenizer.flush()) if self._num_output_tokens >= self._min_tokens else ""
            if isinstance(found, StopMatch):
                return self._stopped(update, parts, found, len(update.new_token_ids))
            parts += (found, matcher.flush())
            self._is_finished = True
        return TextDelta(
            text="".join(parts),
            token_ids=update.new_token_ids,
            logprobs=update.logprobs,
            finish_reason=update.finish_reason,
            stop_reason=update.stop_token_id,
        )

    def _stopped(self, update: RequestUpdate, parts: list[str], match: StopMatch, num_tokens: int) -> TextDelta:
        self._is_finished = True
        return TextDelta(
            text="".join((*parts, match.text)),
            token_ids=update.new_token_ids[:num_tokens],
            logprobs=None if update.logprobs is None else update.logprobs[:num_tokens],
            finish_reason=FinishReason.STOP,
            stop_reason=match.stop,
            is_stopped=update.finish_reason is None,
        )
