# SPDX-License-Identifier: Apache-2.0
"""Computes steps: rows to tensors, through the model and the sampler, and back to token ids.

B = requests of the step, T = tokens of the step, N = requests that sample, V = vocabulary, H = hidden size.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from wavetrain_engine.layers.attention import KVCache
from wavetrain_engine.models.model import Model
from wavetrain_engine.plan import ScheduledRequest, StepPlan, StepResult
from wavetrain_engine.request import TokenLogprobs
from wavetrain_engine.sampling.logprobs import prompt_logprobs
from wavetrain_engine.sampling.sampler import Sampler
from wavetrain_engine.sampling.state import SamplingState
from wavetrain_engine.worker.input_batch import InputBatch, StepInputs
from wavetrain_kernels.ops import AttentionMetadata

# Prompt log-probabilities need logits at every prompt position; this many rows of V floats at a time.
_PROMPT_LOGPROBS_CHUNK = 128


class ModelRunner:
    """Owns the model, its KV cache and the rows of the live requests; executes one plan at a time.

    Args:
        eos_token_ids: masked by the sampler until a request has its min_tokens.
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
    ) -> None:
        self._model = model
        self._kv_caches = kv_caches
        self._batch = batch
        self._state = state
        self._sampler = Sampler()
        self._eos_token_ids = eos_token_ids
        self._device = device
        # Requests whose prompt is to be scored; none, usually, and then no step looks for them.
        self._scored: set[str] = set()

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Applies the plan's differences, computes its rows, appends what they sample.

        A row whose logits are not finite samples nothing and is reported in `errors`; the others are not affected.
        """
        self._apply(plan)
        if not plan.scheduled:
            return StepResult(sampled_token_ids=[])
        inputs = self._batch.inputs(plan.scheduled)
        hidden = self._model.forward(
            self._to_device(inputs.token_ids),
            self._to_device(inputs.positions),
            self._kv_caches,
            self._metadata(inputs),
        )
        prompt = self._prompt_logprobs(plan.scheduled, inputs, hidden)
        return self._sample(plan.scheduled, inputs, hidden, prompt)

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

    def _metadata(self, inputs: StepInputs) -> AttentionMetadata:
        query_lens = np.diff(inputs.query_start_loc)
        return AttentionMetadata(
            query_start_loc=self._to_device(inputs.query_start_loc),
            seq_lens=self._to_device(inputs.seq_lens),
            block_tables=self._to_device(inputs.block_tables),
            slot_mapping=self._to_device(inputs.slot_mapping),
            max_query_len=int(query_lens.max()),
            max_seq_len=int(inputs.seq_lens.max()),
            host_query_start_loc=inputs.query_start_loc.tolist(),
            host_seq_lens=inputs.seq_lens.tolist(),
        )

    def _sample(
        self,
        scheduled: list[ScheduledRequest],
        inputs: StepInputs,
        hidden: Tensor,
        prompt: list[list[TokenLogprobs] | None],
    ) -> StepResult:
        sampling = [index for index, item in enumerate(scheduled) if item.is_sampling]
        sampled: list[list[int]] = [[] for _ in scheduled]
        logprobs: list[list[TokenLogprobs] | None] = [None] * len(scheduled)
        errors: dict[int, str] = {}
        if sampling:
            last = self._to_device(inputs.query_start_loc[1:][sampling].astype(np.int64) - 1)
            rows = inputs.rows[sampling]
            tokens = self._sampler.sample(self._model.compute_logits(hidden[last]), self._state.batch(rows.tolist()))
            errors = {sampling[index]: message for index, message in tokens.errors.items()}
            for index, token_id, entry in zip(sampling, tokens.token_ids, tokens.logprobs, strict=True):
                if index not in errors:
                    sampled[index] = [token_id]
                    logprobs[index] = None if entry is None else [entry]
            self._append(rows, tokens.token_ids, tokens.errors)
        return StepResult(sampled_token_ids=sampled, logprobs=logprobs, prompt_logprobs=prompt, errors=errors)

    def _append(self, rows: np.ndarray, token_ids: list[int], errors: dict[int, str]) -> None:
        good = [index for index in range(len(token_ids)) if index not in errors]
        ids = [token_ids[index] for index in good]
        self._batch.append_tokens(rows[good], np.asarray(ids, dtype=np.int64))
        self._state.append(rows[good].tolist(), ids)

    def _prompt_logprobs(
        self, scheduled: list[ScheduledRequest], inputs: StepInputs, hidden: Tensor
    ) -> list[list[TokenLogprobs] | None]:
        results: list[list[TokenLogprobs] | None] = [None] * len(scheduled)
        if not self._scored:
            return results
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
