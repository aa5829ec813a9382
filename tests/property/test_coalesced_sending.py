# SPDX-License-Identifier: Apache-2.0
"""Streams under every pace of steps and sending: each token once and in order, the first and the last at once."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes.sending import SendingBench, TimedSender, token_update

_STEP_S = 0.01


def run_streams(
    bench: SendingBench, num_streams: int, num_tokens: int, *, step_s: float = _STEP_S
) -> list[TimedSender]:
    """Runs streams that start together and get a token in each step."""
    streams = [bench.open(f"r{index}") for index in range(num_streams)]
    for token in range(num_tokens):
        for index, (live, _) in enumerate(streams):
            live.push(token_update(f"r{index}", [token], is_last=token == num_tokens - 1))
        bench.run_sender()
        bench.wait(bench.now_s + step_s)
    return [sender for _, sender in streams]


def responses_per_token(senders: list[TimedSender]) -> float:
    return sum(len(sender.chunks) for sender in senders) / sum(sum(map(len, sender.chunks)) for sender in senders)


_TURN = st.tuples(
    st.lists(st.integers(0, 3), min_size=3, max_size=3),  # new tokens of each stream
    st.booleans(),  # whether the sender comes to its turn
    st.sampled_from([0.0, 0.003, 0.05]),  # how long nothing happens after it
)


@settings(max_examples=300, deadline=None)
@given(
    interval=st.none() | st.integers(1, 9),
    budget_cores=st.sampled_from([0.02, 0.1, 1.0]),
    cost_s=st.sampled_from([1e-5, 3e-4, 5e-3]),
    are_streaming=st.lists(st.booleans(), min_size=3, max_size=3),
    turns=st.lists(_TURN, max_size=30),
)
def test_every_token_leaves_once_and_in_order(
    interval: int | None,
    budget_cores: float,
    cost_s: float,
    are_streaming: list[bool],
    turns: list[tuple[list[int], bool, float]],
) -> None:
    bench = SendingBench(budget_cores=budget_cores, cost_s=cost_s, stream_interval=interval)
    streams = [bench.open(f"r{index}", stream=is_streaming) for index, is_streaming in enumerate(are_streaming)]
    told = [0] * len(streams)
    for counts, has_turn, pause_s in turns:
        for index, count in enumerate(counts):
            if count:
                streams[index][0].push(token_update(f"r{index}", list(range(told[index], told[index] + count))))
                told[index] += count
        if has_turn:
            bench.run_sender()
            for index, (_, sender) in enumerate(streams):
                assert bool(sender.chunks) == (are_streaming[index] and told[index] > 0), "the first token has waited"
        bench.wait(bench.now_s + pause_s)
    for index, (live, sender) in enumerate(streams):
        live.push(token_update(f"r{index}", [told[index]], is_last=True))
        bench.run_sender()
        assert sender.is_final.is_set()
        chunks = sender.chunks
        assert [token for chunk in chunks for token in chunk] == list(range(told[index] + 1))
        if not are_streaming[index]:
            assert len(chunks) == 1
        elif interval is not None:
            assert all(len(chunk) >= interval for chunk in chunks[1:-1])


@pytest.mark.parametrize(("num_streams", "most"), [(16, 0.25), (32, 0.15)])
def test_many_streams_get_several_tokens_in_a_response(num_streams: int, most: float) -> None:
    bench = SendingBench(budget_cores=0.1, cost_s=1e-4)
    assert responses_per_token(run_streams(bench, num_streams, 100)) < most


def test_the_dearer_sending_is_the_fewer_responses_there_are() -> None:
    shares = [
        responses_per_token(run_streams(SendingBench(budget_cores=0.1, cost_s=cost_s), 8, 100))
        for cost_s in (1e-5, 5e-5, 1e-4, 2e-4)
    ]
    assert shares[0] > 0.9
    assert sorted(shares, reverse=True) == shares
    assert shares[-1] < 0.3


@pytest.mark.parametrize("cost_s", [1e-4, 1e-3])
def test_a_lone_stream_gets_each_token_at_once(cost_s: float) -> None:
    bench = SendingBench(budget_cores=0.02, cost_s=cost_s)
    (sender,) = run_streams(bench, 1, 50)
    assert sender.chunks == [[token] for token in range(50)]


def test_sending_keeps_to_its_share_of_the_cores() -> None:
    bench = SendingBench(budget_cores=0.1, cost_s=1e-4)
    senders = run_streams(bench, 16, 200)
    # Of the whole cost this thread's time is a third; the first of each burst is free, and so are first and last ones.
    busy_s = sum(len(sender.chunks) for sender in senders) * bench.cost_s * 3.3
    assert busy_s / bench.now_s < 0.1 * 1.35


def test_a_stream_is_never_left_waiting_long() -> None:
    bench = SendingBench(budget_cores=0.001, cost_s=1e-2)
    for sender in run_streams(bench, 32, 60):
        gaps = [later - earlier for earlier, later in zip(sender.sent_at_s, sender.sent_at_s[1:], strict=False)]
        assert max(gaps) < 0.25 + 2 * 32 * bench.cost_s + _STEP_S


def test_news_leave_when_the_engine_pauses_too() -> None:
    bench = SendingBench(budget_cores=0.1, cost_s=1e-3)
    streams = [bench.open(f"r{index}") for index in range(4)]
    for token in range(2):
        for index, (live, _) in enumerate(streams):
            live.push(token_update(f"r{index}", [token]))
        bench.run_sender()
    assert any(len(sender.chunks) == 1 for _, sender in streams)
    bench.wait(bench.now_s + 1.0)
    assert all(sum(map(len, sender.chunks)) == 2 for _, sender in streams)
