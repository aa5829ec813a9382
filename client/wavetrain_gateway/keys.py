# SPDX-License-Identifier: Apache-2.0
"""API keys: made, hashed, and found again.

A key is 256 random bits, so one SHA-256 is enough to store it by: there is nothing to guess from. A given key is
compared with every entry, each in constant time, so that the time an answer takes says nothing of any of them
(CVE-2025-59425 was such a comparison).
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Callable, Mapping
from datetime import datetime, timezone

from pydantic import ValidationError

from wavetrain_gateway.admission import Caller
from wavetrain_gateway.key_entry import KeyEntry, KeyTable, TierEntry
from wavetrain_gateway.toml_file import describe, parse_file

KEY_PREFIX = "wt-"
_NUM_KEY_BYTES = 32
# Longer than any key people make by hand; what is longer is not even hashed.
_MAX_KEY_CHARS = 512


def new_key() -> str:
    """Makes a key: `wt-` and 256 random bits."""
    return KEY_PREFIX + secrets.token_urlsafe(_NUM_KEY_BYTES)


def hash_key(key: str) -> str:
    """The hash that stands for a key in a file, as hexadecimal digits."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def parse_keys(data: bytes, name: str) -> KeyTable:
    """Reads a key file, JSON where its name ends in `.json`, else TOML.

    Raises:
        FileError: it is none.
    """
    return parse_file(data, name, KeyTable)


def keys_from_text(text: str) -> KeyTable:
    """Reads keys as an environment variable has them: separated by commas or white space, each `NAME=KEY` or a key.

    They have no limits of their own. Only their hashes are kept.

    Raises:
        ValueError: no key is there, or two are the same.
    """
    entries: list[dict[str, str]] = []
    for number, item in enumerate(re.split(r"[\s,]+", text.strip()), 1):
        name, separator, key = item.partition("=")
        # "=" may end a key that is base64.
        if not separator or not key.strip("="):
            name, key = f"key-{number}", item
        if key:
            entries.append({"name": name, "sha256": hash_key(key)})
    if not entries:
        raise ValueError("no API key is given; expected keys separated by commas, each KEY or NAME=KEY")
    try:
        return KeyTable.model_validate({"key": entries})
    except ValidationError as error:
        raise ValueError(f"the API keys given: {describe(error, KeyTable)}") from None


def key_in(headers: Mapping[str, str]) -> str | None:
    """The key that a request carries, in `authorization: Bearer KEY` or `x-api-key: KEY`; None where it has none."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    return headers.get("x-api-key", "").strip() or None


class KeyRing:
    """The keys that are known now.

    Args:
        table: what the key file says.
        now: the time of day, for keys that expire.
    """

    def __init__(self, table: KeyTable, *, now: Callable[[], datetime] = lambda: datetime.now(timezone.utc)) -> None:
        self._now = now
        self._table = table
        self._digests: list[bytes] = []
        self._by_id: dict[str, tuple[KeyEntry, Caller, TierEntry]] = {}
        self.replace(table)

    def __len__(self) -> int:
        return len(self._digests)

    def replace(self, table: KeyTable) -> None:
        """Knows these keys from now on, and no other."""
        self._table = table
        self._digests = [bytes.fromhex(entry.sha256) for entry in table.keys]
        self._by_id = {}
        for entry in table.keys:
            tier = table.tier(entry.tier)
            self._by_id[entry.id] = (entry, entry.caller(tier), entry.limits(tier))

    def find(self, key: str) -> Caller | None:
        """Who asks with this key; None where it is unknown, expired or disabled.

        The time it takes depends on the number of keys, not on which of them the given one resembles.
        """
        if len(key) > _MAX_KEY_CHARS:
            return None
        digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
        found = -1
        for index, known in enumerate(self._digests):
            if hmac.compare_digest(known, digest):
                found = index
        if found < 0:
            return None
        entry = self._table.keys[found]
        return self._by_id[entry.id][1] if entry.is_valid_at(self._now()) else None

    def limits_of(self, caller: Caller) -> TierEntry | None:
        """The limits that hold for a caller; None where the key is gone."""
        known = self._by_id.get(caller.name)
        return known[2] if known is not None else None

    def name_of(self, caller: Caller) -> str:
        """What people call the key, for the log; the caller's own name where it is gone."""
        known = self._by_id.get(caller.name)
        return known[0].name if known is not None else caller.name
