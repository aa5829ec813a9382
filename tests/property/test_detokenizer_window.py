# SPDX-License-Identifier: Apache-2.0
"""The ensemble's stateless detokenizer says exactly what `llm` says, however the tokens come in chunks."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes.tiny_tokenizers import byte_level, sentencepiece, word_level
from wavetrain_engine.request import FinishReason, RequestUpdate
from wavetrain_engine.sampling_params import SamplingParams
from wavetrain_engine.serving.detokenizer_window import Window, WindowTracker, pack_windows, unpack_windows, window_text
from wavetrain_engine.text.text_stream import TextStream
from wavetrain_engine.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> list[Tokenizer]:
    root: Path = tmp_path_factory.mktemp("tokenizers")
    made = [byte_level(root / "bytes"), word_level(root / "words")]
    made += [sentencepiece(root / kind, kind) for kind in ("strip", "gemma", "metaspace")]
    return [Tokenizer.load(path) for path in made]


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_windows_say_what_the_text_stream_says(tokenizers: list[Tokenizer], data: st.DataObject) -> None:
    tokenizer = data.draw(st.sampled_from(tokenizers))
    token = st.integers(0, tokenizer.vocab_size - 1)
    prompt = tokenizer.encode(data.draw(st.sampled_from(["x", "Grüße aus", "日本", "a 😀", "def f(self"])))
    chunks = data.draw(st.lists(st.lists(token, min_size=1, max_size=4), min_size=1, max_size=12))
    stop = data.draw(st.lists(st.sampled_from(["e", "th", " d", "é", "\n"]), max_size=2))
    stream = TextStream(tokenizer, SamplingParams(stop=stop), prompt)
    tracker = WindowTracker(tokenizer, prompt)
    pending: list[int] = []
    text = ""
    for index, chunk in enumerate(chunks):
        is_last = index == len(chunks) - 1
        reason = FinishReason.LENGTH if is_last else None
        delta = stream.push(RequestUpdate(request_id="r", new_token_ids=chunk, finish_reason=reason))
        pending += delta.token_ids
        text += delta.text
        if not delta.text and delta.finish_reason is None:
            continue  # the engine sends no response without text
        window = tracker.advance(pending, text, is_final=delta.finish_reason is not None)
        assert window_text(tokenizer, window) == text
        pending, text = [], ""
        if delta.finish_reason is not None:
            break


_ids = st.lists(st.integers(0, 1000), max_size=5)
_windows = st.builds(
    Window, tail_ids=_ids, token_ids=_ids, start=st.integers(0, 9), end=st.integers(0, 9), is_final=st.booleans()
)


@given(windows=st.lists(_windows, max_size=4), padding=st.lists(st.just(0), max_size=3))
def test_packed_windows_come_out_as_they_went_in(windows: list[Window], padding: list[int]) -> None:
    tail_ids, token_ids, spans = pack_windows(windows)
    assert unpack_windows(tail_ids + padding, token_ids + padding, spans) == windows
