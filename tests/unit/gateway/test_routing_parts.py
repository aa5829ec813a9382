# SPDX-License-Identifier: Apache-2.0
"""The pure parts of routing: breaker, budget, outliers, prefixes, choice; by a clock of the test's."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wavetrain_gateway.routing.balancer import Balancer, warm_up
from wavetrain_gateway.routing.circuit_breaker import CircuitBreaker
from wavetrain_gateway.routing.outlier_detector import OutlierDetector
from wavetrain_gateway.routing.prefix_index import CHUNK_CHARS, MAX_CHUNKS, PrefixIndex, hash_prefix
from wavetrain_gateway.routing.retry_budget import RetryBudget


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


# Circuit breaker


def breaker(clock: Clock) -> CircuitBreaker:
    return CircuitBreaker(num_failures=3, first_open_s=1.0, max_open_s=4.0, clock=clock, jitter=lambda: 0.5)


def test_a_breaker_opens_after_failures_in_a_row_and_only_then() -> None:
    circuit = breaker(Clock())
    for _ in range(5):
        circuit.fail()
        circuit.fail()
        circuit.succeed()
    assert circuit.state == "closed"
    for _ in range(3):
        assert circuit.acquire()
        circuit.fail()
    assert circuit.state == "open"
    assert not circuit.acquire()


def test_an_open_breaker_lets_one_trial_through_and_waits_longer_each_time() -> None:
    clock = Clock()
    circuit = breaker(clock)
    for _ in range(3):
        circuit.fail()
    for open_s in (1.0, 2.0, 4.0, 4.0):
        clock.now_s += open_s - 0.01
        assert not circuit.allows()
        clock.now_s += 0.01
        assert circuit.state == "half_open"
        assert circuit.acquire()
        assert not circuit.acquire()
        circuit.fail()
    clock.now_s += 4
    assert circuit.acquire()
    circuit.abandon()  # the trial's caller went away
    assert circuit.acquire()
    circuit.succeed()
    assert circuit.state == "closed"
    for _ in range(3):
        circuit.fail()
    clock.now_s += 1.0
    assert circuit.allows()  # it begins with the short wait again


def test_what_was_sent_before_it_opened_does_not_keep_it_open() -> None:
    clock = Clock()
    circuit = breaker(clock)
    for _ in range(3):
        circuit.fail()
    clock.now_s += 0.9
    circuit.fail()
    clock.now_s += 0.1
    assert circuit.allows()


# Retry budget


def test_retries_are_a_share_of_requests() -> None:
    clock = Clock()
    budget = RetryBudget(ratio=0.1, free_per_s=0.5, window_s=10.0, clock=clock)
    assert [budget.withdraw() for _ in range(6)] == [True] * 5 + [False]
    for _ in range(100):
        budget.deposit()
    assert [budget.withdraw() for _ in range(11)] == [True] * 10 + [False]
    clock.now_s += 11
    assert [budget.withdraw() for _ in range(6)] == [True] * 5 + [False]


@given(st.lists(st.tuples(st.floats(0, 3), st.booleans()), max_size=200))
def test_a_budget_never_gives_more_than_its_share(steps: list[tuple[float, bool]]) -> None:
    clock = Clock()
    budget = RetryBudget(ratio=0.2, free_per_s=0.3, window_s=10.0, clock=clock)
    requests: list[float] = []
    retries: list[float] = []
    for wait_s, is_request in steps:
        clock.now_s += wait_s
        if is_request:
            budget.deposit()
            requests.append(clock.now_s)
        elif budget.withdraw():
            retries.append(clock.now_s)
            # Slots of a second: requests count for up to ten seconds, retries for nine at least.
            num_requests = sum(moment > clock.now_s - 10 for moment in requests)
            assert sum(moment > clock.now_s - 9 for moment in retries) <= 3 + 0.2 * num_requests


# Outliers


def test_a_replica_that_fails_more_than_half_of_its_requests_is_taken_out_for_longer_each_time() -> None:
    clock = Clock()
    detector = OutlierDetector(min_requests=4, first_ejection_s=10, max_ejection_s=15, clock=clock)
    for out_s in (10, 15, 15):
        for _ in range(2):
            assert not detector.record("a", has_failed=False, peers="ab")
        for _ in range(2):
            assert not detector.record("a", has_failed=True, peers="ab")
        assert detector.record("a", has_failed=True, peers="ab")
        assert detector.is_ejected("a")
        clock.now_s += out_s - 0.1
        assert detector.is_ejected("a")
        clock.now_s += 0.1
        assert not detector.is_ejected("a")
    assert detector.num_ejections("a") == 3
    detector.forget("a")
    assert detector.num_ejections("a") == 0


@given(
    st.integers(1, 9),
    st.lists(st.tuples(st.integers(0, 8), st.booleans(), st.floats(0, 5)), max_size=300),
)
def test_never_all_and_never_too_many_are_out(num_replicas: int, steps: list[tuple[int, bool, float]]) -> None:
    clock = Clock()
    detector = OutlierDetector(min_requests=2, clock=clock)
    names = [f"r{number}" for number in range(num_replicas)]
    for number, has_failed, wait_s in steps:
        detector.record(names[number % num_replicas], has_failed=has_failed, peers=names)
        num_out = sum(detector.is_ejected(name) for name in names)
        assert num_out <= max(1, num_replicas // 2)
        assert num_out < num_replicas
        clock.now_s += wait_s


def test_old_failures_and_few_requests_say_nothing() -> None:
    clock = Clock()
    detector = OutlierDetector(min_requests=5, window_s=30, clock=clock)
    for _ in range(4):
        assert not detector.record("a", has_failed=True, peers="ab")
    clock.now_s += 31
    for _ in range(4):
        assert not detector.record("a", has_failed=True, peers="ab")
    assert detector.record("a", has_failed=True, peers="ab")


# Prefixes


@given(st.text(max_size=400), st.text(max_size=400), st.text(max_size=400))
def test_beginnings_are_equal_as_far_as_their_hashes_are(common: str, one: str, other: str) -> None:
    first, second = hash_prefix(common + one), hash_prefix(common + other)
    equal = sum(a == b for a, b in zip(first, second, strict=False))
    assert first[:equal] == second[:equal]
    assert equal >= len(common) // CHUNK_CHARS
    assert (common + one)[: equal * CHUNK_CHARS] == (common + other)[: equal * CHUNK_CHARS]


def test_hashes_are_bounded_salted_and_of_full_chunks() -> None:
    assert len(hash_prefix("x" * 10**6)) == MAX_CHUNKS
    assert hash_prefix("x" * (CHUNK_CHARS - 1)) == []
    assert len(hash_prefix("x" * CHUNK_CHARS)) == 1
    assert hash_prefix("x" * 200, "one") != hash_prefix("x" * 200, "other")
    assert hash_prefix("\ud800" * 64) != []


def test_an_index_forgets_what_was_used_longest_ago() -> None:
    index = PrefixIndex(max_chunks=6)
    prompts = {name: hash_prefix(name * 3 * CHUNK_CHARS) for name in "abc"}
    index.add(prompts["a"])
    index.add(prompts["b"])
    index.add(prompts["a"])
    index.add(prompts["c"])
    assert [index.match(prompts[name]) for name in "abc"] == [3, 0, 3]
    assert len(index) == 6
    index.add(prompts["b"][:1])
    assert index.match(prompts["a"]) == 2  # the end goes before the beginning
    index.clear()
    assert index.match(prompts["c"]) == 0


# Choice


@dataclass
class Fake:
    outstanding_tokens: int = 0
    capacity: float = 1.0
    seen: list[bytes] = field(default_factory=list)

    def match(self, hashes: list[bytes]) -> int:
        return sum(a == b for a, b in zip(hashes, self.seen, strict=False))


def balancer(seed: int = 0) -> Balancer:
    return Balancer(1.25, 1000, random.Random(seed))


HASHES = hash_prefix("p" * 10 * CHUNK_CHARS)


def test_of_two_the_one_with_less_to_do_is_chosen() -> None:
    busy, idle = Fake(500), Fake(100)
    for seed in range(20):
        assert balancer(seed).choose([busy, idle], 50).replica is idle
    idle.capacity = 0.1  # it warms up
    assert balancer().choose([busy, idle], 50).replica is busy


def test_of_many_the_busiest_is_never_chosen() -> None:
    replicas = [Fake(100 * number) for number in range(8)]
    chosen = [balancer(seed).choose(replicas, 1).replica for seed in range(300)]
    assert replicas[-1] not in chosen
    assert len({id(replica) for replica in chosen}) >= 6


def test_load_goes_by_weight() -> None:
    light, heavy = Fake(capacity=1.0), Fake(capacity=3.0)
    for seed in range(400):
        balancer(seed).choose([light, heavy], 10).replica.outstanding_tokens += 10
    assert heavy.outstanding_tokens == pytest.approx(3 * light.outstanding_tokens, rel=0.02)


def test_who_has_seen_the_beginning_gets_the_prompt_until_it_has_too_much_to_do() -> None:
    seen, partly, other = Fake(seen=HASHES), Fake(seen=HASHES[:4]), Fake()
    choice = balancer().choose([other, partly, seen], 10**6, HASHES)
    assert (choice.replica, choice.num_matched) == (seen, 10)
    seen.outstanding_tokens = 1000
    assert balancer().choose([other, partly, seen], 10, HASHES).replica is seen
    seen.outstanding_tokens = 2000
    for seed in range(20):
        choice = balancer(seed).choose([other, partly, seen], 10, HASHES)
        assert choice.replica is not seen
        assert choice.num_matched == 0


@given(
    st.lists(st.tuples(st.integers(0, 10**6), st.floats(0.05, 10), st.integers(0, 10)), min_size=1, max_size=8),
    st.integers(1, 10**5),
    st.integers(0, 99),
)
def test_affinity_never_overloads(replicas: list[tuple[int, float, int]], cost: int, seed: int) -> None:
    fakes = [Fake(load, capacity, HASHES[:count]) for load, capacity, count in replicas]
    choice = balancer(seed).choose(fakes, cost, HASHES)
    assert any(choice.replica is fake for fake in fakes)
    if choice.num_matched:
        assert choice.num_matched == max(fake.match(HASHES) for fake in fakes)
        share = choice.replica.capacity / sum(fake.capacity for fake in fakes)
        assert choice.replica.outstanding_tokens <= 1.25 * share * sum(f.outstanding_tokens for f in fakes) + 1001
    elif len(fakes) > 1 and len({fake.outstanding_tokens / fake.capacity for fake in fakes}) == len(fakes):
        worst = max(fakes, key=lambda fake: (fake.outstanding_tokens + cost) / fake.capacity)
        assert choice.replica is not worst


def test_warm_up_is_a_ramp() -> None:
    assert [warm_up(age_s, 30, 0.1) for age_s in (0, 1, 3, 15, 30, 99)] == [0.1, 0.1, 0.1, 0.5, 1.0, 1.0]
    assert warm_up(0, 0, 0.1) == 1.0
