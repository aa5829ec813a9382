# SPDX-License-Identifier: Apache-2.0
"""What the engines are busy with, from the metrics pages of their Triton servers.

Asked for when somebody wants to know, and for all who do at most once a second.
"""

from __future__ import annotations

import asyncio
import time
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from http.client import HTTPException
from urllib.parse import urlsplit

from prometheus_client.parser import text_string_to_metric_families

_FRESH_S = 0.9
_TIMEOUT_S = 2.0
_MAX_PAGE_BYTES = 4 << 20
# Name on the page → ours.
_NUMBERS = {
    "wavetrain_num_requests_running": "num_running",
    "wavetrain_num_requests_waiting": "num_waiting",
    "wavetrain_kv_cache_usage_perc": "kv_cache_usage",
    "wavetrain_prompt_tokens_total": "num_prompt_tokens",
    "wavetrain_generation_tokens_total": "num_output_tokens",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLoad:
    """One engine.

    Attributes:
        engine: host and port of its metrics page.
        kv_cache_usage: share of the KV cache's blocks that requests hold, 0 to 1.
        num_prompt_tokens, num_output_tokens: since its server was started.
    """

    engine: str
    num_running: int
    num_waiting: int
    kv_cache_usage: float
    num_prompt_tokens: int
    num_output_tokens: int


class EngineLoads:
    """The engines behind a gateway.

    Args:
        pages: addresses of metrics pages, `http://host:8002/metrics`.
        read_page: returns the text of one; OSError where it cannot be had.
    """

    def __init__(self, pages: Sequence[str], read_page: Callable[[str], str] | None = None) -> None:
        self._pages = pages
        self._read_page = read_page or _read_page
        self._loads: list[EngineLoad] = []
        self._read_at_s = float("-inf")
        self._lock = asyncio.Lock()

    async def read(self) -> list[EngineLoad]:
        """Returns the engines that answer, in the order of their addresses."""
        async with self._lock:
            if time.monotonic() - self._read_at_s >= _FRESH_S:
                found = await asyncio.gather(*(asyncio.to_thread(self._load, page) for page in self._pages))
                self._loads = [load for load in found if load is not None]
                self._read_at_s = time.monotonic()
            return self._loads

    def _load(self, page: str) -> EngineLoad | None:
        try:
            return parse_load(urlsplit(page).netloc, self._read_page(page))
        except (OSError, HTTPException, ValueError):  # it starts, or it has gone: /readyz and the replicas' health tell
            return None


def parse_load(engine: str, text: str) -> EngineLoad | None:
    """Reads a metrics page; None where there is no engine of ours on it.

    Raises:
        ValueError: it is no metrics page.
    """
    numbers = dict.fromkeys(_NUMBERS.values(), 0.0)
    is_ours = False
    for name, value in _samples(text):
        if name in _NUMBERS:
            numbers[_NUMBERS[name]] += value
            is_ours = True
    if not is_ours:
        return None
    usage = numbers.pop("kv_cache_usage")
    return EngineLoad(engine=engine, kv_cache_usage=usage, **{name: int(value) for name, value in numbers.items()})


def as_json(loads: Iterable[EngineLoad]) -> dict[str, object]:
    """The answer of GET /load."""
    return {"object": "load", "engines": [asdict(load) for load in loads]}


def _samples(text: str) -> Iterable[tuple[str, float]]:
    ours = "".join(line + "\n" for line in text.splitlines() if line.startswith("wavetrain_"))
    for family in text_string_to_metric_families(ours):
        for sample in family.samples:
            yield sample.name, sample.value


def _read_page(page: str) -> str:
    with urllib.request.urlopen(page, timeout=_TIMEOUT_S) as response:
        return response.read(_MAX_PAGE_BYTES).decode("utf-8", "replace")
