# SPDX-License-Identifier: Apache-2.0
"""The replicas there are: added and taken away while requests run.

A replica that is taken away gets no new request, finishes those it has, and is let go of then; its name is free at
once.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from wavetrain_gateway.routing.health_monitor import HealthMonitor
from wavetrain_gateway.routing.outlier_detector import OutlierDetector
from wavetrain_gateway.routing.replica import Origin, Replica
from wavetrain_gateway.routing.replica_client import ClientFactory, connect
from wavetrain_gateway.routing.routing_table import ReplicaEntry
from wavetrain_gateway.routing.settings import RoutingSettings

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Member:
    replica: Replica
    monitor: HealthMonitor


class ReplicaSet:
    """All replicas of all models.

    Args:
        settings: of health, breakers and balance.
        connect: makes the connection to an address.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        settings: RoutingSettings,
        *,
        connect: ClientFactory = connect,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._connect = connect
        self._clock = clock
        self._members: dict[str, _Member] = {}
        self._detectors: dict[str, OutlierDetector] = {}
        self._retiring: dict[asyncio.Task[None], Replica] = {}
        self._is_started = False
        self._changed = asyncio.Event()

    @property
    def replicas(self) -> list[Replica]:
        """Those that are there."""
        return [member.replica for member in self._members.values()]

    @property
    def retiring(self) -> list[Replica]:
        """Those that were taken away and still have requests to finish."""
        return list(self._retiring.values())

    @property
    def models(self) -> set[str]:
        """Models that have replicas, usable or not."""
        return {replica.entry.model for replica in self.replicas}

    def start(self) -> None:
        """Begins to look after the replicas, those to come as well."""
        self._is_started = True
        for member in self._members.values():
            member.monitor.start()

    async def close(self) -> None:
        """Lets go of all replicas; what runs on them is cancelled. Idempotent."""
        self._is_started = False
        members, self._members = list(self._members.values()), {}
        for task in list(self._retiring):
            task.cancel()
        if self._retiring:
            await asyncio.wait(list(self._retiring))
        for member in members:
            await member.monitor.close()
            await member.replica.client.close()

    def find(self, name: str) -> Replica | None:
        """The replica of this name."""
        member = self._members.get(name)
        return member.replica if member is not None else None

    def of_model(self, model: str) -> list[Replica]:
        """The replicas of a model, usable or not."""
        return [replica for replica in self.replicas if replica.entry.model == model]

    def usable(self, model: str) -> list[Replica]:
        """The replicas of a model that a request may be sent to now."""
        detector = self._detectors.get(model)
        return [
            replica
            for replica in self.of_model(model)
            if replica.is_usable and not (detector is not None and detector.is_ejected(replica.name))
        ]

    def is_ejected(self, replica: Replica) -> bool:
        """Whether the replica is out for failing more often than may be."""
        return self._detector(replica.entry.model).is_ejected(replica.name)

    def num_ejections(self, replica: Replica) -> int:
        """How often it was taken out for that."""
        return self._detector(replica.entry.model).num_ejections(replica.name)

    def note_outcome(self, replica: Replica, *, has_failed: bool) -> None:
        """Notes how a request on a replica ended."""
        model = replica.entry.model
        if self._members.get(replica.name, None) is None:
            return
        peers = [item.name for item in self.of_model(model) if item.health == "healthy" and not item.is_draining]
        if self._detector(model).record(replica.name, has_failed=has_failed, peers=peers):
            _log.warning("replica %s of %s fails too often and is taken out for a while", replica.name, model)

    def add(self, entry: ReplicaEntry, origin: Origin = "file") -> Replica:
        """Adds a replica; it takes requests as soon as it has generated a token.

        Raises:
            ValueError: one of this name is there.
        """
        if entry.name in self._members:
            raise ValueError(f"there is a replica named {entry.name!r}; choose another name, or remove that one first")
        replica = Replica(entry, self._connect(entry.url), self._settings, origin=origin, clock=self._clock)
        monitor = HealthMonitor(replica, self._settings.health, self._wake, clock=self._clock)
        self._members[entry.name] = _Member(replica, monitor)
        if self._is_started:
            monitor.start()
        return replica

    def retire(self, name: str) -> Replica:
        """Takes a replica away; its requests finish.

        Raises:
            KeyError: there is none of this name.
        """
        member = self._members.pop(name)
        replica = member.replica
        replica.is_draining = True
        self._detector(replica.entry.model).forget(name)
        task = asyncio.get_running_loop().create_task(self._let_go(member), name=f"retire-{name}")
        self._retiring[task] = replica
        task.add_done_callback(lambda done: self._retiring.pop(done, None))
        return replica

    def apply(self, entries: Sequence[ReplicaEntry], origin: Origin = "file") -> None:
        """Makes the replicas of one origin those that are given: adds, takes away, and weighs anew.

        Raises:
            ValueError: one has the name of a replica of another origin; nothing was changed then.
        """
        for entry in entries:
            there = self.find(entry.name)
            if there is not None and there.origin != origin:
                raise ValueError(f"replica {entry.name!r}: the admin API has added one of this name; remove that first")
        wanted = {entry.name: entry for entry in entries}
        for replica in self.replicas:
            if replica.origin == origin:
                entry = wanted.get(replica.name)
                if entry is None or not entry.is_same_server(replica.entry):
                    self.retire(replica.name)
                else:
                    replica.entry = entry
        for entry in entries:
            if entry.name not in self._members:
                self.add(entry, origin)

    async def wait_until_probed(self, model: str, timeout_s: float) -> None:
        """Waits until a replica of the model is usable, or all have been asked once, or the time is over."""
        deadline_s = self._clock() + timeout_s
        while not self.usable(model) and not all(replica.was_probed for replica in self.of_model(model)):
            left_s = deadline_s - self._clock()
            if left_s <= 0:
                return
            try:
                await asyncio.wait_for(self._changed.wait(), left_s)
            except asyncio.TimeoutError:
                return

    def _detector(self, model: str) -> OutlierDetector:
        if model not in self._detectors:
            settings = self._settings.breaker
            self._detectors[model] = OutlierDetector(
                max_failed=settings.max_failed,
                min_requests=settings.min_requests,
                window_s=settings.window_s,
                first_ejection_s=settings.first_ejection_s,
                max_ejection_s=settings.max_ejection_s,
                max_ejected=settings.max_ejected,
                clock=self._clock,
            )
        return self._detectors[model]

    async def _let_go(self, member: _Member) -> None:
        replica = member.replica
        try:
            await member.monitor.close()
            await asyncio.wait_for(replica.wait_idle(), self._settings.drain_timeout_s)
            _log.info("replica %s is drained and let go of", replica.name)
        except asyncio.TimeoutError:
            _log.warning("replica %s still has %d requests; they are cut off", replica.name, replica.num_running)
        finally:
            await replica.client.close()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
