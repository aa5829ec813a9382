# SPDX-License-Identifier: Apache-2.0
"""The runner of a GPU, on a CPU: the same tokens as the CPU's runner gives, whatever comes and goes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from fakes.device_core import device_on_cpu, graphs_of
from fakes.real_core import RealCore
from fakes.tiny_checkpoints import VOCAB_SIZE, TinyCheckpoints
from wavetrain_engine.request import FinishReason, TokenLogprobs
from wavetrain_engine.worker import device_start
from wavetrain_engine.worker.cuda_graphs import GraphKey, StepGraphs, graph_keys

NUM_REQUESTS = 12
MAX_TOKENS = 24
SAMPLING: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "logprobs": 2},
    {"temperature": 0.8, "top_p": 0.9, "top_k": 50},
    {"temperature": 0.0, "repetition_penalty": 1.3, "presence_penalty": 0.5, "prompt_logprobs": 1},
    {"temperature": 1.2, "min_p": 0.02, "frequency_penalty": 0.4, "logit_bias": {9: 2.0}},
    {"temperature": 0.0, "bad_words_token_ids": [[5], [6, 7], [8, 9, 10]], "min_tokens": 5, "logprobs": 0},
]

# Tokens and log-probabilities of the output, and those of the prompt.
Answer = tuple[list[int], list[TokenLogprobs], list[TokenLogprobs]]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TinyCheckpoints(tmp_path_factory.mktemp("checkpoints")).get("mistral", with_tokenizer=False)


@pytest.fixture
def cores() -> Iterator[list[RealCore]]:
    cores: list[RealCore] = []
    yield cores
    for core in cores:
        core.close()


class Requests:
    """The same requests each time; some share a prefix."""

    def __init__(self) -> None:
        rng = random.Random(11)
        self.prompts = [[rng.randrange(3, VOCAB_SIZE) for _ in range((40, 1, 17, 33, 8)[i % 5])] for i in range(12)]
        for prompt in self.prompts[5::5]:
            prompt[:24] = self.prompts[0][:24]

    def add(self, core: RealCore, index: int) -> None:
        asked = {"seed": index, "max_tokens": MAX_TOKENS} | SAMPLING[index % len(SAMPLING)]
        core.add(f"r{index}", self.prompts[index], **asked)

    def answer(self, core: RealCore, index: int) -> Answer:
        name = f"r{index}"
        return core.tokens(name), core.logprobs(name), list(chain(*core.prompt_logprobs(name)))


REQUESTS = Requests()


@pytest.fixture(scope="module")
def alone(directory: Path) -> list[Answer]:
    """What each request gets on the CPU's runner, by itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WAVETRAIN_KERNELS", "reference")
        core = RealCore(directory, enable_prefix_caching=False)
    for index in range(NUM_REQUESTS):
        REQUESTS.add(core, index)
        core.run()
    answers = [REQUESTS.answer(core, index) for index in range(NUM_REQUESTS)]
    core.close()
    return answers


def assert_like(answer: Answer, expected: Answer) -> None:
    """Equal tokens; log-probabilities but for what float32 rounds otherwise in another batch."""
    assert answer[0] == expected[0]
    for entries, others in ((answer[1], expected[1]), (answer[2], expected[2])):
        assert [entry.token_ids[0] for entry in entries] == [entry.token_ids[0] for entry in others]
        assert [entry.logprobs[0] for entry in entries] == pytest.approx([e.logprobs[0] for e in others], abs=1e-4)
        assert [len(entry.token_ids) for entry in entries] == [len(entry.token_ids) for entry in others]


@pytest.mark.parametrize("with_graphs", [False, True])
@pytest.mark.parametrize("trial", range(8))
def test_random_mixes(
    directory: Path,
    alone: list[Answer],
    cores: list[RealCore],
    monkeypatch: pytest.MonkeyPatch,
    trial: int,
    with_graphs: bool,
) -> None:
    """Requests arrive and are cancelled at random, under random limits; nobody who stays notices."""
    recorder = device_on_cpu(monkeypatch, with_graphs=with_graphs)
    rng = random.Random(trial)
    core = RealCore(
        directory,
        max_num_batched_tokens=rng.choice([7, 16, 33, 200]),
        max_num_seqs=rng.choice([3, 9, 12]),
        num_blocks=rng.choice([14, 24, 200]),
        block_size=rng.choice([8, 16]),
        max_model_len=80,
        async_scheduling=trial % 4 != 3,
        enable_prefix_caching=rng.random() < 0.7,
    )
    cores.append(core)
    num_rehearsed = recorder.num_replays
    waiting = rng.sample(range(NUM_REQUESTS), NUM_REQUESTS)
    leaving = set(waiting[:3])
    while waiting or core.core.has_work:
        if waiting and rng.random() < 0.3:
            REQUESTS.add(core, waiting.pop())
        if leaving and rng.random() < 0.05:
            core.core.cancel(f"r{leaving.pop()}")
        core.step()
    core.run()
    stayed = [index for index in range(NUM_REQUESTS) if core.last(f"r{index}").finish_reason is FinishReason.LENGTH]
    assert len(stayed) >= NUM_REQUESTS - 3
    for index in stayed:
        assert_like(REQUESTS.answer(core, index), alone[index])
    assert (recorder.num_replays > num_rehearsed) == with_graphs


def test_rows_of_as_many_tokens_have_graphs_of_their_own(
    directory: Path, alone: list[Answer], cores: list[RealCore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As rows that verify draft tokens will be: here they are chunks of four."""
    device_on_cpu(monkeypatch, with_graphs=True)
    monkeypatch.setattr(device_start, "graph_keys", partial(graph_keys, query_lens=(1, 4)))
    run, ran = StepGraphs.run, list[GraphKey]()
    monkeypatch.setattr(StepGraphs, "run", lambda self, key: ran.append(key) or run(self, key))
    core = RealCore(directory, long_prefill_token_threshold=4, max_num_seqs=3, enable_prefix_caching=False)
    cores.append(core)
    graphs = graphs_of(core)
    assert graphs is not None
    assert (graphs.sizes(1), graphs.sizes(4)) == ([1, 2, 3], [1, 2, 3])
    for index in (0, 4, 9):  # 40, 8 and 8 tokens
        REQUESTS.add(core, index)
    core.run()
    for index in (0, 4, 9):
        assert_like(REQUESTS.answer(core, index), alone[index])
    assert GraphKey(3, 4) in ran
    assert GraphKey(3, 1) in ran


def test_an_answer_in_another_batch_is_the_same_in_each_family(tmp_path: Path, cores: list[RealCore]) -> None:
    checkpoints = TinyCheckpoints(tmp_path)
    for family in ("qwen3", "gemma2", "mixtral"):
        directory = checkpoints.get(family, with_tokenizer=False)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("WAVETRAIN_KERNELS", "reference")
            host = RealCore(directory, max_num_batched_tokens=32, async_scheduling=True)
            device_on_cpu(patch, with_graphs=False)
            device = RealCore(directory, max_num_batched_tokens=32)
        cores += [host, device]
        for core in (host, device):
            for index in range(6):
                REQUESTS.add(core, index)
            core.run()
        for index in range(6):
            assert_like(REQUESTS.answer(device, index), REQUESTS.answer(host, index))
