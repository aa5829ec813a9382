# SPDX-License-Identifier: Apache-2.0
"""Puts a gateway together from its settings."""

from __future__ import annotations

from wavetrain_gateway.admission import Admission, OpenAdmission
from wavetrain_gateway.app import GatewayApp
from wavetrain_gateway.lifecycle import Lifecycle
from wavetrain_gateway.metrics import GatewayMetrics
from wavetrain_gateway.request_log import RequestLog
from wavetrain_gateway.response_cache import AnswerStore, MemoryStore, ResponseCache
from wavetrain_gateway.services import Services
from wavetrain_gateway.settings import CacheSettings, GatewaySettings
from wavetrain_gateway.single_upstream import SingleUpstream
from wavetrain_gateway.upstream import Upstream


def build_gateway(
    settings: GatewaySettings, *, upstream: Upstream | None = None, admission: Admission | None = None
) -> GatewayApp:
    """Returns the application; `upstream` and `admission` replace those that the settings ask for.

    To be called on the event loop that will run it.
    """
    log = RequestLog(settings.log)
    services = Services(
        settings=settings,
        upstream=upstream if upstream is not None else SingleUpstream(settings.upstreams[0], settings.model),
        admission=admission if admission is not None else OpenAdmission(),
        lifecycle=Lifecycle(),
        metrics=GatewayMetrics(),
        cache=ResponseCache(settings.cache, _answer_store(settings.cache), log.cache_failure),
        log=log,
    )
    return GatewayApp(services)


def _answer_store(settings: CacheSettings) -> AnswerStore | None:
    if not settings.is_enabled:
        return None
    return MemoryStore(ttl_s=settings.ttl_s, max_bytes=settings.max_bytes)
