# SPDX-License-Identifier: Apache-2.0
"""Steps of requests that nobody sent: before the first one comes, every kernel is compiled and the memory is measured.

They go the way of any other step, so nothing that serving does is left out by mistake. All their tokens lie in block 0,
each on top of the other: what is computed is of no interest, and what is left there neither (docs/decisions/0002).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from wavetrain_engine.plan import AdmittedRequest, ScheduledRequest, StepPlan
from wavetrain_engine.sampling_params import SamplingParams
from wavetrain_engine.worker.device_runner import DeviceRunner

_GREEDY = SamplingParams(temperature=0.0)
# Everything at once takes most memory.
_DEMANDING = SamplingParams(
    temperature=0.7,
    seed=1,
    top_k=5,
    top_p=0.9,
    min_p=0.01,
    repetition_penalty=1.1,
    presence_penalty=0.1,
    frequency_penalty=0.1,
    logit_bias={0: 1.0},
    bad_words_token_ids=[[0, 1], [1]],
    min_tokens=1,
    logprobs=20,
    prompt_logprobs=1,
)
# Tokens of a row that decodes, and of rows that attention may take for such.
_SHORT_QUERY_LENS = (1, 2, 4, 8)
_CHUNK_BESIDE_DECODES = 33


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """Runs steps on a runner without requests, and leaves it so.

    Attributes:
        max_num_seqs, max_num_batched_tokens: of a step.
        max_model_len: of a request.
    """

    runner: DeviceRunner
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    block_size: int

    def largest_step(self) -> None:
        """Runs the step that takes most memory: as many tokens and as many demanding requests as there may be."""
        self._run(self._split(self.max_num_batched_tokens, self._most_rows), _DEMANDING)

    def every_step(self) -> None:
        """Runs a step of every kind: decodes and prompts of many sizes, both together, all that can be asked for."""
        for params in _requests():
            for num_rows in {1, self._most_rows}:
                self._run([1] * num_rows, params)
        for num_rows, query_len in product(_doublings(self._most_rows), _SHORT_QUERY_LENS):
            self._run_if_it_fits([query_len] * num_rows)
        for num_tokens in _doublings(self.max_num_batched_tokens):
            self._run(self._split(num_tokens, 1), _GREEDY)
        for num_rows in _doublings(self._most_rows):
            self._run_if_it_fits([1] * (num_rows - 1) + [_CHUNK_BESIDE_DECODES])

    @property
    def _most_rows(self) -> int:
        return min(self.max_num_seqs, self.max_num_batched_tokens)

    def _split(self, num_tokens: int, least_rows: int) -> list[int]:
        """Returns prompt lengths that add up to `num_tokens`, or to as many as requests may have at once."""
        longest = self.max_model_len - 1  # one is sampled
        num_rows = min(max(least_rows, -(-num_tokens // longest)), self._most_rows)
        share, rest = divmod(num_tokens, num_rows)
        return [min(longest, share + (index < rest)) for index in range(num_rows)]

    def _run_if_it_fits(self, query_lens: Sequence[int]) -> None:
        if sum(query_lens) <= self.max_num_batched_tokens and max(query_lens) < self.max_model_len:
            self._run(query_lens, _GREEDY)

    def _run(self, query_lens: Sequence[int], params: SamplingParams) -> None:
        ids = [f"rehearsal-{index}" for index in range(len(query_lens))]
        admitted = [
            AdmittedRequest(request_id, [0] * length, length, params, [0] * -(-length // self.block_size), 0)
            for request_id, length in zip(ids, query_lens, strict=True)
        ]
        scheduled = [
            ScheduledRequest(request_id, 0, length, (), True)
            for request_id, length in zip(ids, query_lens, strict=True)
        ]
        self.runner.launch(StepPlan(0, [], admitted, scheduled)).result()
        self.runner.launch(StepPlan(0, ids, [], [])).result()


def _requests() -> Iterator[SamplingParams]:
    yield _DEMANDING
    yield SamplingParams(temperature=0.0, repetition_penalty=1.1)
    for top_k, top_p, min_p in product((0, 5), (1.0, 0.9), (0.0, 0.01)):
        yield SamplingParams(temperature=0.7, seed=1, top_k=top_k, top_p=top_p, min_p=min_p)
    for num_logprobs in (0, 1, 5, 20):
        yield SamplingParams(temperature=0.0, logprobs=num_logprobs)


def _doublings(limit: int) -> list[int]:
    """Returns 1, 2, 4, … and the limit: at least one in every range that kernels are chosen by."""
    sizes = [1 << exponent for exponent in range(limit.bit_length()) if 1 << exponent < limit]
    return [*sizes, limit]
