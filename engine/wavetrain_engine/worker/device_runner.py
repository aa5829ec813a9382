# SPDX-License-Identifier: Apache-2.0
"""Computes steps on a GPU, and does not wait for them: a step is launched, and its tokens are read when they are there.

Nothing between two steps needs the host to know a token: tokens, and what the sampler knows of them, stay on the device
(device_batch.py, sampling/state.py). So the host plans and launches the next step while one runs, and the device goes
from step to step. Everything is put on one stream, which is what keeps steps from overtaking each other.

B = requests of the step, T = tokens of the step, N = requests that sample, H = hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from wavetrain_engine.layers.attention import KVCache
from wavetrain_engine.models.model import Model
from wavetrain_engine.plan import StepPlan, StepResult
from wavetrain_engine.sampling.sampler import DrawnTokens, Sampler
from wavetrain_engine.sampling.state import SamplingState
from wavetrain_engine.worker.cuda_graphs import GraphKey, Recorder, StepGraphs
from wavetrain_engine.worker.device_batch import DeviceBatch, StepNumbers, StepShape
from wavetrain_engine.worker.device_errors import step_error
from wavetrain_engine.worker.input_batch import StepInputs
from wavetrain_engine.worker.live_requests import LiveRequests
from wavetrain_engine.worker.prompt_scores import PromptScores, score_prompts
from wavetrain_engine.worker.step_result import make_result
from wavetrain_kernels.ops import AttentionMetadata


class Event(Protocol):
    """A moment in the device's work, as torch.cuda.Event."""

    def synchronize(self) -> None:
        """Waits until the device has reached it."""
        ...


class PendingStep:
    """A launched step. What it reads back is in pinned memory once its event has come."""

    def __init__(self, finish: Callable[[], StepResult], event: Event | None, step_id: int) -> None:
        self._finish = finish
        self._event = event
        self._step_id = step_id

    def result(self) -> StepResult:
        """Waits for the device and returns the step's result.

        Raises:
            EngineDead: the device failed; whatever it was asked for since is lost.
        """
        if self._event is not None:
            try:
                self._event.synchronize()
            except RuntimeError as error:
                raise step_error(error, self._step_id) from error
        return self._finish()


class DeviceRunner:
    """Owns the model, its KV cache and the rows of the live requests; launches plans in order, from one thread.

    Attributes:
        graphs: the captured steps; None: all run layer by layer.

    Args:
        eos_token_ids: masked by the sampler until a request has its min_tokens.
    """

    def __init__(
        self,
        *,
        model: Model,
        kv_caches: list[KVCache],
        batch: DeviceBatch,
        state: SamplingState,
        eos_token_ids: list[int],
    ) -> None:
        self.graphs: StepGraphs | None = None
        self._model = model
        self._kv_caches = kv_caches
        self._requests = LiveRequests(batch, state, eos_token_ids)
        self._sampler = Sampler()
        # What graphs leave, one after the other: [T of the largest, H].
        self._hidden = torch.empty(0)

    def use_kv_caches(self, kv_caches: list[KVCache]) -> None:
        """Goes on with other caches; to be called before there are graphs, while there are no requests."""
        self._kv_caches = kv_caches

    @torch.inference_mode()
    def capture(self, keys: list[GraphKey], record: Recorder) -> None:
        """Captures the steps of the given sizes; to be called while there are no requests.

        Raises:
            RuntimeError: something in them cannot be captured, or there is not enough memory.
        """
        batch, config = self._requests.batch, self._model.config
        num_tokens = max(key.shape.num_tokens for key in keys)
        self._hidden = torch.empty(num_tokens, config.hidden_size, dtype=self._model.dtype, device=batch.device)
        graphs = StepGraphs()
        for key in keys:
            batch.send(batch.inputs([]), [], key.shape, is_static=True)  # nothing but padding
            graphs.add(key, record(partial(self._run_static, key)))
        self.graphs = graphs

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> PendingStep:
        """Applies the plan's differences and puts the step behind those that were launched before.

        A row whose logits are not finite samples nothing and is reported in `errors`; the others are not affected.
        """
        self._requests.apply(plan)
        scheduled, batch = plan.scheduled, self._requests.batch
        if not scheduled:
            return PendingStep(partial(StepResult, sampled_token_ids=[]), None, plan.step_id)
        inputs = batch.inputs(scheduled)
        sampling = [index for index, item in enumerate(scheduled) if item.is_sampling]
        key = self._graph_key(inputs)
        shape = StepShape(len(inputs.positions), len(inputs.rows)) if key is None else key.shape
        numbers = batch.send(inputs, sampling, shape, is_static=key is not None)
        hidden = self._forward(numbers, inputs) if key is None else self._replay(key, inputs)
        scores: list[PromptScores] = []
        if self._requests.has_scored:
            scores = score_prompts(self._model, hidden, self._requests.prompt_spans(scheduled, inputs.query_start_loc))
        drawn = self._sample(hidden, numbers, inputs, sampling) if sampling else None
        return self._read_back(plan, sampling, drawn, scores)

    def _graph_key(self, inputs: StepInputs) -> GraphKey | None:
        if self.graphs is None:
            return None
        key = self.graphs.key_for(len(inputs.rows), len(inputs.positions), inputs.max_query_len)
        return key if key is not None and self._requests.batch.fits_static(key.shape) else None

    def _forward(self, numbers: StepNumbers, inputs: StepInputs) -> Tensor:
        """Returns the step's hidden states [T, H], computed layer by layer."""
        token_ids, block_tables = self._requests.batch.gather(numbers)
        metadata = AttentionMetadata(
            query_start_loc=numbers.query_start_loc,
            seq_lens=numbers.seq_lens,
            block_tables=block_tables,
            slot_mapping=numbers.slot_mapping,
            max_query_len=inputs.max_query_len,
            max_seq_len=inputs.max_seq_len,
            host_query_start_loc=inputs.query_start_loc.tolist(),
            host_seq_lens=inputs.seq_lens.tolist(),
        )
        return self._model.forward(token_ids, numbers.positions, self._kv_caches, metadata)

    def _replay(self, key: GraphKey, inputs: StepInputs) -> Tensor:
        """Returns the same from a graph; valid until the next one is replayed."""
        assert self.graphs is not None, "a key comes from graphs"
        self.graphs.run(key)
        return self._hidden[: len(inputs.positions)]

    def _run_static(self, key: GraphKey) -> None:
        """What is captured: from the static numbers to the static hidden states, whatever the numbers are.

        To the kernels every context is the longest there may be, so nothing that they choose depends on a step.
        """
        batch, query_len = self._requests.batch, key.query_len
        numbers = batch.static_numbers(key.shape)
        token_ids, block_tables = batch.gather(numbers)
        metadata = AttentionMetadata(
            query_start_loc=numbers.query_start_loc,
            seq_lens=numbers.seq_lens,
            block_tables=block_tables,
            slot_mapping=numbers.slot_mapping,
            max_query_len=query_len,
            max_seq_len=batch.max_model_len,
            host_query_start_loc=list(range(0, key.shape.num_tokens + 1, query_len)),
            host_seq_lens=[batch.max_model_len] * key.num_rows,
        )
        hidden = self._model.forward(token_ids, numbers.positions, self._kv_caches, metadata)
        self._hidden[: key.shape.num_tokens].copy_(hidden)

    def _sample(self, hidden: Tensor, numbers: StepNumbers, inputs: StepInputs, sampling: list[int]) -> DrawnTokens:
        """Draws the tokens, and puts them where the next step and the sampler look for them."""
        rows = inputs.rows
        if len(sampling) < hidden.shape[0]:  # some tokens are not the last of their request
            rows = rows[sampling]
            hidden = hidden.index_select(0, numbers.sampling_tokens[: len(sampling)])
        row_list: list[int] = rows.tolist()
        drawn = self._sampler.launch(self._model.compute_logits(hidden), self._requests.state.batch(row_list))
        self._requests.batch.append_on_device(numbers, drawn.token_ids)
        self._requests.state.append(row_list, drawn.token_ids)
        return drawn

    def _read_back(
        self, plan: StepPlan, sampling: list[int], drawn: DrawnTokens | None, scores: list[PromptScores]
    ) -> PendingStep:
        """Has what the host wants to know copied to it, and notes when it will be there."""
        drawn = None if drawn is None else drawn.map(_to_host)
        scores = [score.map(_to_host) for score in scores]
        num_rows = len(plan.scheduled)

        def finish() -> StepResult:
            tokens = None if drawn is None else self._sampler.finish(drawn)
            return make_result(num_rows, sampling, tokens, scores)

        event = None
        if self._requests.batch.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
        return PendingStep(finish, event, plan.step_id)


def _to_host(tensor: Tensor) -> Tensor:
    """Begins to copy a tensor; to pinned memory, if it comes from a GPU."""
    return tensor.to("cpu", non_blocking=True)
