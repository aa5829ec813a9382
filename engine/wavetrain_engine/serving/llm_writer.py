# SPDX-License-Identifier: Apache-2.0
"""The responses of `llm`: text, in the legacy dialect or in vLLM's.

They differ in how several streamed sequences are told apart. Legacy: a response is about one, `sequence_index` says
which. vLLM: a response is about all, each tensor has one element per sequence. So has the one response without
streaming, in both.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from wavetrain_engine.request import TokenLogprobs
from wavetrain_engine.serving.live_request import LiveSequence, Unsent
from wavetrain_engine.serving.tensors import tensor, text_tensor
from wavetrain_engine.serving.usage_outputs import News, index_outputs, usage_outputs
from wavetrain_engine.text.tokenizer import Tokenizer

# JSON has no infinity; vLLM writes this number for a forbidden token.
_LEAST_LOGPROB = -9999.0


class LlmWriter:
    """Writes text responses. Without streaming there is exactly one, when all sequences have ended."""

    def __init__(self, tokenizer: Tokenizer, *, is_legacy: bool) -> None:
        self._tokenizer = tokenizer
        self._is_legacy = is_legacy

    def write(self, sequences: Sequence[LiveSequence]) -> list[list[Any]]:
        """Takes what is ready to be sent; returns each response's output tensors."""
        if self._is_legacy and sequences[0].options.stream and len(sequences) > 1:
            return [
                self._write_group([sequence]) + index_outputs(sequence, has_batch_dimension=False)
                for sequence in sequences
                if _is_due([sequence])
            ]
        return [self._write_group(sequences)] if _is_due(sequences) else []

    def _write_group(self, group: Sequence[LiveSequence]) -> list[Any]:
        options = group[0].options
        prompts = [sequence.prompt_text for sequence in group]
        news = [sequence.take_unsent() for sequence in group]
        texts = [prompt + unsent.text for prompt, unsent in zip(prompts, news, strict=True)]
        outputs = [
            _make_text("text_output", texts),
            *usage_outputs([list(map(News, group, news))], has_batch_dimension=False),
        ]
        if options.return_finish_reason:
            reasons = [sequence.finish_reason.value if sequence.finish_reason else "None" for sequence in group]
            outputs.append(_make_text("finish_reason", reasons))
        if options.return_cumulative_logprob:
            sums = [sequence.cumulative_logprob for sequence in group]
            outputs.append(_make("cumulative_logprob", sums, np.float32))
        if options.return_logprobs:
            outputs.append(_make_text("logprobs", [self._logprobs_json(unsent) for unsent in news]))
        outputs += self._prompt_outputs(group[0], news[0])
        if options.return_num_input_tokens:
            num_tokens = len(group[0].request.prompt_token_ids)
            outputs.append(_make("num_input_tokens", [num_tokens], np.uint32))
        if options.return_num_output_tokens:
            outputs.append(_make("num_output_tokens", [len(unsent.token_ids) for unsent in news], np.uint32))
        return outputs

    def _prompt_outputs(self, first: LiveSequence, unsent: Unsent) -> list[Any]:
        """What is about the prompt all sequences share: its log-probabilities, and how much of it was cached."""
        outputs: list[Any] = []
        if unsent.prompt_logprobs is not None:
            token_id = first.request.prompt_token_ids[0]
            # Nothing comes before the first token, so it has no probability.
            entry = {"logprob": None, "rank": None, "decoded_token": self._tokenizer.token_text(token_id)}
            rest = [self._entry(position) for position in unsent.prompt_logprobs]
            outputs.append(_make_text("prompt_logprobs", [json.dumps([{str(token_id): entry}, *rest])]))
        if first.options.return_perf_metrics and first.is_finished and first.stats is not None:
            outputs.append(_make("num_cached_tokens", [first.stats.num_cached_tokens], np.int32))
        return outputs

    def _logprobs_json(self, unsent: Unsent) -> str:
        """vLLM's form: a list with an object per token, token id to its logprob, rank and text."""
        if not unsent.logprobs:
            return "null"
        return json.dumps([self._entry(position) for position in unsent.logprobs])

    def _entry(self, position: TokenLogprobs) -> dict[str, Any]:
        columns = zip(position.token_ids, position.logprobs, position.ranks, strict=True)
        return {
            str(token_id): {
                "logprob": max(logprob, _LEAST_LOGPROB),
                "rank": rank,
                "decoded_token": self._tokenizer.token_text(token_id),
            }
            for token_id, logprob, rank in columns
        }


def _is_due(group: Sequence[LiveSequence]) -> bool:
    if all(sequence.is_closed for sequence in group):
        return False
    is_finished = all(sequence.is_finished for sequence in group)
    if is_finished or not group[0].options.stream:
        return is_finished
    return any(sequence.unsent.text or sequence.unsent.finish_reason for sequence in group)


def _make(name: str, values: Sequence[Any], dtype: Any) -> Any:
    return tensor(name, [values], dtype, has_batch_dimension=False)


def _make_text(name: str, texts: Sequence[str]) -> Any:
    return text_tensor(name, [texts], has_batch_dimension=False)
