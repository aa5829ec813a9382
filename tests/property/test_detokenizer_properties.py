# SPDX-License-Identifier: Apache-2.0
"""Whatever the ids and however they are cut, deltas concatenate to what the tokenizers library decodes."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import decoders

from fakes import tiny_tokenizers as tiny
from wavetrain_engine.text.detokenizer import Detokenizer, delta_text, next_tail
from wavetrain_engine.text.stop import StopMatch, StopMatcher
from wavetrain_engine.text.tokenizer import Tokenizer

BUILDERS = {
    "byte_level": tiny.byte_level,
    **{kind: lambda path, kind=kind: tiny.sentencepiece(path, kind) for kind in tiny.SENTENCEPIECE_KINDS},
    "joined": tiny.word_level,
    "joined_cleaned": lambda path: tiny.word_level(path, clean_up_tokenization_spaces=True),
    "word_piece": lambda path: tiny.word_level(path, decoder=decoders.WordPiece(cleanup=False)),
    "byte_level_words": lambda path: tiny.word_level(
        path, decoder=decoders.ByteLevel(), clean_up_tokenization_spaces=True
    ),
}
QUICK = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module", params=BUILDERS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory: Path = tmp_path_factory.mktemp(request.param)
    return Tokenizer.load(BUILDERS[request.param](directory))


def draw_ids(data: st.DataObject, tokenizer: Tokenizer) -> list[int]:
    """Ids of text mixed with any ids at all: bytes without a beginning, special, unknown ones."""
    text = st.text(alphabet="the self▁ é日😀\n.'nt,", max_size=12)
    text_ids = text.map(lambda value: tokenizer.encode(value, add_special_tokens=False))
    any_ids = st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=6)
    byte_like = st.lists(st.integers(0, min(260, tokenizer.vocab_size)), max_size=6)
    parts = data.draw(st.lists(st.one_of(text_ids, any_ids, byte_like), max_size=6), label="parts")
    return [token_id for part in parts for token_id in part]


def draw_chunks(data: st.DataObject, ids: list[int]) -> list[list[int]]:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=8), label="cuts"))
    if data.draw(st.booleans(), label="one by one"):
        cuts = list(range(len(ids)))
    borders = [0, *cuts, len(ids)]
    return [ids[start:end] for start, end in itertools.pairwise(borders)]


@QUICK
@given(data=st.data(), skips_special=st.booleans())
def test_deltas_concatenate_to_the_whole(tokenizer: Tokenizer, data: st.DataObject, skips_special: bool) -> None:
    ids = draw_ids(data, tokenizer)
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skips_special)
    text = ""
    whole = tokenizer.decode(ids, skips_special)
    for chunk in draw_chunks(data, ids):
        text += detokenizer.push(chunk)
        assert whole.startswith(text)
    pending = detokenizer.pending()
    assert detokenizer.flush() == pending
    assert text + pending == whole


@QUICK
@given(data=st.data(), skips_special=st.booleans())
def test_stateless_steps_concatenate_to_the_whole(
    tokenizer: Tokenizer, data: st.DataObject, skips_special: bool
) -> None:
    ids = draw_ids(data, tokenizer)
    chunks = draw_chunks(data, ids)
    text, tail, detokenizer = "", [], Detokenizer(tokenizer, skip_special_tokens=skips_special)
    for index, chunk in enumerate(chunks):
        is_final = index == len(chunks) - 1
        delta = delta_text(tokenizer, tail, chunk, is_final=is_final, skip_special_tokens=skips_special)
        assert delta == detokenizer.push(chunk) + (detokenizer.flush() if is_final else "")
        text += delta
        tail = next_tail(tokenizer, tail, chunk, skip_special_tokens=skips_special)
    assert text == tokenizer.decode(ids, skips_special)


@QUICK
@given(data=st.data())
def test_all_earlier_ids_are_a_tail_too(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = draw_ids(data, tokenizer)
    cut = data.draw(st.integers(0, len(ids)))
    tail = next_tail(tokenizer, [], ids[:cut])
    for is_final in (False, True):
        by_tail = delta_text(tokenizer, tail, ids[cut:], is_final=is_final)
        assert by_tail == delta_text(tokenizer, ids[:cut], ids[cut:], is_final=is_final)


@QUICK
@given(data=st.data())
def test_a_prompt_is_continued(tokenizer: Tokenizer, data: st.DataObject) -> None:
    prompt = data.draw(st.text(alphabet="the self é日😀\n", max_size=20))
    prompt_ids = tokenizer.encode(prompt)
    ids = tokenizer.encode(data.draw(st.text(alphabet="the self é日😀", max_size=8)), add_special_tokens=False)
    detokenizer = Detokenizer(tokenizer, prompt_token_ids=prompt_ids)
    text = "".join(detokenizer.push([token_id]) for token_id in ids) + detokenizer.flush()
    if tokenizer.cleans_up:
        return  # the border of prompt and output may be cleaned away: there is no exact continuation
    assert tokenizer.decode(prompt_ids) + text == tokenizer.decode([*prompt_ids, *ids])


def first_stop(text: str, stops: list[str]) -> tuple[int, str] | None:
    """The oracle: the earliest end of any stop string; of two with the same end, the longer."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return end, max(found, key=len)
    return None


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(alphabet="ab.", max_size=30),
    stops=st.lists(st.text(alphabet="ab.", min_size=1, max_size=6), min_size=1, max_size=6),
    includes_stop=st.booleans(),
    data=st.data(),
)
def test_stop_matcher_finds_the_first_stop(
    text: str, stops: list[str], includes_stop: bool, data: st.DataObject
) -> None:
    matcher = StopMatcher(stops, include_stop_str_in_output=includes_stop)
    output, match = "", None
    for chunk in draw_chunks(data, list(text)):
        expected = matcher.would_match("".join(chunk))
        result = matcher.push("".join(chunk))
        assert expected == isinstance(result, StopMatch)
        if isinstance(result, StopMatch):
            output, match = output + result.text, result.stop
            break
        output += result
    found = first_stop(text, stops)
    if found is None:
        assert match is None
        assert output + matcher.flush() == text
    else:
        end, stop = found
        assert match == stop
        assert output == text[: end if includes_stop else end - len(stop)]
