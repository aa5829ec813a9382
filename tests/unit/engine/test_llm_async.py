# SPDX-License-Identifier: Apache-2.0
"""AsyncLLM on the fake executor: streams, cancels of every kind, many at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from fakes import tiny_tokenizers as tiny
from fakes.core import make_facts
from fakes.executor import FakeExecutor, sequential_output
from wavetrain_engine import (
    AsyncLLM,
    CheckpointError,
    DeadlineExceeded,
    EngineConfig,
    EngineDead,
    QueueFull,
    RequestError,
    RequestFailed,
    RequestOutput,
    SamplingParams,
    Tokenizer,
)
from wavetrain_engine.plan import PendingResult, StepPlan

EOS = 1
VOCAB_SIZE = 259
MAX_MODEL_LEN = 512
NAN = 258
GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
ENDLESS = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(tiny.byte_level(tmp_path_factory.mktemp("async_llm"), vocab_size=VOCAB_SIZE))


class SlowExecutor(FakeExecutor):
    """Takes its time, so that a test can act while requests run."""

    def submit(self, plan: StepPlan) -> PendingResult:
        time.sleep(0.0005)
        return super().submit(plan)


def make(
    tokenizer: Tokenizer, *, fails_at_step: int | None = None, nan_token_id: int | None = None, **flags: int
) -> AsyncLLM:
    small = {"num_blocks": 512, "block_size": 4, "max_num_seqs": 8, "max_num_batched_tokens": 64}
    config = EngineConfig.from_flags(small | flags)
    executor = SlowExecutor(
        num_blocks=512,
        block_size=4,
        vocab_size=VOCAB_SIZE,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        eos=[EOS],
        nan_token_id=nan_token_id,
        fails_at_step=fails_at_step,
    )
    facts = make_facts(config, max_model_len=MAX_MODEL_LEN, vocab_size=VOCAB_SIZE, eos=[EOS])
    return AsyncLLM.from_executor(config, facts, executor, tokenizer)


@pytest.fixture
async def llm(tokenizer: Tokenizer) -> AsyncIterator[AsyncLLM]:
    async with make(tokenizer) as made:
        yield made
        for _ in range(500):
            stats = await made.read_stats()
            if not stats.num_running and not stats.num_waiting:
                break
            await asyncio.sleep(0.005)
        assert (stats.num_running, stats.num_waiting, stats.num_blocks_used) == (0, 0, 0)


def expected(prompt: list[int], params: SamplingParams = GREEDY) -> list[int]:
    return sequential_output(prompt, params, vocab_size=VOCAB_SIZE, max_model_len=MAX_MODEL_LEN, eos=[EOS])[0]


async def last_of(llm: AsyncLLM, prompt: list[int], params: SamplingParams = GREEDY) -> RequestOutput:
    outputs = [output async for output in llm.generate(prompt, params)]
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    return outputs[-1]


async def test_outputs_grow(llm: AsyncLLM) -> None:
    before: list[int] = []
    text = ""
    async for output in llm.generate("prompt é", GREEDY):
        (completion,) = output.outputs
        assert completion.token_ids[: len(before)] == before
        assert completion.text.startswith(text)
        before, text = completion.token_ids, completion.text
    assert before == expected(output.prompt_token_ids)
    assert output.outputs[0].finish_reason in ("length", "stop")


async def test_deltas_concatenate(llm: AsyncLLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True, logprobs=0, n=2)
    whole = [output async for output in llm.generate("prompt", params)][-1]
    texts, tokens, logprobs = ["", ""], [[], []], [[], []]
    async for output in llm.generate("prompt", params, is_delta=True):
        for index, completion in enumerate(output.outputs):
            texts[index] += completion.text
            tokens[index] += completion.token_ids
            logprobs[index] += completion.logprobs or []
    for index, completion in enumerate(whole.outputs):
        assert (texts[index], tokens[index]) == (completion.text, completion.token_ids)
        assert logprobs[index] == completion.logprobs


async def test_many_at_once(llm: AsyncLLM) -> None:
    outputs = await asyncio.gather(*(last_of(llm, [5, index]) for index in range(64)))
    assert [output.outputs[0].token_ids for output in outputs] == [expected([5, index]) for index in range(64)]


async def test_closing_the_iterator_ends_the_request(llm: AsyncLLM) -> None:
    stream = llm.generate([5], ENDLESS)
    async for _ in stream:
        break
    await stream.aclose()
    for _ in range(500):
        if not (await llm.read_stats()).num_running:
            break
        await asyncio.sleep(0.005)
    assert not (await llm.read_stats()).num_running


async def test_cancelling_the_task_ends_the_request(llm: AsyncLLM) -> None:
    task = asyncio.create_task(last_of(llm, [5], ENDLESS))
    while not (await llm.read_stats()).num_running:
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("n", [1, 2])
async def test_cancel_by_id_ends_the_iterator(llm: AsyncLLM, n: int) -> None:
    outputs: list[RequestOutput] = []
    async for output in llm.generate([5], ENDLESS.replace(n=n), "mine"):
        if not outputs:
            await llm.cancel("mine")
            await llm.cancel("unknown")
        outputs.append(output)
    assert [completion.finish_reason for completion in outputs[-1].outputs] == ["cancelled"] * n
    assert outputs[-1].outputs[0].token_ids == expected([5], ENDLESS)[: len(outputs[-1].outputs[0].token_ids)]


async def test_a_stop_string_ends_it(llm: AsyncLLM, tokenizer: Tokenizer) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)
    whole = (await last_of(llm, [5], params)).outputs[0]
    stop = tokenizer.decode(whole.token_ids[4:6])
    (completion,) = (await last_of(llm, [5], params.replace(stop=[stop]))).outputs
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
    assert completion.text == whole.text[: whole.text.index(stop)]


async def test_request_ids_are_unique_while_unfinished(llm: AsyncLLM) -> None:
    stream = llm.generate([5], ENDLESS, "mine")
    await stream.__anext__()
    with pytest.raises(RequestError, match="in use"):
        await llm.generate([5], GREEDY, "mine").__anext__()
    await stream.aclose()
    assert (await last_of(llm, [5])).finished


async def test_errors_are_raised(llm: AsyncLLM) -> None:
    with pytest.raises(RequestError, match="empty"):
        await last_of(llm, [])
    with pytest.raises(DeadlineExceeded):
        async for _ in llm.generate([5], ENDLESS, timeout_s=0.02):
            pass
    with pytest.raises(RequestError, match="timeout_s"):
        await llm.generate([5], GREEDY, timeout_s=-1).__anext__()


@pytest.mark.parametrize(
    "option",
    [
        {"sampling_params": {"n": 2}},
        {"priority": "high"},
        {"priority": None},
        {"cache_salt": None},
        {"cache_salt": 5},
        {"timeout_s": "5"},
    ],
    ids=str,
)
async def test_an_option_of_a_wrong_type_disturbs_nobody(tokenizer: Tokenizer, option: dict[str, Any]) -> None:
    async with make(tokenizer) as llm:
        running = asyncio.create_task(last_of(llm, [5]))
        with pytest.raises(RequestError, match=next(iter(option))):
            await llm.generate([6], **option).__anext__()
        assert (await running).outputs[0].token_ids == expected([5])


async def test_nan_is_request_failed(tokenizer: Tokenizer) -> None:
    async with make(tokenizer, nan_token_id=NAN) as llm:
        with pytest.raises(RequestFailed, match="not finite"):
            await last_of(llm, [5, NAN])


async def test_a_full_queue_is_busy(tokenizer: Tokenizer) -> None:
    async with make(tokenizer, max_queue_size=1) as llm:
        streams = [llm.generate([5, index], ENDLESS) for index in range(8)]
        await asyncio.gather(*(stream.__anext__() for stream in streams))
        waiting = asyncio.create_task(llm.generate([6], ENDLESS).__anext__())
        while not (await llm.read_stats()).num_waiting:
            await asyncio.sleep(0.001)
        with pytest.raises(QueueFull, match="try again"):
            await llm.generate([7], GREEDY).__anext__()
        waiting.cancel()
        await asyncio.gather(*(stream.aclose() for stream in streams), waiting, return_exceptions=True)


async def test_a_failed_step_ends_all(tokenizer: Tokenizer) -> None:
    llm = make(tokenizer, fails_at_step=5)
    results = await asyncio.gather(*(last_of(llm, [5, index], ENDLESS) for index in range(4)), return_exceptions=True)
    assert [type(result) for result in results] == [EngineDead] * 4
    await llm.close()
    await llm.close()
    with pytest.raises(EngineDead):
        await last_of(llm, [5])


async def test_load_needs_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        await AsyncLLM.load(str(tmp_path))


def test_one_engine_serves_several_loops(tokenizer: Tokenizer) -> None:
    llm = make(tokenizer)
    for _ in range(3):
        assert asyncio.run(last_of(llm, [5])).outputs[0].token_ids == expected([5])
    asyncio.run(llm.close())
