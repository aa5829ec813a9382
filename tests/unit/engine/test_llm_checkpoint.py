# SPDX-License-Identifier: Apache-2.0
"""LLM on a real, tiny checkpoint, from its files to its text, against transformers on the same files."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from fakes.tiny_checkpoints import make_tiny_checkpoint
from wavetrain_engine import LLM, AsyncLLM, CheckpointError, SamplingParams

PROMPTS = ["def main(", "import json\nfrom", "é"]
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
SMALL = {"max_num_seqs": 4, "num_blocks": 128, "dtype": "float32", "device": "cpu"}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def llm(directory: Path) -> Iterator[LLM]:
    with LLM(model=str(directory), **SMALL) as made:
        yield made


def test_text_and_tokens_as_transformers(llm: LLM, directory: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    outputs = llm.generate(PROMPTS, GREEDY)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        ids = tokenizer.encode(prompt)
        assert output.prompt_token_ids == ids
        with torch.inference_mode():
            whole = model.generate(
                torch.tensor([ids]), max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=2
            )
        (completion,) = output.outputs
        assert completion.token_ids == whole[0, len(ids) :].tolist()
        assert prompt + completion.text == tokenizer.decode(whole[0], skip_special_tokens=True)
        assert completion.finish_reason == "length"


def test_the_same_seed_gives_the_same_tokens_in_any_batch(llm: LLM) -> None:
    params = SamplingParams(seed=11, max_tokens=12)
    (alone,) = llm.generate(PROMPTS[0], params)
    together = llm.generate([*PROMPTS, PROMPTS[0]], params)
    assert together[0].outputs[0].token_ids == together[-1].outputs[0].token_ids == alone.outputs[0].token_ids


def test_logprobs_hold_the_top_k(llm: LLM) -> None:
    (output,) = llm.generate(PROMPTS[0], GREEDY.replace(logprobs=3, prompt_logprobs=2, max_tokens=4))
    (completion,) = output.outputs
    for token_id, table in zip(completion.token_ids, completion.logprobs or [], strict=True):
        assert next(iter(table)) == token_id
        assert sorted(entry.rank or 0 for entry in table.values()) == [1, 2, 3]
        assert table[token_id].logprob == max(entry.logprob for entry in table.values())
    assert len(output.prompt_logprobs or []) == len(output.prompt_token_ids)


def test_bad_words_do_not_appear(llm: LLM) -> None:
    free = llm.generate(PROMPTS[0], GREEDY)[0].outputs[0].token_ids
    texts = {token_id: llm.tokenizer.token_text(token_id) for token_id in free}
    token_id, word = next(
        item for item in texts.items() if llm.tokenizer.encode(item[1].lstrip(), add_special_tokens=False) == [item[0]]
    )
    (output,) = llm.generate(PROMPTS[0], GREEDY.replace(bad_words=[word]))
    assert token_id not in output.outputs[0].token_ids


def test_chat_by_the_checkpoints_template(llm: LLM) -> None:
    (output,) = llm.chat([{"role": "user", "content": "hi"}], GREEDY)
    assert output.prompt == "<|bos|>user: hi\n"
    assert output.prompt_token_ids == llm.tokenizer.encode("<|bos|>user: hi\n", add_special_tokens=False)


async def test_the_stream_is_the_same(llm: LLM, directory: Path) -> None:
    (whole,) = llm.generate(PROMPTS[1], GREEDY)
    async with await AsyncLLM.load(str(directory), **SMALL) as streaming:
        text = ""
        async for output in streaming.generate(PROMPTS[1], GREEDY, is_delta=True):
            text += output.outputs[0].text
    assert text == whole.outputs[0].text


def test_a_checkpoint_without_tokenizer(directory: Path, tmp_path: Path, llm: LLM) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(directory, bare)
    (bare / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        LLM(model=str(bare), **SMALL)
    prompt = llm.tokenizer.encode(PROMPTS[0])
    with LLM(model=str(bare), skip_tokenizer_init=True, **SMALL) as without:
        (output,) = without.generate(prompt, GREEDY)
    assert output.outputs[0].token_ids == llm.generate(PROMPTS[0], GREEDY)[0].outputs[0].token_ids
    assert output.outputs[0].text == ""
