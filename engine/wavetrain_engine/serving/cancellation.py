# SPDX-License-Identifier: Apache-2.0
"""Which requests run now, and who of their callers has given up.

Asking whether a call was cancelled is a round trip to the server, about as dear as a response. So one thread asks
for all requests in a sweep, and it sleeps while there is none.
"""

from __future__ import annotations

import logging
import threading
import time

from wavetrain_engine.serving.live_request import LiveRequest

_LOGGER = logging.getLogger(__name__)
_INTERVAL_S = 0.05
# With many requests a sweep is dear: with 32 streams every 50 ms, a third of what the responses cost. So it may ask
# this often, and take this share of the time, up to the longest interval, which leaves an engine's step and a sweep
# some 50 of the 250 ms that a caller who has left may go on costing.
_MAX_QUESTIONS_PER_S = 50
_MAX_SHARE = 0.1
_MAX_INTERVAL_S = 0.2


class LiveRequests:
    """The running requests of one model, with the sweep over them."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._requests: set[LiveRequest] = set()
        self._is_closed = False
        self._thread = threading.Thread(target=self._sweep_forever, name="cancellation", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        return len(self._requests)

    def add(self, live: LiveRequest) -> None:
        """Takes in a request that begins; `watch` follows when it is on its way."""
        with self._condition:
            self._requests.add(live)

    def watch(self) -> None:
        """Has the sweep begin for what was added. Apart from `add`, as a thread that wakes takes the interpreter."""
        with self._condition:
            self._condition.notify()

    def remove(self, live: LiveRequest) -> None:
        """Forgets a request that has ended. Idempotent."""
        with self._condition:
            self._requests.discard(live)

    def stop(self, request_id: str) -> int:
        """Ends all requests with this client-given id; returns how many there were."""
        with self._condition:
            named = [live for live in self._requests if live.request_id == request_id]
        for live in named:
            live.cancel()
        return len(named)

    def close(self, timeout_s: float) -> None:
        """Ends the sweep. Idempotent."""
        with self._condition:
            self._is_closed = True
            self._condition.notify()
        self._thread.join(timeout_s)

    def _sweep_forever(self) -> None:
        cancelled: set[LiveRequest] = set()
        interval_s = _INTERVAL_S
        while self._wait_for_requests():
            # Before the first question too: nobody gives up what has just begun, and asking is in the way of its start.
            time.sleep(interval_s)
            with self._condition:
                requests = [live for live in self._requests if live not in cancelled]
                cancelled &= self._requests
            started_s = time.monotonic()
            cancelled.update(live for live in requests if self._cancel_if_given_up(live))
            took_s = time.monotonic() - started_s
            wanted_s = max(_INTERVAL_S, took_s / _MAX_SHARE, len(requests) / _MAX_QUESTIONS_PER_S)
            interval_s = min(_MAX_INTERVAL_S, wanted_s)
            requests.clear()  # while this thread sleeps, it must not keep ended requests alive

    def _wait_for_requests(self) -> bool:
        """Returns when there is a request to ask for; False once the sweep is to end."""
        with self._condition:
            self._condition.wait_for(lambda: self._requests or self._is_closed)
            return not self._is_closed

    @staticmethod
    def _cancel_if_given_up(live: LiveRequest) -> bool:
        try:
            is_cancelled = live.is_cancelled_by_client()
        except Exception:  # a question that cannot be asked must not end the sweep for all others
            _LOGGER.warning("a request could not be asked whether it was cancelled", exc_info=True)
            return False
        if is_cancelled:
            live.cancel()
        return is_cancelled
