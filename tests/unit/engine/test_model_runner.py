# SPDX-License-Identifier: Apache-2.0
"""The worker under the real scheduler on a tiny checkpoint: containment, determinism, every promise of a request.

On both runners: the CPU's, and the GPU's with the CPU in the GPU's place.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fakes.device_core import device_on_cpu
from fakes.real_core import RealCore
from fakes.tiny_checkpoints import EOS_TOKEN_ID, VOCAB_SIZE, make_tiny_checkpoint
from wavetrain_engine.errors import ErrorCode
from wavetrain_engine.plan import AdmittedRequest, ScheduledRequest, StepPlan
from wavetrain_engine.request import FinishReason
from wavetrain_engine.sampling_params import SamplingParams

MODES: dict[str, dict[str, Any]] = {
    "default": {},
    "chunks": {"max_num_batched_tokens": 16},
    "one-step-in-flight": {"async_scheduling": True},
    "chunks-in-flight": {"async_scheduling": True, "max_num_batched_tokens": 16},
    "no-prefix-cache": {"enable_prefix_caching": False},
}
# Full blocks of 8, but for one; the first two share a prefix.
RNG = random.Random(5)
PROMPTS = [[RNG.randrange(3, VOCAB_SIZE) for _ in range(length)] for length in (24, 40, 7, 33, 16)]
PROMPTS[1][:16] = PROMPTS[0][:16]

SEEDED: tuple[dict[str, Any], ...] = (
    {"temperature": 1.0, "seed": 7},
    {"temperature": 0.8, "seed": 8, "top_p": 0.9, "top_k": 50, "logprobs": 3},
    {"temperature": 1.5, "seed": -1, "min_p": 0.01, "presence_penalty": 0.5, "frequency_penalty": 0.2},
    {"repetition_penalty": 1.3, "logprobs": 2},
    {"temperature": 1.0, "seed": 2**64 - 1, "bad_words_token_ids": [[5], [6, 7]], "logit_bias": {9: 2.0}},
)


MakeCore = Callable[..., RealCore]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("llama"), with_tokenizer=False)


@pytest.fixture(params=["at once", "on a device"])
def make_core(checkpoint: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeCore]:
    if request.param == "on a device":
        device_on_cpu(monkeypatch, with_graphs=True)
    cores: list[RealCore] = []

    def make(directory: Path = checkpoint, **flags: Any) -> RealCore:
        cores.append(RealCore(directory, **flags))
        return cores[-1]

    yield make
    for core in cores:
        core.close()


@pytest.fixture
def plain(make_core: MakeCore) -> list[list[int]]:
    """What each prompt yields, alone and greedily."""
    core = make_core()
    return [core.run_one(prompt) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def alone(checkpoint: Path) -> list[list[int]]:
    core = RealCore(checkpoint)
    alone = [core.run_one(prompt, max_tokens=40, **params) for prompt, params in zip(PROMPTS, SEEDED, strict=True)]
    core.close()
    return alone


class TestNan:
    """A token whose embedding is NaN: whoever has it in the prompt ends, and nobody else notices."""

    @pytest.fixture
    def bad_token(self, plain: list[list[int]]) -> int:
        seen = {token_id for tokens in plain + PROMPTS for token_id in tokens}
        return next(token_id for token_id in range(3, VOCAB_SIZE) if token_id not in seen)

    @pytest.fixture
    def broken(self, checkpoint: Path, bad_token: int, tmp_path: Path) -> Path:
        shutil.copytree(checkpoint, tmp_path / "broken")
        weights = load_file(checkpoint / "model.safetensors")
        weights["model.embed_tokens.weight"][bad_token] = float("nan")
        save_file(weights, tmp_path / "broken/model.safetensors", metadata={"format": "pt"})
        return tmp_path / "broken"

    @pytest.mark.parametrize("mode", MODES)
    def test_only_the_request_that_has_it_ends(
        self,
        make_core: MakeCore,
        plain: list[list[int]],
        bad_token: int,
        broken: Path,
        mode: str,
    ) -> None:
        core = make_core(broken, **MODES[mode])
        poisoned = PROMPTS[0] + [bad_token] + PROMPTS[3]
        core.add("first", PROMPTS[0])
        core.step()
        core.add("bad", poisoned)
        for index, prompt in enumerate(PROMPTS):
            core.add(f"r{index}", prompt)
        core.run()
        end = core.last("bad")
        assert (end.finish_reason, end.error_code) == (FinishReason.ERROR, ErrorCode.INTERNAL)
        assert end.error is not None
        assert "NaN" in end.error
        assert core.tokens("bad") == []
        assert core.tokens("first") == plain[0]
        assert [core.tokens(f"r{index}") for index in range(len(PROMPTS))] == plain

    @pytest.mark.parametrize("mode", MODES)
    def test_its_blocks_are_as_good_as_new(
        self, make_core: MakeCore, plain: list[list[int]], bad_token: int, broken: Path, mode: str
    ) -> None:
        # Ten blocks: what comes next cannot but use the bad one's.
        core = make_core(broken, num_blocks=10, max_model_len=80, **MODES[mode])
        for _ in range(3):
            core.add("bad", PROMPTS[1] + [bad_token] * 20)
            core.run()
            assert core.last("bad").finish_reason is FinishReason.ERROR
            assert [core.run_one(prompt) for prompt in PROMPTS] == plain
        assert core.core.stats().num_requests_finished[FinishReason.ERROR] == 3

    def test_nothing_of_it_is_found_in_the_prefix_cache(
        self, make_core: MakeCore, bad_token: int, broken: Path
    ) -> None:
        core = make_core(broken, max_num_batched_tokens=16)
        core.add("bad", PROMPTS[1] + [bad_token])
        core.run()
        assert core.core.stats().num_blocks_cached == 0
        core.add("bad", PROMPTS[1] + [bad_token] + PROMPTS[1])
        core.add("same-prefix", PROMPTS[1])
        core.run()
        stats = core.last("same-prefix").stats
        assert stats is not None
        assert (stats.num_cached_tokens, core.last("bad").finish_reason) == (0, FinishReason.ERROR)

    def test_blocks_it_shared_stay(
        self, make_core: MakeCore, plain: list[list[int]], bad_token: int, broken: Path
    ) -> None:
        core = make_core(broken)
        core.add("good", PROMPTS[1])
        core.run()
        core.add("bad", PROMPTS[1] + [bad_token])
        core.add("again", PROMPTS[1])
        core.run()
        stats = core.last("again").stats
        assert stats is not None
        assert stats.num_cached_tokens == 32  # all full blocks but the one with the last token
        assert core.tokens("again") == plain[1]

    def test_the_token_may_come_from_the_model(
        self, make_core: MakeCore, plain: list[list[int]], bad_token: int, broken: Path
    ) -> None:
        core = make_core(broken)
        core.add("bad", PROMPTS[0], logit_bias={bad_token: 1e4})
        core.add("good", PROMPTS[1])
        core.run()
        assert core.tokens("bad") == [bad_token]
        assert core.last("bad").error_code is ErrorCode.INTERNAL
        assert core.tokens("good") == plain[1]

    def test_a_request_without_any_choice_ends_alone(self, make_core: MakeCore, plain: list[list[int]]) -> None:
        core = make_core()
        core.add("none", PROMPTS[0], bad_words_token_ids=[[token_id] for token_id in range(VOCAB_SIZE)])
        core.add("good", PROMPTS[1])
        core.run()
        assert "no token is left to choose from" in (core.last("none").error or "")
        assert core.tokens("good") == plain[1]


class TestSameTokens:
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("num_blocks", [96, 12])
    def test_in_any_batch_and_after_preemption(
        self, make_core: MakeCore, alone: list[list[int]], mode: str, num_blocks: int
    ) -> None:
        core = make_core(num_blocks=num_blocks, max_model_len=88, **MODES[mode])
        order = [3, 0, 4, 2, 1]
        for index in order:
            core.add(f"r{index}", PROMPTS[index], max_tokens=40, **SEEDED[index])
            core.step()
        core.run()
        assert [core.tokens(f"r{index}") for index in range(5)] == alone
        assert (core.core.stats().num_preemptions > 0) == (num_blocks == 12)
        for index in (1, 3):
            entries = core.logprobs(f"r{index}")
            assert [entry.token_ids[0] for entry in entries] == alone[index]
            assert {len(entry.token_ids) for entry in entries} == {SEEDED[index]["logprobs"] + 1}

    def test_without_a_seed_they_differ(self, make_core: MakeCore) -> None:
        core = make_core()
        for index in range(4):
            core.add(f"r{index}", PROMPTS[0], temperature=1.0, max_tokens=16)
        core.run()
        assert len({tuple(core.tokens(f"r{index}")) for index in range(4)}) == 4

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_half_precision_runs_on_a_cpu(self, make_core: MakeCore, dtype: str) -> None:
        core = make_core(dtype=dtype, max_num_batched_tokens=16)
        for index, prompt in enumerate(PROMPTS):
            core.add(f"r{index}", prompt, prompt_logprobs=0)
        core.run()
        assert {core.last(f"r{index}").finish_reason for index in range(5)} == {FinishReason.LENGTH}


class TestPromptLogprobs:
    def entries(self, core: RealCore, request_id: str, prompt: list[int]) -> list[float]:
        """They are delivered once, for every token of the prompt but the first, each with its top 2."""
        (entries,) = core.prompt_logprobs(request_id)
        assert [entry.token_ids[0] for entry in entries] == prompt[1:]
        assert {len(entry.token_ids) for entry in entries} == {3}
        return [entry.logprobs[0] for entry in entries]

    @pytest.mark.parametrize("mode", MODES)
    def test_across_chunks_and_preemptions(self, make_core: MakeCore, mode: str) -> None:
        whole = make_core()
        expected: list[list[float]] = []
        for prompt in PROMPTS:
            whole.add("whole", prompt, prompt_logprobs=2, max_tokens=1)
            whole.run()
            expected.append(self.entries(whole, "whole", prompt))
        core = make_core(num_blocks=12, max_model_len=88, **MODES[mode])
        for index, prompt in enumerate(PROMPTS):
            core.add(f"r{index}", prompt, prompt_logprobs=2, max_tokens=30)
        core.run()
        assert core.core.stats().num_preemptions > 0
        for index, prompt in enumerate(PROMPTS):
            assert self.entries(core, f"r{index}", prompt) == pytest.approx(expected[index], abs=1e-4)
            assert len(core.tokens(f"r{index}")) == 30

    def test_a_prompt_of_one_token_has_none(self, make_core: MakeCore) -> None:
        core = make_core()
        core.add("one", [5], prompt_logprobs=1, max_tokens=2)
        core.run()
        assert core.prompt_logprobs("one") in ([], [[]])
        assert len(core.tokens("one")) == 2


class TestPromises:
    def test_eos_ends_unless_it_is_ignored(self, make_core: MakeCore) -> None:
        core = make_core()
        bias = {EOS_TOKEN_ID: 1e4}
        core.add("eos", PROMPTS[0], logit_bias=bias, ignore_eos=False)
        core.add("ignored", PROMPTS[0], logit_bias=bias)
        core.add("late", PROMPTS[0], logit_bias=bias, ignore_eos=False, min_tokens=4)
        core.run()
        end = core.last("eos")
        assert (core.tokens("eos"), end.finish_reason, end.stop_token_id) == ([1], FinishReason.STOP, None)
        assert core.tokens("ignored") == [EOS_TOKEN_ID] * 12
        assert core.last("ignored").finish_reason is FinishReason.LENGTH
        tokens = core.tokens("late")
        assert (len(tokens), tokens[-1], core.last("late").finish_reason) == (5, EOS_TOKEN_ID, FinishReason.STOP)
        assert EOS_TOKEN_ID not in tokens[:4]

    def test_stop_tokens(self, make_core: MakeCore, plain: list[list[int]]) -> None:
        core = make_core()
        stop = plain[0][3]
        expected = plain[0][: plain[0].index(stop) + 1]
        core.add("stop", PROMPTS[0], stop_token_ids=[stop])
        core.add("late", PROMPTS[0], stop_token_ids=[stop], min_tokens=8)
        core.run()
        assert (core.tokens("stop"), core.last("stop").stop_token_id) == (expected, stop)
        assert core.last("stop").finish_reason is FinishReason.STOP
        assert stop not in core.tokens("late")[:8]

    def test_bad_words(self, make_core: MakeCore, plain: list[list[int]]) -> None:
        first, second = plain[0][:2]
        core = make_core()
        core.add("word", PROMPTS[0], bad_words_token_ids=[[first]])
        core.add("pair", PROMPTS[0], bad_words_token_ids=[[first, second]])
        core.add("across", PROMPTS[0], bad_words_token_ids=[[PROMPTS[0][-1], first]])
        core.run()
        assert first not in core.tokens("word")
        tokens = core.tokens("pair")
        assert tokens[0] == first
        assert (first, second) not in set(pairwise(tokens))
        assert core.tokens("across")[0] != first

    def test_logit_bias(self, make_core: MakeCore) -> None:
        core = make_core()
        assert core.run_one(PROMPTS[0], logit_bias={77: 1e4}) == [77] * 12
        assert core.run_one(PROMPTS[0], logit_bias={77: 1e4}, temperature=1.0, top_p=0.5) == [77] * 12

    def test_the_whole_length_can_be_used(self, make_core: MakeCore) -> None:
        for is_async in (False, True):
            core = make_core(max_model_len=40, async_scheduling=is_async)
            assert len(core.run_one(PROMPTS[4], max_tokens=None)) == 40 - 16
            assert len(core.run_one(list(range(3, 42)), max_tokens=None)) == 1


class TestExecute:
    """Straight at the executor, with plans made by hand."""

    def admit(self, request_id: str, prompt: list[int], blocks: list[int], **params: Any) -> AdmittedRequest:
        sampling_params = SamplingParams(temperature=0.0, **params)
        return AdmittedRequest(request_id, prompt, len(prompt), sampling_params, blocks, 0)

    def test_results_are_aligned_with_the_rows(self, make_core: MakeCore, plain: list[list[int]]) -> None:
        core = make_core()
        admitted = [
            self.admit("chunk", PROMPTS[1], [1, 2, 3, 4, 5], prompt_logprobs=0),
            self.admit("whole", PROMPTS[0], [6, 7, 8], logprobs=1),
        ]
        rows = [ScheduledRequest("chunk", 0, 10, [], False), ScheduledRequest("whole", 0, 24, [], True)]
        result = core.executor.submit(StepPlan(0, ["nobody"], admitted, rows)).result()
        assert result.sampled_token_ids == [[], [plain[0][0]]]
        assert result.logprobs[0] is None
        assert [entry.token_ids[0] for entry in result.logprobs[1] or []] == [plain[0][0]]
        assert [entry.token_ids[0] for entry in result.prompt_logprobs[0] or []] == PROMPTS[1][1:11]
        assert result.prompt_logprobs[1] is None
        assert result.errors == {}

    def test_a_step_without_samples(self, make_core: MakeCore) -> None:
        core = make_core()
        plan = StepPlan(0, [], [self.admit("a", PROMPTS[1], [1, 2])], [ScheduledRequest("a", 0, 10, [], False)])
        result = core.executor.submit(plan).result()
        assert (result.sampled_token_ids, result.logprobs, result.errors) == ([[]], [], {})

    def test_who_is_resumed_with_output_is_not_scored_again(self, make_core: MakeCore) -> None:
        core = make_core()
        params = SamplingParams(temperature=0.0, prompt_logprobs=1)
        resumed = AdmittedRequest("a", PROMPTS[2] + [9], len(PROMPTS[2]), params, [1], 0)
        plan = StepPlan(0, [], [resumed], [ScheduledRequest("a", 0, 8, [], True)])
        assert core.executor.submit(plan).result().prompt_logprobs == []

    def test_a_request_id_used_again_starts_afresh(self, make_core: MakeCore) -> None:
        core = make_core()
        rows = [ScheduledRequest("a", 0, 4, [], False)]
        plan = StepPlan(0, [], [self.admit("a", PROMPTS[0], [1], prompt_logprobs=0)], rows)
        assert [len(entries or []) for entries in core.executor.submit(plan).result().prompt_logprobs] == [4]
        plan = StepPlan(1, ["a"], [self.admit("a", PROMPTS[1], [2])], rows)
        assert core.executor.submit(plan).result().prompt_logprobs == []

    @pytest.mark.parametrize("is_async", [False, True])
    def test_a_step_that_raises_does_so_in_its_result(self, make_core: MakeCore, is_async: bool) -> None:
        core = make_core(async_scheduling=is_async)
        pending = core.executor.submit(StepPlan(0, [], [], [ScheduledRequest("unknown", 0, 1, [], True)]))
        with pytest.raises(KeyError):
            pending.result()

    def test_steps_leave_no_graph_behind(self, make_core: MakeCore) -> None:
        make_core().run_one(PROMPTS[0])
        assert torch.is_grad_enabled()
