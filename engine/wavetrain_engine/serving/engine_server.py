# SPDX-License-Identifier: Apache-2.0
"""The model `engine`: token ids in, token ids out, with TensorRT-LLM's tensors."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import triton_python_backend_utils as pb_utils  # pyright: ignore[reportMissingImports]

from wavetrain_engine.errors import RequestError
from wavetrain_engine.facts import EngineFacts
from wavetrain_engine.request import EngineRequest
from wavetrain_engine.sampling_params import SamplingParams
from wavetrain_engine.serving.contracts import DETOKENIZER_SPAN, ENGINE, NEVER_MAPPED_OUTPUT
from wavetrain_engine.serving.engine_metrics import EngineMetrics
from wavetrain_engine.serving.engine_writer import EngineWriter
from wavetrain_engine.serving.generating_model import GeneratingModel
from wavetrain_engine.serving.generation import Generation
from wavetrain_engine.serving.live_request import Answer, LiveSequence, live_sequences
from wavetrain_engine.serving.model_files import ModelFiles
from wavetrain_engine.serving.request_parameters import RequestParameters
from wavetrain_engine.serving.row_inputs import (
    RowInputs,
    bias_params,
    check_inputs,
    end_id_params,
    legacy_sampling_params,
    merge_params,
    read_row,
    split_word_list,
    stop_word_params,
)
from wavetrain_engine.serving.tensors import RequestTensors
from wavetrain_engine.text.tokenizer import Tokenizer

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _BegunRow:
    """A row of a batch, and what it comes to in the core."""

    inputs: RowInputs
    core_requests: list[EngineRequest]
    tokenizer: Tokenizer | None

    def sequences(self) -> list[LiveSequence]:
        return live_sequences(
            self.core_requests, row=self.inputs.row, options=self.inputs.options, tokenizer=self.tokenizer
        )


class EngineServer(GeneratingModel):
    """Decoupled; rows of a batch run as requests of their own."""

    _tokenizer: Tokenizer | None = None
    _facts: EngineFacts
    _metrics: EngineMetrics | None = None

    def start(self, files: ModelFiles) -> None:
        """Attaches to the core. The tokenizer serves stop words and the ensemble's detokenizer."""
        self._tokenizer = files.load_tokenizer()
        self._facts = self.attach(files)
        # Of the models that share a core one tells of it: the one that has tensorrtllm_backend's part.
        self._metrics = _metrics(self.generation, self._facts, files.model_name)

    def finalize(self) -> None:
        """Ends the model, and the core if no other model needs it."""
        if self._metrics is not None:
            self._metrics.close(timeout_s=1.0)
        super().finalize()

    def start_request(self, request: Any, generation: Generation) -> None:
        """Reads the request's tensors and starts its sequences."""
        tensors = RequestTensors(request, has_batch_dimension=True)
        rows = [read_row(tensors, ENGINE, row) for row in range(tensors.num_rows)]
        if any(row.options.stop for row in rows):
            generation.stop(request)
            return
        check_inputs(tensors, ENGINE)
        _check_rows(rows)
        parameters = RequestParameters.read(request)
        parameters.refuse_others()
        has_detokenizer = self._is_from_ensemble(request)
        pad_ids = [_pad_id(tensors, row.row, self._facts.vocab_size) for row in rows]
        begun: list[_BegunRow] = []
        for inputs in rows:
            params = self._sampling_params(tensors, inputs)
            tokenizer = self._tokenizer if has_detokenizer or params.stop else None
            core_requests = generation.core_requests(
                prompt_token_ids=_prompt_token_ids(tensors, inputs.row),
                params=params,
                parameters=parameters,
                tokenizer=tokenizer,
            )
            begun.append(_BegunRow(inputs, core_requests, tokenizer))

        def make_answer() -> Answer:
            sequences = [sequence for row in begun for sequence in row.sequences()]
            return Answer(sequences, EngineWriter(sequences, pad_ids, self._tokenizer if has_detokenizer else None))

        generation.run(request, [item for row in begun for item in row.core_requests], make_answer)

    def _is_from_ensemble(self, request: Any) -> bool:
        # A client that names no outputs asks for all, the detokenizer's inputs too, which are of no use to it.
        requested = request.requested_output_names()
        return DETOKENIZER_SPAN in requested and NEVER_MAPPED_OUTPUT not in requested

    def _sampling_params(self, tensors: RequestTensors, inputs: RowInputs) -> SamplingParams:
        row, vocab_size = inputs.row, self._facts.vocab_size
        bad_words = split_word_list("bad_words_list", tensors.row("bad_words_list", row))
        extra = merge_params(
            end_id_params(tensors.scalar("end_id", row), vocab_size),
            self._stop_params(tensors, row),
            bias_params(tensors.row("embedding_bias", row), vocab_size),
            {"bad_words_token_ids": bad_words},
        )
        return legacy_sampling_params(inputs, extra)

    def _stop_params(self, tensors: RequestTensors, row: int) -> dict[str, Any]:
        words = split_word_list("stop_words_list", tensors.row("stop_words_list", row))
        texts = tensors.texts("stop_words", row)
        if not words and not texts:
            return {}
        if self._tokenizer is None:
            raise RequestError("stop words need a tokenizer, and this model is served without one")
        # Words are matched on text, so that one is found however the model cuts it into tokens.
        texts += [self._tokenizer.decode(word, skip_special_tokens=False) for word in words]
        return stop_word_params(texts, self._tokenizer)


def _prompt_token_ids(tensors: RequestTensors, row: int) -> list[int]:
    token_ids = tensors.token_ids("input_ids", row) or []
    length = tensors.scalar("input_lengths", row)
    if length is None or not 0 <= length <= len(token_ids):
        raise RequestError(f"input_lengths must be between 0 and the number of input_ids ({len(token_ids)})")
    return token_ids[:length]


def _pad_id(tensors: RequestTensors, row: int, vocab_size: int) -> int:
    pad_id = tensors.scalar("pad_id", row)
    if pad_id is None:
        return -1
    if not -1 <= pad_id < vocab_size:
        raise RequestError(f"pad_id must be a token id below {vocab_size}, or -1, got {pad_id}")
    return pad_id


def _metrics(generation: Generation, facts: EngineFacts, model: str) -> EngineMetrics | None:
    try:
        return EngineMetrics(generation.read_stats, facts, model=model)
    except pb_utils.TritonModelException as error:  # a server with --allow-metrics=false
        _LOGGER.warning("the engine's metrics are not published: %s", error)
        return None


def _check_rows(rows: Sequence[RowInputs]) -> None:
    """Refuses rows that cannot be answered together: without streaming all are in one response."""
    for name, option in ENGINE.switches.items():
        if name != "streaming" and rows[0].options.stream:
            continue
        if len({getattr(row.options, option) for row in rows}) > 1:
            raise RequestError(f"{name} must be the same for all rows of a batch")
    if not rows[0].options.stream and len({row.sampling.get("n", 1) for row in rows}) > 1:
        raise RequestError("num_return_sequences must be the same for all rows of a batch that is not streamed")
