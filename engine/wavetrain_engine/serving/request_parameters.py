# SPDX-License-Identifier: Apache-2.0
"""Priority, deadline, cache salt and trace: parameters of the Triton request, which reach an ensemble's steps too.

Triton's gRPC endpoint keeps the names `priority` and `timeout` to itself: it never hands `priority` on, and gives
`timeout` as the request's own. So the priority is also known as `request_priority`, the name that works everywhere.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field
from typing import Any

from wavetrain_engine.errors import RequestError

MAX_CACHE_SALT_CHARS = 256
# One has 55 characters; later versions of the format may have more.
_MAX_TRACEPARENT_CHARS = 256
_MAX_PRIORITY = 2**31 - 1
_MAX_TIMEOUT_MS = 1e9
# Put there by Triton's own endpoints and clients; none says anything about the generation.
_TRITONS_OWN = {"id", "sequence_id", "sequence_start", "sequence_end", "binary_data_output", "binary_data_size"}


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestParameters:
    """What the request's parameters ask for.

    Attributes:
        deadline_s: `time.monotonic()` moment, as EngineRequest has it.
        traceparent: W3C's header as the caller sent it. Whether it is one is looked at by whoever traces: an ill-formed
            one begins a new trace, as W3C has it, and never fails a request.
        others: parameters that are none of ours, for whoever knows them.
    """

    priority: int = 0
    deadline_s: float | None = None
    cache_salt: str = ""
    traceparent: str = ""
    others: dict[str, Any] = field(default_factory=dict[str, Any])

    @classmethod
    def read(cls, request: Any) -> RequestParameters:
        """Reads the parameters of a Triton request.

        Raises:
            RequestError: one has a wrong type or value, or two give the same thing.
        """
        text = request.parameters()
        if text in {"", "{}"} and not request.timeout():  # nearly all requests
            return cls()
        values: dict[str, Any] = json.loads(text) if text else {}
        priority = _read_priority(values)
        timeout_ms = _read_timeout_ms(values, request.timeout())
        salt = values.pop("cache_salt", "")
        if not isinstance(salt, str) or len(salt) > MAX_CACHE_SALT_CHARS:
            raise RequestError(f"cache_salt must be a string of at most {MAX_CACHE_SALT_CHARS} characters")
        traceparent = values.pop("traceparent", "")
        if not isinstance(traceparent, str):
            raise RequestError("traceparent must be a string, as W3C's header has it")
        others = {
            name: value for name, value in values.items() if name not in _TRITONS_OWN and not name.startswith("triton_")
        }
        return cls(
            priority=priority,
            deadline_s=None if timeout_ms is None else time.monotonic() + timeout_ms / 1000,
            cache_salt=salt,
            traceparent=traceparent if len(traceparent) <= _MAX_TRACEPARENT_CHARS else "",
            others=others,
        )

    def refuse_others(self) -> None:
        """Raises RequestError where a parameter was given that nothing here knows."""
        if self.others:
            name = next(iter(self.others))[:64]
            raise RequestError(
                f"unknown request parameter {name!r}; known are request_priority, priority, timeout_ms, "
                "cache_salt and traceparent"
            )


def _read_priority(values: dict[str, Any]) -> int:
    given = [(name, values.pop(name)) for name in ("request_priority", "priority") if name in values]
    if len(given) > 1:
        raise RequestError("request_priority and priority are the same parameter; send one of them")
    if not given:
        return 0
    name, value = given[0]
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) > _MAX_PRIORITY:
        raise RequestError(f"{name} must be an integer between {-_MAX_PRIORITY} and {_MAX_PRIORITY}")
    return value


def _read_timeout_ms(values: dict[str, Any], own_timeout_us: int) -> float | None:
    """The time limit in milliseconds. Triton's own `timeout` is in microseconds; its 0 means none."""
    own_us = values.pop("timeout", 0) or own_timeout_us
    if "timeout_ms" not in values:
        return _check_timeout("timeout", own_us, 1000.0) if own_us else None
    if own_us:
        raise RequestError("timeout_ms and timeout (in microseconds) both limit the time; send one of them")
    return _check_timeout("timeout_ms", values.pop("timeout_ms"), 1.0)


def _check_timeout(name: str, value: Any, units_per_ms: float) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not 0 < value / units_per_ms <= _MAX_TIMEOUT_MS:
        raise RequestError(f"{name} must be a number, more than 0 and at most {_MAX_TIMEOUT_MS * units_per_ms:g}")
    return value / units_per_ms
