# SPDX-License-Identifier: Apache-2.0
"""Admission by key: who is let in, what is counted, and that what is refused has counted nothing."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from wavetrain_gateway.admission import Caller, Demand, OpenAdmission, Ticket
from wavetrain_gateway.errors import Forbidden, InvalidRequest, RateLimited, Unauthenticated, Unavailable
from wavetrain_gateway.key_entry import KeyTable
from wavetrain_gateway.keys import KeyRing, hash_key
from wavetrain_gateway.limits.assembly import KeySettings, make_admission
from wavetrain_gateway.limits.keyed_admission import KeyedAdmission
from wavetrain_gateway.limits.monotonic_storage import MonotonicStorage
from wavetrain_gateway.limits.shared_windows import GuardedStore, SharedWindows, WhenDown
from wavetrain_gateway.limits.store_guard import StoreGuard
from wavetrain_gateway.limits.windows import Windows
from wavetrain_gateway.limits.wrong_keys import WrongKeys

KEY = "wt-key"
BEARER = {"authorization": f"Bearer {KEY}"}
DEMAND = Demand(model="m", num_prompt_tokens=10, max_output_tokens=90)


class Clock:
    def __init__(self) -> None:
        self.now_s = 500.0

    def __call__(self) -> float:
        return self.now_s


def ring(**entry: object) -> KeyRing:
    return KeyRing(KeyTable.model_validate({"key": [{"name": "k", "sha256": hash_key(KEY), **entry}]}))


def admission(clock: Clock | None = None, **entry: object) -> KeyedAdmission:
    clock = clock or Clock()
    return KeyedAdmission(ring(**entry), SharedWindows(Windows(MonotonicStorage(clock), clock=clock)))


async def let_in(admission: KeyedAdmission, demand: Demand = DEMAND) -> Ticket:
    return await admission.admit(admission.authenticate(BEARER, "10.0.0.1"), demand)


def test_who_has_no_known_key_is_told_what_to_do() -> None:
    door = admission()
    with pytest.raises(Unauthenticated, match="an API key is needed") as caught:
        door.authenticate({}, "10.0.0.1")
    assert caught.value.code == "missing_api_key"
    with pytest.raises(Unauthenticated, match="is not known"):
        door.authenticate({"authorization": "Bearer wt-other"}, "10.0.0.1")
    assert door.authenticate(BEARER, "10.0.0.1").name == hash_key(KEY)[:12]


def test_an_address_with_many_wrong_keys_waits_and_right_keys_never_do() -> None:
    clock = Clock()
    door = KeyedAdmission(
        ring(), SharedWindows(Windows(MonotonicStorage())), wrong_keys=WrongKeys(per_minute=3, clock=clock)
    )
    for _ in range(3):
        with pytest.raises(Unauthenticated):
            door.authenticate({"x-api-key": "wrong"}, "2001:db8::1")
    clock.now_s += 20
    with pytest.raises(RateLimited) as caught:
        door.authenticate({"x-api-key": "wrong"}, "2001:db8::ffff")  # of the same customer
    assert caught.value.headers["retry-after"] == "40"
    door.authenticate(BEARER, "2001:db8::1")
    with pytest.raises(Unauthenticated):
        door.authenticate({}, "10.0.0.1")
    clock.now_s += 40
    with pytest.raises(Unauthenticated):
        door.authenticate({"x-api-key": "wrong"}, "2001:db8::1")


def test_addresses_of_strangers_do_not_fill_the_memory() -> None:
    wrong = WrongKeys()
    for number in range(20_000):
        wrong.wait_s(f"host-{number}")
    assert len(wrong._by_address) == 10_000  # pyright: ignore[reportPrivateUsage]


async def test_models_that_a_key_does_not_have_are_forbidden() -> None:
    door = admission(models=["other"])
    with pytest.raises(Forbidden):
        await let_in(door)


async def test_200_requests_at_once_are_let_in_to_the_request() -> None:
    door = admission(requests_per_minute=37)
    answers = await asyncio.gather(*(let_in(door) for _ in range(200)), return_exceptions=True)
    refused = [answer for answer in answers if isinstance(answer, RateLimited)]
    assert len(refused) == 163
    assert refused[0].headers["x-ratelimit-limit-requests"] == "37"
    assert refused[0].headers["x-ratelimit-remaining-requests"] == "0"
    assert refused[0].headers["retry-after"] == "60"
    assert door.num_refused[hash_key(KEY)[:12], "requests"] == 163


async def test_headers_tell_what_is_left() -> None:
    door = admission(requests_per_minute=10, tokens_per_minute=1_000)
    await let_in(door)
    headers = (await let_in(door)).headers
    assert headers == {
        "x-ratelimit-limit-requests": "10",
        "x-ratelimit-remaining-requests": "8",
        "x-ratelimit-reset-requests": "1m0s",
        "x-ratelimit-limit-tokens": "1000",
        "x-ratelimit-remaining-tokens": "800",
        "x-ratelimit-reset-tokens": headers["x-ratelimit-reset-tokens"],
    }
    assert (await let_in(admission())).headers == {}


async def test_unused_tokens_come_back_and_used_ones_do_not() -> None:
    clock = Clock()
    door = admission(clock, tokens_per_minute=250)
    first, second = await let_in(door), await let_in(door)
    with pytest.raises(RateLimited, match="250 tokens a minute are used up") as caught:
        await let_in(door)
    assert int(caught.value.headers["retry-after"]) > 60
    await first.settle(20)
    await first.settle(20)  # once more does no harm
    third = await let_in(door)
    await second.settle(100)
    await third.settle(100)
    with pytest.raises(RateLimited):
        await let_in(door)
    clock.now_s += 121
    await let_in(door)


async def test_a_request_larger_than_the_minute_is_told_to_ask_for_less() -> None:
    with pytest.raises(InvalidRequest, match="may use 100 tokens, and the API key has 99 a minute") as caught:
        await let_in(admission(tokens_per_minute=99))
    assert caught.value.param == "max_tokens"


async def test_streams_are_counted_while_they_run() -> None:
    door = admission(max_streams=3)
    two = Demand(model="m", num_prompt_tokens=1, max_output_tokens=1, num_streams=2)
    first = await let_in(door, two)
    with pytest.raises(RateLimited, match="3 sequences at once, and 2 are running"):
        await let_in(door, two)
    second = await let_in(door)
    await first.settle(2)
    third = await let_in(door, two)
    for ticket in (second, third):
        await ticket.settle(2)
    await let_in(door, Demand(model="m", num_prompt_tokens=1, max_output_tokens=1, num_streams=3))


async def test_what_is_refused_has_counted_nothing() -> None:
    door = admission(requests_per_minute=2, tokens_per_minute=1_000, max_streams=2)
    (await let_in(door)).headers  # noqa: B018 - it stays open
    ticket = await let_in(door)
    for _ in range(5):
        with pytest.raises(RateLimited):  # streams
            await let_in(door)
    await ticket.settle(100)
    for _ in range(5):
        with pytest.raises(RateLimited) as caught:  # requests, after tokens were reserved
            await let_in(door)
        assert caught.value.headers["x-ratelimit-remaining-tokens"] == "700"
    last = admission(requests_per_minute=1, tokens_per_minute=1_000)
    await let_in(last)
    for _ in range(20):
        with pytest.raises(RateLimited, match="1 requests a minute"):
            await let_in(last)


async def test_a_request_cancelled_while_it_is_let_in_holds_nothing() -> None:
    clock = Clock()
    storage = MonotonicStorage(clock)
    reached = asyncio.Event()

    class Slow(MonotonicStorage):
        STORAGE_SCHEME = None

        async def acquire_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
            reached.set()
            await asyncio.Event().wait()
            return True

    slow = Slow(clock)
    door = KeyedAdmission(
        ring(requests_per_minute=5, tokens_per_minute=100, max_streams=1), SharedWindows(Windows(slow, clock=clock))
    )
    task = asyncio.create_task(let_in(door))
    await reached.wait()
    assert (await Windows(slow, clock=clock).tokens(hash_key(KEY)[:12], 100)).remaining == 0
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await door.close()
    assert (await Windows(slow, clock=clock).tokens(hash_key(KEY)[:12], 100)).remaining == 100
    assert len(storage) == 0
    reached.clear()
    again = asyncio.create_task(let_in(door))  # the only stream is free again
    await reached.wait()
    again.cancel()
    await asyncio.gather(again, return_exceptions=True)


async def test_a_key_that_is_taken_away_between_two_steps_is_refused(tmp_path: Path) -> None:
    door = admission()
    with pytest.raises(Unauthenticated, match="not known any more"):
        await door.admit(Caller(name="gone"), DEMAND)


class Gone(MonotonicStorage):
    """A store that can go away."""

    STORAGE_SCHEME = None
    is_there = True

    async def acquire_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        await self.ping()
        return await super().acquire_entry(key, limit, expiry, amount)

    async def get_sliding_window(self, key: str, expiry: int) -> tuple[int, float, int, float]:
        await self.ping()
        return await super().get_sliding_window(key, expiry)

    async def refund_sliding_window_entry(self, key: str, expiry: int, amount: int, *, is_shifted: bool) -> None:
        await self.ping()
        await super().refund_sliding_window_entry(key, expiry, amount, is_shifted=is_shifted)

    async def ping(self) -> None:
        if not self.is_there:
            raise ConnectionError("gone")

    async def close(self) -> None:
        pass


@pytest.mark.parametrize("when_down", ["open", "closed"])
async def test_a_store_that_goes_away_is_open_or_closed_as_configured(when_down: WhenDown) -> None:
    clock = Clock()
    store = Gone(clock)
    guard = StoreGuard(store.ping, (), store.close, probe_period_s=0.001, timeout_s=5)
    on_store = GuardedStore(Windows(store, clock=clock), guard)
    local = Windows(MonotonicStorage(clock), clock=clock)
    windows = SharedWindows(local, on_store, when_down=when_down)
    door = KeyedAdmission(ring(requests_per_minute=3, tokens_per_minute=1_000), windows, guard=guard)
    await door.start()
    ticket = await let_in(door)
    await let_in(door)
    store.is_there = False
    await ticket.settle(10)  # never raises
    if when_down == "closed":
        with pytest.raises(Unavailable, match="store of the rate limits does not answer"):
            await let_in(door)
    else:
        await let_in(door)
        with pytest.raises(RateLimited):  # two of its three were counted on the store, and here too
            await let_in(door)
    assert door.num_store_failures == 1
    store.is_there = True
    while guard.is_down:
        await asyncio.sleep(0.001)
    await let_in(door)
    with pytest.raises(RateLimited):
        await let_in(door)
    await door.close()


async def test_what_is_configured_is_built(tmp_path: Path) -> None:
    assert isinstance(make_admission(KeySettings()), OpenAdmission)
    assert isinstance(make_admission(KeySettings(redis_url="redis://127.0.0.1:1")), OpenAdmission)
    from_text = make_admission(KeySettings(), f"a={KEY}")
    assert from_text.authenticate(BEARER, "").name == hash_key(KEY)[:12]
    path = tmp_path / "keys.toml"
    path.write_text(f'[[key]]\nname="k"\nsha256="{hash_key(KEY)}"\nrequests_per_minute=1\n', encoding="utf-8")
    door = make_admission(KeySettings(file=path, redis_url="redis://127.0.0.1:1"))
    assert isinstance(door, KeyedAdmission)
    await door.start()  # nobody listens there: counted here, as `open` says
    await let_in(door)
    with pytest.raises(RateLimited):
        await let_in(door)
    assert (door.num_store_failures, door.num_key_file_errors) == (1, 0)
    await door.close()
    with pytest.raises(ValueError, match="put all keys into the file"):
        make_admission(KeySettings(file=path), "x")
    with pytest.raises(ValueError, match="Redis URL"):
        make_admission(KeySettings(file=path, redis_url="127.0.0.1"))
