# SPDX-License-Identifier: Apache-2.0
"""TextStream: updates in, text out; stop strings, stop tokens and the end of a request."""

from __future__ import annotations

from pathlib import Path

import pytest

from fakes import tiny_tokenizers as tiny
from wavetrain_engine.request import FinishReason, RequestUpdate, TokenLogprobs
from wavetrain_engine.sampling_params import SamplingParams
from wavetrain_engine.text.bad_words import bad_words_token_ids
from wavetrain_engine.text.text_stream import TextDelta, TextStream
from wavetrain_engine.text.tokenizer import Tokenizer

EOS = 1


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(tiny.byte_level(tmp_path_factory.mktemp("text_stream"), vocab_size=259))


def update(token_ids: list[int], **fields) -> RequestUpdate:
    return RequestUpdate(request_id="r", new_token_ids=token_ids, **fields)


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def test_text_of_a_request_that_runs_to_its_length(tokenizer: Tokenizer) -> None:
    ids = ids_of(tokenizer, "hé😀")[:-1]
    stream = TextStream(tokenizer, SamplingParams(), [0])
    deltas = [stream.push(update([token_id])) for token_id in ids[:-1]]
    deltas.append(stream.push(update(ids[-1:], finish_reason=FinishReason.LENGTH)))
    assert "".join(delta.text for delta in deltas) == "hé\ufffd"
    assert [token_id for delta in deltas for token_id in delta.token_ids] == ids
    assert [delta.finish_reason for delta in deltas] == [None] * (len(ids) - 1) + [FinishReason.LENGTH]
    assert stream.is_finished
    assert stream.push(update([5])) == TextDelta()


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(stop=["zzz"])])
def test_eos_is_a_token_but_no_text(tokenizer: Tokenizer, params: SamplingParams) -> None:
    stream = TextStream(tokenizer, params)
    delta = stream.push(update([*ids_of(tokenizer, "hi"), EOS], finish_reason=FinishReason.STOP))
    assert (delta.text, delta.finish_reason, delta.stop_reason) == ("hi", FinishReason.STOP, None)
    assert delta.token_ids[-1] == EOS


@pytest.mark.parametrize(("includes", "text"), [(False, "hi"), (True, "hi!")])
def test_a_stop_token_is_text_only_on_request(tokenizer: Tokenizer, includes: bool, text: str) -> None:
    (bang,) = ids_of(tokenizer, "!")
    stream = TextStream(tokenizer, SamplingParams(stop_token_ids=[bang], include_stop_str_in_output=includes))
    finish = {"finish_reason": FinishReason.STOP, "stop_token_id": bang}
    delta = stream.push(update([*ids_of(tokenizer, "hi"), bang], **finish))
    assert (delta.text, delta.stop_reason, delta.is_stopped) == (text, bang, False)


@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
@pytest.mark.parametrize(("includes", "text"), [(False, "one "), (True, "one stop")])
def test_a_stop_string_ends_the_text(tokenizer: Tokenizer, chunk: int, includes: bool, text: str) -> None:
    params = SamplingParams(stop=["stop", "more"], include_stop_str_in_output=includes, logprobs=0)
    ids = ids_of(tokenizer, "one stop and more")
    stream = TextStream(tokenizer, params, [0])
    deltas = []
    for start in range(0, len(ids), chunk):
        part = ids[start : start + chunk]
        logprobs = [TokenLogprobs([token_id], [-1.0], [1]) for token_id in part]
        deltas.append(stream.push(update(part, logprobs=logprobs)))
    assert "".join(delta.text for delta in deltas) == text
    (last,) = (delta for delta in deltas if delta.finish_reason)
    assert (last.finish_reason, last.stop_reason, last.is_stopped) == (FinishReason.STOP, "stop", True)
    tokens = [token_id for delta in deltas for token_id in delta.token_ids]
    assert tokens == ids_of(tokenizer, "one stop")
    assert [entry.token_ids[0] for delta in deltas for entry in delta.logprobs or []] == tokens
    assert stream.push(update([], finish_reason=FinishReason.CANCELLED)) == TextDelta()


def test_a_stop_string_in_the_last_update_needs_no_cancel(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, SamplingParams(stop=["b"]))
    delta = stream.push(update(ids_of(tokenizer, "ab"), finish_reason=FinishReason.LENGTH))
    assert (delta.text, delta.finish_reason, delta.stop_reason, delta.is_stopped) == (
        "a",
        FinishReason.STOP,
        "b",
        False,
    )


def test_held_back_text_is_output_at_the_end(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, SamplingParams(stop=["stop"]))
    assert stream.push(update(ids_of(tokenizer, "a sto"))).text == "a "
    assert stream.push(update([EOS], finish_reason=FinishReason.STOP)).text == "sto"


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_min_tokens_comes_before_stop_strings(tokenizer: Tokenizer, chunk: int) -> None:
    text = "xaxax"
    ids = ids_of(tokenizer, text)
    assert len(ids) == 5
    for min_tokens, expected in ((0, "x"), (2, "x"), (3, "xax"), (4, "xax"), (5, "xaxax")):
        stream = TextStream(tokenizer, SamplingParams(stop=["a"], min_tokens=min_tokens))
        deltas = [stream.push(update(ids[start : start + chunk])) for start in range(0, len(ids), chunk)]
        deltas.append(stream.push(update([], finish_reason=FinishReason.LENGTH)))
        assert "".join(delta.text for delta in deltas) == expected, min_tokens


def test_text_from_before_min_tokens_is_no_part_of_a_stop_string(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, SamplingParams(stop=["ab"], min_tokens=3))
    assert stream.push(update(ids_of(tokenizer, "xabab"))).text == "xab"


def test_a_stop_string_of_byte_tokens_fires_with_its_last_token(tmp_path: Path) -> None:
    llama = Tokenizer.load(tiny.sentencepiece(tmp_path))
    newline = 3 + 0x0A
    stream = TextStream(llama, SamplingParams(stop=["\n"]), llama.encode("self"))
    first = stream.push(update(llama.encode("the", add_special_tokens=False)))
    last = stream.push(update([newline]))
    assert (first.text, last.text, last.stop_reason, last.is_stopped) == (" the", "", "\n", True)


def test_tokens_pass_through_without_text(tokenizer: Tokenizer) -> None:
    for stream in (TextStream(None, SamplingParams()), TextStream(tokenizer, SamplingParams(detokenize=False))):
        delta = stream.push(update([5, EOS], finish_reason=FinishReason.STOP))
        assert (delta.text, delta.token_ids, delta.finish_reason) == ("", [5, EOS], FinishReason.STOP)


def test_bad_words_at_the_beginning_and_after_a_space(tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert bad_words_token_ids(tokenizer, [" ab"]) == [ids_of(tokenizer, "ab")]
    merged = Tokenizer.load(tiny.byte_level(tmp_path, vocab_size=320))
    word = next(
        text for text in ("the", "name", "self") if len(ids_of(merged, f" {text}")) == len(ids_of(merged, text))
    )
    assert bad_words_token_ids(merged, [word]) == [ids_of(merged, word), ids_of(merged, f" {word}")]
    assert bad_words_token_ids(tokenizer, [" "]) == [ids_of(tokenizer, " ")]
