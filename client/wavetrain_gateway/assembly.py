# SPDX-License-Identifier: Apache-2.0
"""Puts a gateway together from its settings."""

from __future__ import annotations

from starlette.applications import Starlette

from wavetrain_gateway.admission import Admission
from wavetrain_gateway.app import GatewayApp
from wavetrain_gateway.bodies import LargeBodies
from wavetrain_gateway.engine_load import EngineLoads
from wavetrain_gateway.host_names import loopback_hosts
from wavetrain_gateway.lifecycle import Lifecycle
from wavetrain_gateway.limits.assembly import make_admission
from wavetrain_gateway.metrics import GatewayMetrics
from wavetrain_gateway.replica_metrics import ReplicaCollector
from wavetrain_gateway.request_log import RequestLog
from wavetrain_gateway.response_cache import AnswerStore, MemoryStore, ResponseCache
from wavetrain_gateway.routing.admin import AdminApi
from wavetrain_gateway.routing.routed_upstream import RoutedUpstream, make_upstream
from wavetrain_gateway.services import Services
from wavetrain_gateway.settings import CacheSettings, GatewaySettings
from wavetrain_gateway.tracing import NoTracer, OtelTracer
from wavetrain_gateway.upstream import Upstream


def build_gateway(
    settings: GatewaySettings,
    *,
    api_keys: str | None = None,
    upstream: Upstream | None = None,
    admission: Admission | None = None,
) -> GatewayApp:
    """Returns the application, to be called on the event loop that will run it.

    Args:
        api_keys: keys themselves, as an environment variable has them; in place of a key file.
        upstream, admission: replace those that the settings ask for.

    Raises:
        OSError: a file that the settings name cannot be read.
        ValueError: a file, an address or a key is wrong; the message says which.
    """
    log, metrics = RequestLog(settings.log), GatewayMetrics()
    if upstream is None:
        routed = make_upstream(settings.routing, upstreams=settings.upstreams, model=settings.model)
        metrics.registry.register(ReplicaCollector(routed.router.replicas))
        upstream = routed
    has_keys = admission is not None or settings.keys.file is not None or api_keys is not None
    services = Services(
        settings=settings,
        upstream=upstream,
        admission=admission or make_admission(settings.keys, api_keys),
        lifecycle=Lifecycle(),
        metrics=metrics,
        cache=ResponseCache(
            settings.cache, _answer_store(settings.cache), on_lookup=metrics.count_cache, on_failure=log.cache_failure
        ),
        log=log,
        loads=EngineLoads(settings.engine_metrics),
        large_bodies=LargeBodies(),
        allowed_hosts=None if has_keys else loopback_hosts(settings.listen),
        tracer=NoTracer() if settings.trace.otlp_endpoint is None else OtelTracer(settings.trace),
    )
    return GatewayApp(services)


def build_admin(app: GatewayApp, key: str) -> Starlette:
    """Returns the admin application of a gateway.

    Raises:
        ValueError: there is no key, or the gateway's upstream has no replicas to move.
    """
    upstream = app.services.upstream
    if not isinstance(upstream, RoutedUpstream):
        raise ValueError("the admin API needs replicas that can be moved")
    return AdminApi(upstream.router.replicas, key).app()


def _answer_store(settings: CacheSettings) -> AnswerStore | None:
    if not settings.is_enabled:
        return None
    if settings.redis_url is not None:
        # Most go without, and its client takes longer to import than all the rest.
        from wavetrain_gateway.redis_store import RedisStore

        return RedisStore(settings.redis_url, ttl_s=settings.ttl_s)
    return MemoryStore(ttl_s=settings.ttl_s, max_bytes=settings.max_bytes)
