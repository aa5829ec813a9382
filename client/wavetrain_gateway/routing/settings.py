# SPDX-License-Identifier: Apache-2.0
"""The numbers of routing: the table `[routing]` of gateway.toml."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

_Seconds = Annotated[float, Field(gt=0, le=86_400)]
_Share = Annotated[float, Field(gt=0, le=1)]


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class HealthSettings(_Settings):
    """When a replica takes requests.

    Attributes:
        probe_period_s: how often the server is asked whether it is ready; more often until it was for the first time.
        probe_timeout_s: how long it may take to say so.
        num_failed_probes: in a row, that make a replica unhealthy.
        canary_period_s: how often one token is generated where no request of anybody was answered in the meantime.
        canary_timeout_s: how long that may take.
    """

    probe_period_s: _Seconds = 1.0
    probe_timeout_s: _Seconds = 2.0
    num_failed_probes: Annotated[int, Field(ge=1)] = 2
    canary_period_s: _Seconds = 10.0
    canary_timeout_s: _Seconds = 20.0


class RetrySettings(_Settings):
    """When a request is sent again, which is only where nothing of it was answered.

    Attributes:
        max_retries: of one request.
        budget_ratio: retries per request, over ten seconds.
        budget_free_per_s: retries a second that need no requests.
    """

    max_retries: Annotated[int, Field(ge=0, le=10)] = 2
    budget_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    budget_free_per_s: Annotated[float, Field(ge=0)] = 1.0


class BreakerSettings(_Settings):
    """When a replica that fails is left alone.

    Attributes:
        num_failures: in a row, that open its circuit.
        first_open_s: for how long, doubled by each failed trial.
        max_failed: share of failed requests in `window_s` beyond which it is taken out.
        min_requests: fewer in the window say nothing.
        first_ejection_s: how long it is out then; longer each time.
        max_ejected: share of a model's replicas that may be out at once.
    """

    num_failures: Annotated[int, Field(ge=1)] = 5
    first_open_s: _Seconds = 1.0
    max_open_s: _Seconds = 30.0
    max_failed: _Share = 0.5
    min_requests: Annotated[int, Field(ge=1)] = 5
    window_s: _Seconds = 30.0
    first_ejection_s: _Seconds = 10.0
    max_ejection_s: _Seconds = 300.0
    max_ejected: _Share = 0.5


class BalanceSettings(_Settings):
    """Which of the replicas gets a request.

    Attributes:
        load_factor: how many times its share of the load a replica may have and still be chosen by prefix affinity.
        slack_tokens: outstanding tokens that it may have beyond that.
        max_index_chunks: beginnings remembered for each replica, in chunks of 64 characters; 0 turns affinity off.
        warm_up_s: how long a replica that became ready takes less than its share; 0 turns that off.
        warm_up_least: the share it begins with.
    """

    load_factor: Annotated[float, Field(ge=1, le=100)] = 1.25
    slack_tokens: Annotated[int, Field(ge=0)] = 2048
    max_index_chunks: Annotated[int, Field(ge=0)] = 32_768
    warm_up_s: Annotated[float, Field(ge=0, le=86_400)] = 30.0
    warm_up_least: _Share = 0.1


class RoutingSettings(_Settings):
    """Routing.

    Attributes:
        file: replicas, aliases and rules; read again when it changes. None: the upstreams of the command line.
        start_wait_s: how long a request may wait for replicas that were never asked yet whether they are ready.
        drain_timeout_s: how long the requests of a replica that is taken away may go on.
    """

    file: Path | None = None
    start_wait_s: _Seconds = 5.0
    drain_timeout_s: _Seconds = 600.0
    health: HealthSettings = HealthSettings()
    retry: RetrySettings = RetrySettings()
    breaker: BreakerSettings = BreakerSettings()
    balance: BalanceSettings = BalanceSettings()
