# SPDX-License-Identifier: Apache-2.0
"""What the request handlers work with, put together once."""

from __future__ import annotations

from dataclasses import dataclass

from wavetrain_gateway.admission import Admission
from wavetrain_gateway.bodies import LargeBodies
from wavetrain_gateway.engine_load import EngineLoads
from wavetrain_gateway.exchange import Exchange
from wavetrain_gateway.lifecycle import Lifecycle
from wavetrain_gateway.metrics import GatewayMetrics
from wavetrain_gateway.request_log import RequestLog
from wavetrain_gateway.response_cache import ResponseCache
from wavetrain_gateway.settings import GatewaySettings
from wavetrain_gateway.tracing import Tracer
from wavetrain_gateway.upstream import Upstream


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """One gateway's parts; `allowed_hosts` as `host_names` has it."""

    settings: GatewaySettings
    upstream: Upstream
    admission: Admission
    lifecycle: Lifecycle
    metrics: GatewayMetrics
    cache: ResponseCache
    log: RequestLog
    tracer: Tracer
    loads: EngineLoads
    large_bodies: LargeBodies
    allowed_hosts: frozenset[str] | None = None

    def note_end(self, exchange: Exchange) -> None:
        """Tells metrics, log and traces of a request that has ended."""
        self.metrics.count(exchange)
        self.log.request(exchange)
        self.tracer.record(exchange)
