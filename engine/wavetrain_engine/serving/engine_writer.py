# SPDX-License-Identifier: Apache-2.0
"""The responses of `engine`: token ids, and for the ensemble's detokenizer what it makes text from."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np

from wavetrain_engine.request import FinishReason
from wavetrain_engine.serving.contracts import DETOKENIZER_SPAN, DETOKENIZER_TAIL_IDS, DETOKENIZER_TOKEN_IDS
from wavetrain_engine.serving.detokenizer_window import Window, WindowTracker, pack_windows
from wavetrain_engine.serving.live_request import LiveSequence
from wavetrain_engine.serving.tensors import padded, tensor
from wavetrain_engine.serving.usage_outputs import News, index_outputs, usage_outputs
from wavetrain_engine.text.tokenizer import Tokenizer

Rows = Sequence[Sequence[News]]


class EngineWriter:
    """Writes one response per sequence with news; without streaming, one about all when all have ended."""

    def __init__(
        self, sequences: Sequence[LiveSequence], pad_ids: Sequence[int], detokenizer_of: Tokenizer | None
    ) -> None:
        """
        Args:
            sequences: row by row; without streaming, each row has as many.
            pad_ids: for each row, what follows the ids of a sequence that is not the longest.
            detokenizer_of: the tokenizer, where the request comes from an ensemble with a detokenizer.
        """
        self._pad_ids = pad_ids
        self._tokenizer = detokenizer_of
        self._trackers: dict[str, WindowTracker] = {}
        if detokenizer_of is not None:
            for sequence in sequences:
                request = sequence.request
                self._trackers[request.request_id] = WindowTracker(detokenizer_of, request.prompt_token_ids)

    def write(self, sequences: Sequence[LiveSequence]) -> list[list[Any]]:
        """Takes what is ready to be sent; returns each response's output tensors."""
        if sequences[0].options.stream:
            return [self._write_part(sequence, sequences) for sequence in sequences if self._is_due(sequence)]
        if all(sequence.is_finished for sequence in sequences) and not sequences[0].is_closed:
            return [self._write_whole(sequences)]
        return []

    def _is_due(self, sequence: LiveSequence) -> bool:
        if sequence.is_closed or sequence.is_finished:
            return not sequence.is_closed
        # In an ensemble a response costs a whole request to the detokenizer: none without text.
        return bool(sequence.unsent.text if self._tokenizer is not None else sequence.unsent.token_ids)

    def _write_part(self, sequence: LiveSequence, sequences: Sequence[LiveSequence]) -> list[Any]:
        outputs = self._outputs([[News(sequence, sequence.take_unsent())]], [self._pad_ids[sequence.row]])
        return outputs + index_outputs(sequence, has_batch_dimension=True) if len(sequences) > 1 else outputs

    def _write_whole(self, sequences: Sequence[LiveSequence]) -> list[Any]:
        rows = [
            [News(sequence, sequence.take_unsent()) for sequence in row]
            for _, row in groupby(sequences, key=lambda sequence: sequence.row)
        ]
        outputs = self._outputs(rows, self._pad_ids)
        if len(rows) > 1:
            outputs.append(_make("batch_index", [[row] for row in range(len(rows))], np.int32))
        return outputs

    def _outputs(self, rows: Rows, pad_ids: Sequence[int]) -> list[Any]:
        options = rows[0][0].sequence.options
        token_ids = [[[*_prompt_ids(news), *news.unsent.token_ids] for news in row] for row in rows]
        outputs = [
            _make("output_ids", padded(token_ids, pad_ids), np.int32),
            _make("sequence_length", [[len(ids) for ids in row] for row in token_ids], np.int32),
            *usage_outputs(rows, has_batch_dimension=True),
        ]
        if options.return_num_input_tokens:
            counts = [[len(row[0].sequence.request.prompt_token_ids)] for row in rows]
            outputs.append(_make("num_input_tokens", counts, np.int32))
        if options.return_num_output_tokens:
            counts = [[sum(len(news.unsent.token_ids) for news in row)] for row in rows]
            outputs.append(_make("num_output_tokens", counts, np.int32))
        if self._tokenizer is not None:
            outputs += self._windows(self._tokenizer, rows)
        return outputs

    def _windows(self, tokenizer: Tokenizer, rows: Rows) -> list[Any]:
        packed = [
            pack_windows([_window(tokenizer, self._trackers[news.sequence.request.request_id], news) for news in row])
            for row in rows
        ]
        # What follows a row's own ids is never read.
        tail_ids = padded([[row[0] for row in packed]], [0])
        token_ids = padded([[row[1] for row in packed]], [0])
        return [
            _make(DETOKENIZER_TAIL_IDS, tail_ids[0], np.int32),
            _make(DETOKENIZER_TOKEN_IDS, token_ids[0], np.int32),
            _make(DETOKENIZER_SPAN, [row[2] for row in packed], np.int32),
        ]


def _prompt_ids(news: News) -> list[int]:
    """What precedes the output: the prompt, unless it is streamed or was excluded."""
    options = news.sequence.options
    return [] if options.stream or options.exclude_input else news.sequence.request.prompt_token_ids


def _window(tokenizer: Tokenizer, tracker: WindowTracker, news: News) -> Window:
    unsent = news.unsent
    has_silent_end = unsent.finish_reason is FinishReason.STOP and not isinstance(unsent.stop_reason, str)
    spoken = unsent.token_ids[:-1] if has_silent_end else unsent.token_ids
    prompt_ids = _prompt_ids(news)
    if not prompt_ids:
        return tracker.advance(spoken, unsent.text, is_final=news.sequence.is_finished)
    num_prompt_chars = len(tokenizer.decode(prompt_ids))
    return Window(
        tail_ids=[],
        token_ids=[*prompt_ids, *spoken],
        start=0,
        end=num_prompt_chars + len(unsent.text),
        is_final=True,
    )


def _make(name: str, rows: Any, dtype: Any) -> Any:
    return tensor(name, rows, dtype, has_batch_dimension=True)
