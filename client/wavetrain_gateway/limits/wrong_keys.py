# SPDX-License-Identifier: Apache-2.0
"""How many wrong keys an address may try."""

from __future__ import annotations

import ipaddress
import time
from collections import OrderedDict, deque
from collections.abc import Callable

DEFAULT_PER_MINUTE = 60
_WINDOW_S = 60.0
_MAX_ADDRESSES = 10_000


class WrongKeys:
    """Counts wrong keys by address, the newest 10,000 addresses at most.

    A right key is never refused for what others behind its address did. So this protects no key, which has nothing to
    guess, but what a flood of wrong ones costs: logs, and whoever watches them.

    Args:
        per_minute: wrong keys an address may send before it is told to wait.
        clock: monotonic seconds.
    """

    def __init__(self, per_minute: int = DEFAULT_PER_MINUTE, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute = per_minute
        self._clock = clock
        self._by_address: OrderedDict[str, deque[float]] = OrderedDict()

    def wait_s(self, host: str) -> float:
        """Counts one more wrong key; returns how long its address has to wait, 0 where it need not."""
        now_s = self._clock()
        address = _network(host)
        moments = self._by_address.setdefault(address, deque(maxlen=self._per_minute))
        self._by_address.move_to_end(address)
        if len(self._by_address) > _MAX_ADDRESSES:
            self._by_address.popitem(last=False)
        if len(moments) == self._per_minute and now_s - moments[0] < _WINDOW_S:
            return _WINDOW_S - (now_s - moments[0])
        moments.append(now_s)
        return 0.0


def _network(host: str) -> str:
    """The address, or of IPv6 the /64 that one customer has to choose from."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv6Address):
        return str(address.ipv4_mapped or ipaddress.ip_network((address, 64), strict=False))
    return str(address)
