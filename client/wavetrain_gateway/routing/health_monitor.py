# SPDX-License-Identifier: Apache-2.0
"""Asks one replica again and again whether it is ready, and has it generate a token where nobody else does.

Readiness alone says too little: a Triton server answers that it is ready while the engine behind it hangs. A generation
says enough, and so does one of somebody else's, which is why a busy replica is not bothered with canaries: queued
behind real requests they would time out just when they must not.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable

from wavetrain_client import ClientError, GenerationRequest, ServerBusy
from wavetrain_gateway.routing.replica import Replica
from wavetrain_gateway.routing.settings import HealthSettings

# In front of every caller's: lower is earlier, and tiers are small numbers.
_CANARY_PRIORITY = -1_000_000
_FIRST_PERIOD_S = 0.2
_CANARY_PROMPT = "1"
# Its sampled flag is unset: an engine that is traced tells nobody of canaries.
_CANARY_TRACE = "00-00000000000000000000000000000001-0000000000000001-00"

_log = logging.getLogger(__name__)


class HealthMonitor:
    """Keeps `replica.health` true.

    Args:
        replica: whom to ask.
        settings: how often.
        on_check: called after each check.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        replica: Replica,
        settings: HealthSettings,
        on_check: Callable[[], None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._replica = replica
        self._settings = settings
        self._on_check = on_check
        self._clock = clock
        self._num_failed = 0
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins, in a task of the running loop."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run(), name=f"health-{self._replica.name}")

    async def close(self) -> None:
        """Stops. Idempotent."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait({task})

    async def check(self) -> None:
        """Asks once, and notes the answer."""
        replica, was = self._replica, self._replica.health
        if await self._is_well():
            self._num_failed = 0
            replica.mark_healthy()
        else:
            self._num_failed += 1
            if self._num_failed >= self._settings.num_failed_probes:
                replica.mark_unhealthy()
        replica.was_probed = True
        if replica.health != was:
            _log.log(
                logging.INFO if replica.health == "healthy" else logging.WARNING,
                "replica %s of %s is %s",
                replica.name,
                replica.entry.model,
                replica.health,
            )
        self._on_check()

    async def _run(self) -> None:
        while True:
            try:
                await self.check()
            except Exception:
                # Whatever it was, a replica that nobody looks after would stay as it is for ever.
                _log.exception("the check of replica %s failed", self._replica.name)
            # Not in step with the other replicas' checks, nor with other gateways.
            await asyncio.sleep(self._period_s() * random.uniform(0.9, 1.1))

    def _period_s(self) -> float:
        """A server that starts together with the gateway is noticed soon."""
        period_s = self._settings.probe_period_s
        return period_s if self._replica.last_answer_s is not None else min(period_s, _FIRST_PERIOD_S)

    async def _is_well(self) -> bool:
        replica = self._replica
        timeout_s = self._settings.probe_timeout_s
        if not await replica.client.is_ready(replica.entry.triton_model, timeout_s=timeout_s):
            return False
        if replica.health == "healthy" and not self._is_canary_due():
            return True
        return await self._generate()

    def _is_canary_due(self) -> bool:
        answered_s = self._replica.last_answer_s
        return answered_s is None or self._clock() - answered_s >= self._settings.canary_period_s

    async def _generate(self) -> bool:
        replica, began_s = self._replica, self._clock()
        request = GenerationRequest(
            prompt=_CANARY_PROMPT,
            model=replica.entry.triton_model,
            options={"max_tokens": 1, "temperature": 0.0},
            timeout_s=self._settings.canary_timeout_s,
            priority=_CANARY_PRIORITY,
            cache_salt="canary",
            traceparent=_CANARY_TRACE,
        )
        try:
            async with replica.client.open(request) as stream:
                async for _ in stream:
                    pass
        except ServerBusy:
            return True  # it lives, and has more to do than it can
        except ClientError as error:
            if replica.last_answer_s is not None and replica.last_answer_s > began_s:
                return True  # it answered others meanwhile
            _log.warning("replica %s did not generate: %s", replica.name, error)
            return False
        replica.note_answer()
        if replica.max_model_len is None:
            await self._learn_length()
        return True

    async def _learn_length(self) -> None:
        try:
            found = await self._replica.client.tokenize(_CANARY_PROMPT, timeout_s=self._settings.canary_timeout_s)
        except ClientError as error:
            _log.info("replica %s does not tell how long a prompt may be: %s", self._replica.name, error)
            return
        self._replica.max_model_len = found.max_model_len
