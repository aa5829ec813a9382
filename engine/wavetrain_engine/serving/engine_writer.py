# SPDX-License-Identifier: Apache-2.0
"""The responses of `engine`: token ids, and for the ensemble's detokenizer what it makes text from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from wavetrain_engine.request import FinishReason
from wavetrain_engine.serving.contracts import DETOKENIZER_SPAN, DETOKENIZER_TAIL_IDS, DETOKENIZER_TOKEN_IDS
from wavetrain_engine.serving.detokenizer_window import Window, WindowTracker
from wavetrain_engine.serving.live_request import LiveSequence, Unsent
from wavetrain_engine.serving.tensors import tensor
from wavetrain_engine.serving.usage_outputs import usage_outputs
from wavetrain_engine.text.tokenizer import Tokenizer


class EngineWriter:
    """Writes one response per sequence with news; without streaming, per finished sequence."""

    def __init__(self, sequences: Sequence[LiveSequence], detokenizer_of: Tokenizer | None) -> None:
        """`detokenizer_of`: the tokenizer, where the request comes from an ensemble with a detokenizer."""
        self._tokenizer = detokenizer_of
        self._trackers = [
            None if detokenizer_of is None else WindowTracker(detokenizer_of, sequence.request.prompt_token_ids)
            for sequence in sequences
        ]

    def write(self, sequences: Sequence[LiveSequence]) -> list[list[Any]]:
        """Takes what is ready to be sent; returns each response's output tensors."""
        return [
            self._write_one(sequence, tracker, sequences)
            for sequence, tracker in zip(sequences, self._trackers, strict=True)
            if self._is_due(sequence)
        ]

    def _is_due(self, sequence: LiveSequence) -> bool:
        if sequence.is_closed:
            return False
        if sequence.is_finished or not sequence.options.stream:
            return sequence.is_finished
        # In an ensemble a response costs a whole request to the detokenizer: none without text.
        return bool(sequence.unsent.text if self._tokenizer is not None else sequence.unsent.token_ids)

    def _write_one(
        self, sequence: LiveSequence, tracker: WindowTracker | None, sequences: Sequence[LiveSequence]
    ) -> list[Any]:
        unsent = sequence.take_unsent()
        has_prompt = not sequence.options.stream and not sequence.options.exclude_input
        prompt_ids = sequence.request.prompt_token_ids if has_prompt else []
        token_ids = [*prompt_ids, *unsent.token_ids]
        outputs = [
            _make("output_ids", [token_ids], np.int32),
            _make("sequence_length", [len(token_ids)], np.int32),
            *usage_outputs(sequence, unsent, sequences, has_batch_dimension=True),
        ]
        if sequence.options.return_num_input_tokens:
            outputs.append(_make("num_input_tokens", [len(sequence.request.prompt_token_ids)], np.int32))
        if sequence.options.return_num_output_tokens:
            outputs.append(_make("num_output_tokens", [len(unsent.token_ids)], np.int32))
        if self._tokenizer is not None and tracker is not None:
            outputs += _window_tensors(_window(self._tokenizer, tracker, sequence, unsent, prompt_ids))
        return outputs


def _window(
    tokenizer: Tokenizer, tracker: WindowTracker, sequence: LiveSequence, unsent: Unsent, prompt_ids: list[int]
) -> Window:
    has_silent_end = unsent.finish_reason is FinishReason.STOP and not isinstance(unsent.stop_reason, str)
    spoken = unsent.token_ids[:-1] if has_silent_end else unsent.token_ids
    if not prompt_ids:
        return tracker.advance(spoken, unsent.text, is_final=sequence.is_finished)
    num_prompt_chars = len(tokenizer.decode(prompt_ids))
    return Window(
        tail_ids=[],
        token_ids=[*prompt_ids, *spoken],
        start=0,
        end=num_prompt_chars + len(unsent.text),
        is_final=True,
    )


def _window_tensors(window: Window) -> list[Any]:
    return [
        _make(DETOKENIZER_TAIL_IDS, window.tail_ids, np.int32),
        _make(DETOKENIZER_TOKEN_IDS, window.token_ids, np.int32),
        _make(DETOKENIZER_SPAN, [window.start, window.end, int(window.is_final)], np.int32),
    ]


def _make(name: str, values: Any, dtype: Any) -> Any:
    return tensor(name, values, dtype, has_batch_dimension=True)
