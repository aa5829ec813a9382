# SPDX-License-Identifier: Apache-2.0
"""Computes steps: rows to tensors, through the model and the sampler, and back to token ids.

B = requests of the step, T = tokens of the step, N = requests that sample, V = vocabulary, H = hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from wavetrain_engine.layers.attention import KVCache
from wavetrain_engine.models.model import Model
from wavetrain_engine.plan import ScheduledRequest, StepPlan, StepResult
from wavetrain_engine.request import TokenLogprobs
from wavetrain_engine.sampling.logprobs import prompt_logprobs
from wavetrain_engine.sampling.sampler import SampledTokens, Sampler
from wavetrain_engine.sampling.state import SamplingState
from wavetrain_engine.worker.input_batch import InputBatch, StepInputs
from wavetrain_engine.worker.step_program import StepProgram
from wavetrain_kernels.ops import AttentionMetadata

# Prompt log-probabilities need logits at every prompt position; this many rows of V floats at a time.
_PROMPT_LOGPROBS_CHUNK = 128

_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class _StepTensors:
    """A step's inputs on the device."""

    inputs: StepInputs
    token_ids: Tensor
    positions: Tensor
    metadata: AttentionMetadata


class ModelRunner:
    """Owns the model, its KV cache and the rows of the live requests; executes one plan at a time.

    Args:
        eos_token_ids: masked by the sampler until a request has its min_tokens.
        program: the model recorded; None: it is run layer by layer.
    """

    def __init__(
        self,
        *,
        model: Model,
        kv_caches: list[KVCache],
        batch: InputBatch,
        state: SamplingState,
        eos_token_ids: list[int],
        device: torch.device,
        program: StepProgram | None = None,
    ) -> None:
        self._model = model
        self._program = program
        self._kv_caches = kv_caches
        self._batch = batch
        self._state = state
        self._sampler = Sampler()
        self._eos_token_ids = eos_token_ids
        self._device = device
        # Requests whose prompt is to be scored; none, usually, and then no step looks for them.
        self._scored: set[str] = set()
        self._tensors: _StepTensors | None = None

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Applies the plan's differences, computes its rows, appends what they sample.

        A row whose logits are not finite samples nothing and is reported in `errors`; the others are not affected.
        """
        self._apply(plan)
        if not plan.scheduled:
            return StepResult(sampled_token_ids=[])
        inputs = self._batch.inputs(plan.scheduled)
        tensors = self._step_tensors(inputs)
        hidden = self._forward(tensors)
        prompt = self._prompt_logprobs(plan.scheduled, inputs, hidden)
        return self._sample(plan.scheduled, inputs, hidden, prompt)

    def _forward(self, tensors: _StepTensors) -> Tensor:
        token_ids, positions, metadata = tensors.token_ids, tensors.positions, tensors.metadata
        if self._program is not None and token_ids.shape[0] <= self._program.capacity:
            return self._program.run(token_ids, positions, metadata)
        return self._model.forward(token_ids, positions, self._kv_caches, metadata)

    def _apply(self, plan: StepPlan) -> None:
        for request_id in plan.removed:
            entry = self._batch.remove(request_id)
            if entry is not None:
                self._state.remove(entry.row)
                self._scored.discard(request_id)
        for request in plan.admitted:
            entry = self._batch.add(request)
            params, num_prompt_tokens = request.sampling_params, request.num_prompt_tokens
            seed = params.seed or 0  # the scheduler's side has drawn one for whoever samples
            self._state.add(entry.row, params, request.token_ids, num_prompt_tokens, self._eos_token_ids, seed)
            # Who is resumed with output has had the scores of its prompt with its first token.
            if params.prompt_logprobs is not None and len(request.token_ids) == num_prompt_tokens:
                self._scored.add(request.request_id)

    def _step_tensors(self, inputs: StepInputs) -> _StepTensors:
        last = self._tensors
        if last is not None and last.inputs is inputs and self._device.type == "cpu":
            last.metadata.advance()  # its tensors are the arrays, which the batch has moved on
            return last
        metadata = AttentionMetadata(
            query_start_loc=self._to_device(inputs.query_start_loc),
            seq_lens=self._to_device(inputs.seq_lens),
            block_tables=self._to_device(inputs.block_tables),
            slot_mapping=self._to_device(inputs.slot_mapping),
            max_query_len=inputs.max_query_len,
            max_seq_len=inputs.max_seq_len,
            host_query_start_loc=inputs.query_start_loc.tolist(),
            host_seq_lens=inputs.seq_lens.tolist(),
        )
        token_ids, positions = self._to_device(inputs.token_ids), self._to_device(inputs.positions)
        self._tensors = _StepTensors(inputs, token_ids, positions, metadata)
        return self._tensors

    def _sample(
        self,
        scheduled: list[ScheduledRequest],
        inputs: StepInputs,
        hidden: Tensor,
        prompt: list[list[TokenLogprobs] | None],
    ) -> StepResult:
        sampling = [index for index, item in enumerate(scheduled) if item.is_sampling]
        if not sampling:
            return StepResult(sampled_token_ids=[[] for _ in scheduled], prompt_logprobs=prompt)
        rows = inputs.rows
        if len(sampling) < hidden.shape[0]:  # some tokens are not the last of their request
            rows = rows[sampling]
            hidden = hidden[self._to_device(inputs.query_start_loc[1:][sampling].astype(np.int64) - 1)]
        batch = self._state.batch(rows.tolist())
        tokens = self._sampler.sample(self._model.compute_logits(hidden), batch)
        self._append(rows, tokens)
        sampled = [[token_id] for token_id in tokens.token_ids]
        logprobs = (
            [None if entry is None else [entry] for entry in tokens.logprobs] if batch.num_logprobs is not None else []
        )
        for index in tokens.errors:
            sampled[index] = []
        errors = {sampling[index]: message for index, message in tokens.errors.items()}
        if len(sampling) < len(scheduled):
            sampled = _spread(sampled, sampling, [[] for _ in scheduled])
            logprobs = _spread(logprobs, sampling, [None] * len(scheduled)) if logprobs else []
        return StepResult(sampled_token_ids=sampled, logprobs=logprobs, prompt_logprobs=prompt, errors=errors)

    def _append(self, rows: np.ndarray, tokens: SampledTokens) -> None:
        token_ids = tokens.token_ids
        if tokens.errors:
            good = [index for index in range(len(token_ids)) if index not in tokens.errors]
            rows, token_ids = rows[good], [token_ids[index] for index in good]
        self._batch.append_tokens(rows, np.asarray(token_ids, dtype=np.int64))
        self._state.append(rows.tolist(), token_ids)

    def _prompt_logprobs(
        self, scheduled: list[ScheduledRequest], inputs: StepInputs, hidden: Tensor
    ) -> list[list[TokenLogprobs] | None]:
        if not self._scored:
            return []
        results: list[list[TokenLogprobs] | None] = [None] * len(scheduled)
        for index, item in enumerate(scheduled):
            if item.request_id not in self._scored:
                continue
            entry = self._batch[item.request_id]
            num_logprobs = entry.sampling_params.prompt_logprobs or 0
            start = item.num_computed_tokens
            end = min(start + item.num_scheduled_tokens, entry.num_prompt_tokens - 1)
            if end == entry.num_prompt_tokens - 1:
                self._scored.discard(item.request_id)
            if end <= start:
                continue
            first = int(inputs.query_start_loc[index])
            targets = self._batch.prompt_targets(entry.row, start, end)
            results[index] = self._score(hidden[first : first + end - start], targets, num_logprobs)
        return results

    def _score(self, hidden: Tensor, targets: np.ndarray, num_logprobs: int) -> list[TokenLogprobs]:
        scored: list[TokenLogprobs] = []
        for start in range(0, len(targets), _PROMPT_LOGPROBS_CHUNK):
            span = slice(start, start + _PROMPT_LOGPROBS_CHUNK)
            logits = self._model.compute_logits(hidden[span])
            scored += prompt_logprobs(logits, self._to_device(targets[span]), num_logprobs)
        return scored

    def _to_device(self, array: np.ndarray) -> Tensor:
        # The arrays are pageable: CUDA has copied them to its own buffer when this returns, so they may change.
        return torch.from_numpy(array).to(self._device, non_blocking=True)


def _spread(values: list[_Value], indices: list[int], results: list[_Value]) -> list[_Value]:
    """Puts values at their indices among the results of all rows."""
    for index, value in zip(indices, values, strict=True):
        results[index] = value
    return results
