# SPDX-License-Identifier: Apache-2.0
"""LLM on the fake executor: prompts in every shape, outputs in order, errors, cancels, the end."""

from __future__ import annotations

import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fakes import tiny_tokenizers as tiny
from fakes.core import make_facts
from fakes.executor import FakeExecutor, sequential_output
from wavetrain_engine import (
    LLM,
    CheckpointError,
    ConfigError,
    EngineConfig,
    EngineDead,
    InvalidSamplingParams,
    PromptTooLong,
    RequestError,
    SamplingParams,
    Tokenizer,
)
from wavetrain_engine.plan import PendingResult, StepPlan
from wavetrain_engine.text.chat_template import ChatTemplate

EOS = 1
VOCAB_SIZE = 259
MAX_MODEL_LEN = 256
NAN = 258
GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
Factory = Callable[..., LLM]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(tiny.byte_level(tmp_path_factory.mktemp("llm"), vocab_size=VOCAB_SIZE))


class InterruptedExecutor(FakeExecutor):
    """Calls `on_step` before each step, on the engine thread."""

    on_step: Callable[[int], None] = staticmethod(lambda step_id: None)

    def submit(self, plan: StepPlan) -> PendingResult:
        self.on_step(plan.step_id)
        return super().submit(plan)


@pytest.fixture
def make_llm(tokenizer: Tokenizer) -> Iterator[Factory]:
    made: list[LLM] = []

    def make(has_tokenizer: bool = True, template: str | None = None, **flags: Any) -> LLM:
        own = {name: flags.pop(name) for name in ("nan_token_id", "fails_at_step") if name in flags}
        small = {"num_blocks": 256, "block_size": 4, "max_num_seqs": 8, "max_num_batched_tokens": 64}
        config = EngineConfig.from_flags(small | flags)
        executor = InterruptedExecutor(
            num_blocks=config.cache.num_blocks or 0,
            block_size=4,
            vocab_size=VOCAB_SIZE,
            max_num_seqs=8,
            max_num_batched_tokens=64,
            eos=[EOS],
            **own,
        )
        chat_template = None if template is None else ChatTemplate({"default": template}, tokenizer.named_tokens)
        facts = make_facts(config, max_model_len=MAX_MODEL_LEN, vocab_size=VOCAB_SIZE, eos=[EOS])
        made.append(LLM.from_executor(config, facts, executor, tokenizer if has_tokenizer else None, chat_template))
        made[-1].executor = executor  # type: ignore[attr-defined]
        return made[-1]

    yield make
    for llm in made:
        llm.close()


def expected(prompt: list[int], params: SamplingParams = GREEDY) -> list[int]:
    return sequential_output(prompt, params, vocab_size=VOCAB_SIZE, max_model_len=MAX_MODEL_LEN, eos=[EOS])[0]


def test_text_prompts_come_back_in_order(make_llm: Factory, tokenizer: Tokenizer) -> None:
    llm = make_llm()
    prompts = [f"prompt {index} é" * (1 + index % 3) for index in range(20)]
    params = [SamplingParams(temperature=0.0, max_tokens=3 + 5 * (index % 4)) for index in range(20)]
    outputs = llm.generate(prompts, params)
    assert [output.prompt for output in outputs] == prompts
    for output, param in zip(outputs, params, strict=True):
        assert output.prompt_token_ids == tokenizer.encode(output.prompt or "")
        (completion,) = output.outputs
        assert completion.token_ids == expected(output.prompt_token_ids, param)
        visible = [*output.prompt_token_ids, *completion.token_ids]
        assert (output.prompt or "") + completion.text == tokenizer.decode(visible)
        assert output.finished
        assert completion.is_finished
        assert output.num_cached_tokens is not None
        assert (completion.logprobs, completion.cumulative_logprob, output.prompt_logprobs) == (None, None, None)
    assert llm.read_stats().num_blocks_used == 0


def test_every_shape_of_prompt(make_llm: Factory, tokenizer: Tokenizer) -> None:
    llm = make_llm()
    ids = tokenizer.encode("hello")
    want = expected(ids)
    for prompt in ("hello", ids, tuple(ids), [ids], ["hello"], {"prompt": "hello"}, {"prompt_token_ids": ids}):
        (output,) = llm.generate(prompt, GREEDY)
        assert output.outputs[0].token_ids == want
    outputs = llm.generate(["hello", ids, {"prompt_token_ids": ids}], GREEDY)
    assert [output.outputs[0].token_ids for output in outputs] == [want] * 3
    assert [output.prompt for output in outputs] == ["hello", None, None]
    assert llm.generate([], GREEDY) == []


@pytest.mark.parametrize(
    ("prompts", "params", "error", "message"),
    [
        ("", GREEDY, None, ""),  # BOS alone is a prompt
        ([[]], GREEDY, RequestError, "prompt is empty"),
        (["fine", "a\ud800"], GREEDY, RequestError, "valid Unicode"),
        ([5, VOCAB_SIZE], GREEDY, RequestError, "not in the vocabulary"),
        ([[5], [-1]], GREEDY, RequestError, "not in the vocabulary"),
        ([[2**70]], GREEDY, RequestError, "beyond the vocabulary"),
        ([5] * MAX_MODEL_LEN, GREEDY, PromptTooLong, "max_model_len is 256"),
        ("x" * 10_000_000, GREEDY, PromptTooLong, "10000000 characters"),
        ([[1.5]], GREEDY, RequestError, "a string or a list of token ids"),
        ([[True]], GREEDY, RequestError, "a string or a list of token ids"),
        (5, GREEDY, RequestError, "strings or lists of token ids"),
        ([None], GREEDY, RequestError, "a string or a list of token ids"),
        ({"promt": "x"}, GREEDY, RequestError, "promt"),
        ({"prompt": "x", "prompt_token_ids": [1]}, GREEDY, RequestError, "exactly one key"),
        (["a", "b"], [GREEDY], RequestError, "one for each of the 2 prompts"),
        ("a", {"max_tokens": 5}, RequestError, "sampling_params must be one value"),
        ("a", SamplingParams(stop_token_ids=[9999]), InvalidSamplingParams, "stop_token_ids 9999"),
        ("a", SamplingParams(stop=["x"], detokenize=False), InvalidSamplingParams, "stop needs text"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(
    make_llm: Factory, prompts: Any, params: Any, error: type[Exception] | None, message: str
) -> None:
    llm = make_llm()
    if error is None:
        assert llm.generate(prompts, params)[0].finished
        return
    with pytest.raises(error, match=message):
        llm.generate(prompts, params)
    assert llm.read_stats().num_requests_accepted == 0
    assert llm.generate("fine", GREEDY)[0].finished


def test_n_sequences_of_one_prompt(make_llm: Factory) -> None:
    llm = make_llm()
    params = SamplingParams(n=3, seed=7, max_tokens=10, logprobs=1, prompt_logprobs=1)
    (output,) = llm.generate([5, 6, 7], params)
    assert [completion.index for completion in output.outputs] == [0, 1, 2]
    for index, completion in enumerate(output.outputs):
        assert completion.token_ids == expected([5, 6, 7], params.replace(n=1, seed=7 + index))
    assert output.outputs[0].token_ids != output.outputs[1].token_ids
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == 3


def test_logprobs_in_vllms_shape(make_llm: Factory, tokenizer: Tokenizer) -> None:
    llm = make_llm(max_num_batched_tokens=64)
    params = SamplingParams(temperature=0.0, max_tokens=5, logprobs=0, prompt_logprobs=0)
    prompt = tokenizer.encode("a longer prompt")
    (output,) = llm.generate(prompt, params)
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    for token_id, entry in zip(prompt[1:], output.prompt_logprobs[1:], strict=True):
        assert entry is not None
        assert list(entry) == [token_id]
    (completion,) = output.outputs
    assert completion.logprobs is not None
    for token_id, entry in zip(completion.token_ids, completion.logprobs, strict=True):
        assert entry[token_id].decoded_token == tokenizer.token_text(token_id)
        assert entry[token_id].rank == 1
    total = sum(
        entry[token_id].logprob for token_id, entry in zip(completion.token_ids, completion.logprobs, strict=True)
    )
    assert completion.cumulative_logprob == pytest.approx(total)


def test_a_stop_string_ends_the_request_in_the_core(make_llm: Factory, tokenizer: Tokenizer) -> None:
    llm = make_llm()
    llm.executor.on_step = lambda step_id: time.sleep(0.001)  # type: ignore[attr-defined]
    free = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    whole = llm.generate("x", free)[0].outputs[0]
    stop = tokenizer.decode(whole.token_ids[4:6])
    first = whole.text.index(stop)
    (output,) = llm.generate("x", free.replace(stop=[stop]))
    (completion,) = output.outputs
    assert (completion.text, completion.finish_reason, completion.stop_reason) == (whole.text[:first], "stop", stop)
    stats = llm.read_stats()
    assert stats.num_running == stats.num_blocks_used == 0
    assert stats.num_output_tokens < 80


def test_echo_begins_with_the_prompt(make_llm: Factory, tokenizer: Tokenizer) -> None:
    llm = make_llm()
    (output,) = llm.generate("hey", GREEDY, echo=True)
    assert output.outputs[0].token_ids[: len(output.prompt_token_ids)] == output.prompt_token_ids
    assert output.outputs[0].text.startswith("hey")
    (of_ids,) = llm.generate(output.prompt_token_ids, GREEDY, echo=True)
    assert of_ids.outputs[0].text == output.outputs[0].text


def test_defaults_are_the_checkpoints(make_llm: Factory) -> None:
    (output,) = make_llm().generate([5])
    assert len(output.outputs[0].token_ids) <= 16


def test_more_prompts_than_the_queue_holds(make_llm: Factory) -> None:
    llm = make_llm(max_queue_size=2)
    outputs = llm.generate([[5, index] for index in range(60)], SamplingParams(temperature=0.0, max_tokens=4))
    assert [output.outputs[0].token_ids for output in outputs] == [
        expected([5, index], SamplingParams(temperature=0.0, max_tokens=4)) for index in range(60)
    ]


@pytest.mark.parametrize("max_queue_size", [0, 1, 3])
def test_nobody_is_refused_while_blocks_are_short(make_llm: Factory, max_queue_size: int) -> None:
    llm = make_llm(max_queue_size=max_queue_size, num_blocks=64)  # one request of max_model_len has them all
    prompts = [[5, index] * 60 for index in range(30)]
    outputs = llm.generate(prompts, GREEDY)
    assert [output.outputs[0].token_ids for output in outputs] == [expected(prompt) for prompt in prompts]
    assert max(len(plan.scheduled) for plan in llm.executor.plans) < 8  # type: ignore[attr-defined]


def test_a_forked_child_is_told(make_llm: Factory) -> None:
    llm = make_llm()
    child = multiprocessing.get_context("fork").Process(target=_use_parents_engine, args=(llm,))
    child.start()
    child.join(20)
    try:
        assert child.exitcode == 0
    finally:
        child.kill()
    assert llm.generate([5], GREEDY)[0].outputs[0].token_ids == expected([5])


def _use_parents_engine(llm: LLM) -> None:
    for call in (lambda: llm.generate([5], GREEDY), llm.read_stats):
        with pytest.raises(EngineDead, match="fork"):
            call()
    llm.close()


def test_threads_share_the_engine(make_llm: Factory) -> None:
    llm = make_llm(max_queue_size=0)
    results: dict[int, list[list[int]]] = {}

    def work(index: int) -> None:
        outputs = llm.generate([[7, index, part] for part in range(10)], GREEDY)
        results[index] = [output.outputs[0].token_ids for output in outputs]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {index: [expected([7, index, part]) for part in range(10)] for index in range(4)}


def test_nan_ends_one_request_only(make_llm: Factory) -> None:
    llm = make_llm(nan_token_id=NAN)
    params = SamplingParams(temperature=0.0, max_tokens=3, logit_bias=None)
    bad, good = llm.generate([[5, NAN], [5, 6]], params)
    assert bad.outputs[0].finish_reason == "error"
    assert "not finite" in str(bad.error)
    assert good.error is None
    assert good.outputs[0].token_ids == expected([5, 6], params)


def test_a_failed_step_is_engine_dead(make_llm: Factory) -> None:
    llm = make_llm(fails_at_step=3)
    with pytest.raises(EngineDead, match="the engine failed"):
        llm.generate([[5], [6]], GREEDY)
    with pytest.raises(EngineDead, match="the engine failed"):
        llm.generate([5], GREEDY)
    llm.close()
    with pytest.raises(EngineDead):
        llm.read_stats()
    assert llm.executor.num_shutdowns == 1  # type: ignore[attr-defined]


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT does what it does in a terminal: a shell's background jobs ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_cancels_everything(make_llm: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = make_llm()
    endless = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True)

    def interrupt(step_id: int) -> None:
        if step_id == 5:
            import _thread

            _thread.interrupt_main()
        time.sleep(0.002)

    llm.executor.on_step = interrupt  # type: ignore[attr-defined]
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[index] for index in range(20)], endless)
    for _ in range(500):
        stats = llm.read_stats()
        if stats.num_running == stats.num_waiting == 0:
            break
        time.sleep(0.01)
    assert (stats.num_running, stats.num_waiting, stats.num_blocks_used) == (0, 0, 0)
    llm.executor.on_step = lambda step_id: None  # type: ignore[attr-defined]
    assert llm.generate([5], GREEDY)[0].outputs[0].token_ids == expected([5])


def test_close_is_idempotent_and_final(make_llm: Factory) -> None:
    with make_llm() as llm:
        assert llm.generate([5], GREEDY)[0].finished
    llm.close()
    assert llm.executor.num_shutdowns == 1  # type: ignore[attr-defined]
    with pytest.raises(EngineDead, match="closed"):
        llm.generate([5], GREEDY)


def test_close_ends_what_runs(make_llm: Factory) -> None:
    llm = make_llm()
    llm.executor.on_step = lambda step_id: time.sleep(0.002)  # type: ignore[attr-defined]
    errors: list[BaseException] = []

    def work() -> None:
        try:
            llm.generate([5], SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True))
        except EngineDead as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    while llm.read_stats().num_running == 0:
        time.sleep(0.001)
    llm.close()
    thread.join(10)
    assert len(errors) == 1


def test_chat(make_llm: Factory, tokenizer: Tokenizer) -> None:
    llm = make_llm(template="{{ bos_token }}{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}")
    conversation = [{"role": "user", "content": "hi"}]
    (output,) = llm.chat(conversation, GREEDY)
    assert output.prompt == "<s>user:hi\n"
    assert output.prompt_token_ids == tokenizer.encode("<s>user:hi\n", add_special_tokens=False)
    assert output.outputs[0].token_ids == expected(output.prompt_token_ids)
    assert len(llm.chat([conversation, conversation], GREEDY)) == 2
    (other,) = llm.chat(conversation, GREEDY, chat_template="{{ word }}", chat_template_kwargs={"word": "W"})
    assert other.prompt == "W"
    with pytest.raises(RequestError, match="no chat template"):
        make_llm().chat(conversation, GREEDY)


def test_token_ids_only(make_llm: Factory) -> None:
    llm = make_llm(has_tokenizer=False)
    (output,) = llm.generate([5, 6], SamplingParams(temperature=0.0, max_tokens=4, logprobs=0))
    assert (output.prompt, output.outputs[0].text) == (None, "")
    assert output.outputs[0].token_ids == expected([5, 6], GREEDY.replace(max_tokens=4))
    assert output.outputs[0].logprobs is not None
    assert all(entry.decoded_token is None for table in output.outputs[0].logprobs for entry in table.values())
    for params in (SamplingParams(stop=["x"]), SamplingParams(bad_words=["x"])):
        with pytest.raises(InvalidSamplingParams, match="tokenizer"):
            llm.generate([5], params)
    for call in (lambda: llm.generate("text"), lambda: llm.chat([{"role": "user"}]), lambda: llm.tokenizer):
        with pytest.raises(RequestError, match="no tokenizer"):
            call()


def test_progress_bar(make_llm: Factory, capsys: pytest.CaptureFixture[str]) -> None:
    make_llm().generate([[5], [6]], GREEDY, show_progress=True)
    assert "2/2" in capsys.readouterr().out


def test_priorities(make_llm: Factory) -> None:
    outputs = make_llm().generate([[5], [6]], GREEDY, priority=[1, -1], cache_salt="tenant")
    assert [output.outputs[0].token_ids for output in outputs] == [expected([5]), expected([6])]


def test_errors_at_load(tmp_path: Any) -> None:
    with pytest.raises(CheckpointError):
        LLM(model=str(tmp_path / "missing"))
    with pytest.raises(CheckpointError, match="no checkpoint directory"):
        LLM(model="x" * 5000)
    with pytest.raises(CheckpointError, match="skip-tokenizer-init"):
        LLM(model=str(tmp_path))
    with pytest.raises(ConfigError, match="max_num_seqs"):
        LLM(model=str(tmp_path), max_num_seq=3)
