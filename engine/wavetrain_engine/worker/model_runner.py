# SPDX-License-Identifier: Apache-2.0
"""Computes steps on the CPU, one at a time: rows to tensors, through the model and the sampler, and back to token ids.

B = requests of the step, T = tokens of the step, N = requests that sample, V = vocabulary, H = hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from wavetrain_engine.layers.attention import KVCache
from wavetrain_engine.models.model import Model
from wavetrain_engine.plan import StepPlan, StepResult
from wavetrain_engine.sampling.sampler import SampledTokens, Sampler
from wavetrain_engine.sampling.state import SamplingState
from wavetrain_engine.worker.input_batch import InputBatch, StepInputs
from wavetrain_engine.worker.live_requests import LiveRequests
from wavetrain_engine.worker.prompt_scores import PromptScores, score_prompts
from wavetrain_engine.worker.step_program import StepProgram
from wavetrain_engine.worker.step_result import make_result
from wavetrain_kernels.ops import AttentionMetadata, WantedTokens


@dataclass(frozen=True, slots=True)
class _StepTensors:
    """A step's inputs as tensors that share the memory of its arrays."""

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
        program: StepProgram | None = None,
    ) -> None:
        self._model = model
        self._program = program
        self._kv_caches = kv_caches
        self._requests = LiveRequests(batch, state, eos_token_ids)
        self._sampler = Sampler()
        self._tensors: _StepTensors | None = None

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Applies the plan's differences, computes its rows, appends what they sample.

        A row whose logits are not finite samples nothing and is reported in `errors`; the others are not affected.
        """
        self._requests.apply(plan)
        if not plan.scheduled:
            return StepResult(sampled_token_ids=[])
        inputs = self._requests.batch.inputs(plan.scheduled)
        tensors = self._step_tensors(inputs)
        sampling = [index for index, item in enumerate(plan.scheduled) if item.is_sampling]
        wanted = None if self._requests.has_scored else _wanted_tokens(tensors, sampling)
        hidden = self._forward(tensors, wanted)
        scores: list[PromptScores] = []
        if self._requests.has_scored:
            spans = self._requests.prompt_spans(plan.scheduled, inputs.query_start_loc)
            scores = score_prompts(self._model, hidden, spans)
        tokens = self._sample(inputs, hidden, sampling) if sampling else None
        return make_result(len(plan.scheduled), sampling, tokens, scores)

    def _forward(self, tensors: _StepTensors, wanted: WantedTokens | None) -> Tensor:
        """Returns the hidden states of the wanted tokens; None: of all."""
        token_ids, positions, metadata = tensors.token_ids, tensors.positions, tensors.metadata
        if self._program is not None and token_ids.shape[0] <= self._program.capacity:
            return self._program.run(token_ids, positions, metadata, wanted)
        return self._model.forward(token_ids, positions, self._kv_caches, metadata, wanted)

    def _step_tensors(self, inputs: StepInputs) -> _StepTensors:
        last = self._tensors
        if last is not None and last.inputs is inputs:
            last.metadata.advance()  # its tensors are the arrays, which the batch has moved on
            return last
        metadata = AttentionMetadata(
            query_start_loc=torch.from_numpy(inputs.query_start_loc),
            seq_lens=torch.from_numpy(inputs.seq_lens),
            block_tables=torch.from_numpy(inputs.block_tables),
            slot_mapping=torch.from_numpy(inputs.slot_mapping),
            max_query_len=inputs.max_query_len,
            max_seq_len=inputs.max_seq_len,
            host_query_start_loc=inputs.query_start_loc.tolist(),
            host_seq_lens=inputs.seq_lens.tolist(),
        )
        token_ids, positions = torch.from_numpy(inputs.token_ids), torch.from_numpy(inputs.positions)
        self._tensors = _StepTensors(inputs, token_ids, positions, metadata)
        return self._tensors

    def _sample(self, inputs: StepInputs, hidden: Tensor, sampling: list[int]) -> SampledTokens:
        """Samples, and appends what was sampled to rows without an error."""
        rows = inputs.rows if len(sampling) == len(inputs.rows) else inputs.rows[sampling]
        if len(sampling) < hidden.shape[0]:  # some tokens are not the last of their request
            hidden = hidden[_last_tokens(inputs, sampling)]
        batch = self._requests.state.batch(rows.tolist())
        tokens = self._sampler.sample(self._model.compute_logits(hidden), batch)
        token_ids = tokens.token_ids
        if tokens.errors:
            good = [index for index in range(len(token_ids)) if index not in tokens.errors]
            rows, token_ids = rows[good], [token_ids[index] for index in good]
        self._requests.batch.append_tokens(rows, np.asarray(token_ids, dtype=np.int64))
        self._requests.state.append(rows.tolist(), token_ids)
        return tokens


def _last_tokens(inputs: StepInputs, sampling: list[int]) -> Tensor:
    """Returns where the last tokens of some of the step's requests are among its tokens, [N] int64."""
    return torch.from_numpy(inputs.query_start_loc[1:][sampling].astype(np.int64) - 1)


def _wanted_tokens(tensors: _StepTensors, sampling: list[int]) -> WantedTokens | None:
    """Returns the tokens that are sampled from; None: all are."""
    inputs = tensors.inputs
    if len(sampling) == len(inputs.token_ids):
        return None
    indices = _last_tokens(inputs, sampling)
    return WantedTokens(
        indices,
        AttentionMetadata.build(
            [1] * len(sampling),
            inputs.seq_lens[sampling].tolist(),
            tensors.metadata.block_tables.index_select(0, torch.tensor(sampling, dtype=torch.int64)),
            tensors.metadata.slot_mapping[indices],
        ),
    )
