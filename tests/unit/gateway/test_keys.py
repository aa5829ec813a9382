# SPDX-License-Identifier: Apache-2.0
"""API keys: made, hashed, found, and what a key file may say of them."""

from __future__ import annotations

import hmac
import json
from datetime import datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wavetrain_gateway import keys
from wavetrain_gateway.key_entry import KeyTable
from wavetrain_gateway.keys import KeyRing, hash_key, key_in, keys_from_text, new_key, parse_keys
from wavetrain_gateway.toml_file import FileError

ALPHA, BETA = "wt-alpha", "wt-beta"


def table(**alpha: object) -> KeyTable:
    return KeyTable.model_validate(
        {"key": [{"name": "alpha", "sha256": hash_key(ALPHA), **alpha}, {"name": "beta", "sha256": hash_key(BETA)}]}
    )


def test_new_keys_are_random_and_hash_to_what_a_file_has() -> None:
    made = {new_key() for _ in range(100)}
    assert len(made) == 100
    assert all(key.startswith("wt-") and len(key) >= 46 for key in made)
    assert hash_key("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_key_is_found_and_others_are_not() -> None:
    ring = KeyRing(table())
    alpha, beta = ring.find(ALPHA), ring.find(BETA)
    assert alpha is not None
    assert beta is not None
    assert alpha.name == hash_key(ALPHA)[:12]
    assert ring.name_of(alpha) == "alpha"
    assert alpha.name != beta.name
    for wrong in ("", "wt-", "wt-alph", "wt-alphaa", "WT-ALPHA", "x" * 10_000, "wt-\udc80"):
        assert ring.find(wrong) is None


def test_every_entry_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []
    real = hmac.compare_digest

    def compare(known: bytes, given: bytes) -> bool:
        compared.append(known)
        return real(known, given)

    ring = KeyRing(table())
    monkeypatch.setattr(keys.hmac, "compare_digest", compare)
    for key in (ALPHA, BETA, "wt-wrong"):
        compared.clear()
        ring.find(key)
        assert compared == [bytes.fromhex(hash_key(ALPHA)), bytes.fromhex(hash_key(BETA))]


def test_tiers_give_priorities_and_limits_and_a_key_overrides_them() -> None:
    data = b"""
    [tier.gold]
    priority = -3
    requests_per_minute = 100
    max_streams = 8
    [[key]]
    name = "a"
    sha256 = "%s"
    tier = "gold"
    requests_per_minute = 7
    models = ["small", "large"]
    """ % (b"1" * 64)
    parsed = parse_keys(data, "keys.toml")
    ring = KeyRing(parsed)
    caller = parsed.keys[0].caller(parsed.tier("gold"))
    assert (caller.priority, caller.best_priority, caller.tier) == (-3, -3, "gold")
    assert caller.may_use("small")
    assert not caller.may_use("other")
    limits = ring.limits_of(caller)
    assert limits is not None
    assert (limits.requests_per_minute, limits.tokens_per_minute, limits.max_streams) == (7, None, 8)


def test_expired_and_disabled_keys_are_unknown() -> None:
    now = datetime(2026, 1, 1, 12, tzinfo=timezone.utc)
    at = [now]
    ring = KeyRing(table(expires=now + timedelta(seconds=1)), now=lambda: at[0])
    assert ring.find(ALPHA) is not None
    at[0] += timedelta(seconds=1)
    assert ring.find(ALPHA) is None
    assert ring.find(BETA) is not None
    assert KeyRing(table(is_enabled=False)).find(ALPHA) is None


def test_a_date_in_a_file_is_utc() -> None:
    data = f'[[key]]\nname = "a"\nsha256 = "{hash_key(ALPHA)}"\nexpires = 2026-01-01\n'.encode()
    assert parse_keys(data, "keys.toml").keys[0].expires == datetime(2026, 1, 1, tzinfo=timezone.utc)


def test_salts_differ_by_key_and_are_shared_only_where_the_file_says_so() -> None:
    def salt(**alpha: object) -> tuple[str, str]:
        ring = KeyRing(table(**alpha))
        alpha_caller, beta_caller = ring.find(ALPHA), ring.find(BETA)
        assert alpha_caller is not None
        assert beta_caller is not None
        return alpha_caller.cache_salt, beta_caller.cache_salt

    own_alpha, own_beta = salt()
    assert own_alpha != own_beta
    assert own_alpha
    assert (own_alpha, own_beta) == salt()
    assert hash_key(ALPHA) not in own_alpha
    # Nobody comes by another key's salt by writing it, or its hash, down as a shared one.
    assert salt(cache_salt=hash_key(BETA))[0] != own_beta
    assert salt(cache_salt=own_beta)[0] != own_beta
    assert salt(cache_salt="team")[0] not in (own_alpha, own_beta)


def test_a_replaced_table_is_all_that_is_known() -> None:
    ring = KeyRing(table())
    caller = ring.find(ALPHA)
    assert caller is not None
    ring.replace(KeyTable.model_validate({"key": [{"name": "beta", "sha256": hash_key(BETA)}]}))
    assert ring.find(ALPHA) is None
    assert ring.limits_of(caller) is None
    assert ring.name_of(caller) == caller.name
    assert len(ring) == 1


def test_json_says_the_same_as_toml() -> None:
    entry = {"name": "a", "sha256": hash_key(ALPHA), "models": ["m"], "expires": "2027-01-01T00:00:00Z"}
    as_json = parse_keys(json.dumps({"key": [entry]}).encode(), "keys.json")
    as_toml = parse_keys(
        f'[[key]]\nname="a"\nsha256="{hash_key(ALPHA)}"\nmodels=["m"]\nexpires=2027-01-01T00:00:00Z\n'.encode(),
        "keys.toml",
    )
    assert as_json == as_toml


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "keys.toml: key: Field required"),
        ("key = []", "keys.toml: key: List should have at least 1 item"),
        ("= 3", "keys.toml: is not TOML"),
        ("[[key]]\nname='a'\nsha256='12'", "key[0].sha256: String should match pattern"),
        (f"[[key]]\nname='a b'\nsha256='{'1' * 64}'", "key[0].name: String should match pattern"),
        (
            f"[[key]]\nname='a'\nsha256='{'1' * 64}'\ntokens_per_minut=3",
            "key[0].tokens_per_minut: there is no such setting; did you mean 'tokens_per_minute'?",
        ),
        (f"[tier.x]\nprio=3\n[[key]]\nname='a'\nsha256='{'1' * 64}'", "tier.x.prio: there is no such setting; did you"),
        (f"keys=1\n[[key]]\nname='a'\nsha256='{'1' * 64}'", "keys: there is no such setting; did you mean 'key'?"),
        (f"[[key]]\nname='a'\nsha256='{'1' * 64}'\nmax_streams=0", "key[0].max_streams: Input should be greater than"),
        (f"[[key]]\nname='a'\nsha256='{'1' * 64}'\nmax_streams='many'", "max_streams: Input should be a valid integer"),
        (
            f"[[key]]\nname='a'\nsha256='{'1' * 64}'\ntier='x'",
            "key 'a': there is no tier 'x'; known are batch, default",
        ),
        (
            f"[[key]]\nname='a'\nsha256='{'1' * 64}'\n[[key]]\nname='a'\nsha256='{'2' * 64}'",
            "two keys have the name 'a'; each key needs its own",
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_its_place(text: str, message: str) -> None:
    with pytest.raises(FileError) as caught:
        parse_keys(text.encode(), "keys.toml")
    assert message in str(caught.value)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_table_or_a_file_error(data: bytes) -> None:
    for name in ("keys.toml", "keys.json"):
        with pytest.raises(FileError):
            parse_keys(data, name)


def test_deep_json_is_an_error_of_the_file() -> None:
    with pytest.raises(FileError, match="is not JSON"):
        parse_keys(b"[" * 100_000, "keys.json")


def test_keys_from_the_environment() -> None:
    ring = KeyRing(keys_from_text(" team=wt-alpha,\n wt-beta abc=="))
    for key, name in ((ALPHA, "team"), (BETA, "key-2"), ("abc==", "key-3")):
        caller = ring.find(key)
        assert caller is not None
        assert ring.name_of(caller) == name
    assert ring.find("team=wt-alpha") is None
    with pytest.raises(ValueError, match="no API key is given"):
        keys_from_text(" , ")
    with pytest.raises(ValueError, match="the API keys given: two keys have the sha256"):
        keys_from_text("wt-alpha wt-alpha")


@pytest.mark.parametrize(
    ("headers", "key"),
    [
        ({"authorization": "Bearer k"}, "k"),
        ({"authorization": "bearer  k "}, "k"),
        ({"x-api-key": " k"}, "k"),
        ({"authorization": "Basic eDp5", "x-api-key": "k"}, "k"),
        ({"authorization": "Basic eDp5"}, None),
        ({"authorization": "Bearer "}, None),
        ({"authorization": "k"}, None),
        ({}, None),
    ],
)
def test_where_a_request_has_its_key(headers: dict[str, str], key: str | None) -> None:
    assert key_in(headers) == key
