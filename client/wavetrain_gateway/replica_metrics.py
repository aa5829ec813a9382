# SPDX-License-Identifier: Apache-2.0
"""Prometheus metrics of the replicas, read when they are asked for."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from wavetrain_gateway.routing.replica_set import ReplicaSet

_PREFIX = "wavetrain_gateway_replica"
_LABELS = ("model", "replica")


class ReplicaCollector(Collector):
    """Tells of each replica how it is and what it has to do. Which there are is configured, so the labels are few."""

    def __init__(self, replicas: ReplicaSet) -> None:
        self._replicas = replicas

    def collect(self) -> Iterable[Metric]:
        """One sample of each metric for each replica."""
        healthy = GaugeMetricFamily(f"{_PREFIX}_healthy", "Whether it takes requests", labels=_LABELS)
        running = GaugeMetricFamily(f"{_PREFIX}_running", "Requests it runs", labels=_LABELS)
        outstanding = GaugeMetricFamily(f"{_PREFIX}_outstanding_tokens", "Tokens it still has to do", labels=_LABELS)
        requests = CounterMetricFamily(f"{_PREFIX}_requests", "Requests it was sent", labels=_LABELS)
        failures = CounterMetricFamily(f"{_PREFIX}_failures", "Requests it failed", labels=_LABELS)
        affine = CounterMetricFamily(f"{_PREFIX}_affine", "Requests sent by prefix affinity", labels=_LABELS)
        ejections = CounterMetricFamily(f"{_PREFIX}_ejections", "How often it was taken out", labels=_LABELS)
        for replica in self._replicas.replicas:
            labels = (replica.entry.model, replica.name)
            is_ejected = self._replicas.is_ejected(replica)
            healthy.add_metric(labels, float(replica.health == "healthy" and not is_ejected))
            running.add_metric(labels, replica.num_running)
            outstanding.add_metric(labels, replica.outstanding_tokens)
            requests.add_metric(labels, replica.counts.requests)
            failures.add_metric(labels, replica.counts.failures)
            affine.add_metric(labels, replica.counts.affine)
            ejections.add_metric(labels, self._replicas.num_ejections(replica))
        return (healthy, running, outstanding, requests, failures, affine, ejections)
