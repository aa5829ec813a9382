# SPDX-License-Identifier: Apache-2.0
"""Several models on several replicas behind one `Upstream`."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from pydantic import ValidationError

from wavetrain_client import ChatPrompt, ConnectionFailed, ServerBusy
from wavetrain_gateway.routing.replica import Replica
from wavetrain_gateway.routing.replica_client import ClientFactory, ReplicaClient, connect
from wavetrain_gateway.routing.replica_set import ReplicaSet
from wavetrain_gateway.routing.routed_stream import RoutedStream
from wavetrain_gateway.routing.router import Route, Router
from wavetrain_gateway.routing.routing_table import RoutingTable, parse_routing
from wavetrain_gateway.routing.settings import RoutingSettings
from wavetrain_gateway.toml_file import describe
from wavetrain_gateway.upstream import Job, ModelCard, Tokens, UpstreamStream
from wavetrain_gateway.watched_file import WatchedFile

T = TypeVar("T")

_NUM_SHORT_ATTEMPTS = 2  # of what takes a moment: tokenizing


class RoutedUpstream:
    """Routes jobs to replicas.

    Args:
        table: replicas, aliases and rules to begin with.
        settings: how to route.
        table_file: where the table is read from again when it changes; None where it does not.
        connect: makes the connection to an address.
    """

    def __init__(
        self,
        table: RoutingTable,
        settings: RoutingSettings,
        *,
        table_file: WatchedFile[RoutingTable] | None = None,
        connect: ClientFactory = connect,
    ) -> None:
        self.router = Router(ReplicaSet(settings, connect=connect), settings)
        self.router.apply(table)
        self._table_file = table_file
        self._created_s = int(time.time())

    @property
    def num_file_errors(self) -> int:
        """How often a changed routing file could not be taken."""
        return self._table_file.num_errors if self._table_file is not None else 0

    async def start(self) -> None:
        """Begins to look after the replicas and the file. Does not wait for either."""
        self.router.replicas.start()
        if self._table_file is not None:
            self._table_file.start(self.router.apply)

    async def close(self) -> None:
        """Lets go of all replicas; what still runs is cancelled. Idempotent."""
        if self._table_file is not None:
            await self._table_file.close()
        await self.router.replicas.close()

    def models(self) -> Sequence[ModelCard]:
        """All models, aliases and names of rules."""
        return [
            ModelCard(id=name, created_s=self._created_s, root=root, max_model_len=self._max_model_len(root))
            for name, root in self.router.names.items()
        ]

    async def is_ready(self) -> bool:
        """Whether at least one replica takes requests now."""
        return any(self.router.replicas.usable(model) for model in self.router.replicas.models)

    def open(self, job: Job) -> UpstreamStream:
        """Runs a job; it is sent by the first `anext`.

        Raises:
            NotFound: there is no such model.
        """
        return RoutedStream(self.router, job, self.router.route(job))

    async def tokenize(self, model: str, text: str, *, is_raw: bool = False, timeout_s: float) -> Tokens:
        """Asks a replica's tokenizer.

        Raises:
            NotFound: there is no such model.
            Unavailable: no replica of it takes requests.
            ClientError: what the replica said.
        """
        found = await self._ask(
            model, lambda client: client.tokenize(text, add_special_tokens=not is_raw, timeout_s=timeout_s)
        )
        return Tokens(token_ids=found.token_ids, max_model_len=found.max_model_len)

    async def tokenize_chat(self, model: str, chat: ChatPrompt, *, timeout_s: float) -> Tokens:
        """Asks a replica's tokenizer, with its chat template. Raises as `tokenize` does."""
        found = await self._ask(model, lambda client: client.tokenize(chat, timeout_s=timeout_s))
        return Tokens(token_ids=found.token_ids, max_model_len=found.max_model_len)

    async def tokenizer_info(self, model: str, *, timeout_s: float) -> dict[str, Any]:
        """Asks a replica's tokenizer. Raises as `tokenize` does."""
        return await self._ask(model, lambda client: client.tokenizer_info(timeout_s=timeout_s))

    async def detokenize(self, model: str, token_ids: Sequence[int], *, timeout_s: float) -> str:
        """Asks a replica's detokenizer. Raises as `tokenize` does."""
        return await self._ask(model, lambda client: client.detokenize(token_ids, timeout_s=timeout_s))

    async def _ask(self, name: str, ask: Callable[[ReplicaClient], Awaitable[T]]) -> T:
        """Asks one replica, and another where that one is busy or gone."""
        route = Route(self.router.resolve(name), ())
        await self.router.replicas.wait_until_probed(route.models[0], self.router.settings.start_wait_s)
        tried: list[Replica] = []
        while True:
            lease = self.router.lease(route, 1, 0, tried)
            has_failed = False
            try:
                return await ask(lease.replica.client)
            except (ConnectionFailed, ServerBusy) as error:
                has_failed = isinstance(error, ConnectionFailed)
                tried.append(lease.replica)
                if len(tried) >= _NUM_SHORT_ATTEMPTS or not self.router.has_untried(route, tried):
                    raise
            finally:
                lease.end(has_failed=has_failed)

    def _max_model_len(self, model: str) -> int | None:
        """What the model's replicas take, the least of them where they differ."""
        lengths = [replica.max_model_len for replica in self.router.replicas.of_model(model)]
        return min((length for length in lengths if length is not None), default=None)


def make_upstream(
    settings: RoutingSettings, *, upstreams: Sequence[str] = (), model: str = "", connect: ClientFactory = connect
) -> RoutedUpstream:
    """Builds the upstream: by the routing file where there is one, else `upstreams` as replicas of `model`.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file, an address or the model's name is wrong.
    """
    if settings.file is not None:
        name = settings.file.name
        watched = WatchedFile(settings.file, lambda data: parse_routing(data, name), what="routing file")
        return RoutedUpstream(watched.load(), settings, table_file=watched, connect=connect)
    try:
        table = RoutingTable.model_validate({"replica": [{"url": url, "model": model} for url in upstreams]})
    except ValidationError as error:
        raise ValueError(f"the upstreams: {describe(error, RoutingTable)}") from None
    return RoutedUpstream(table, settings, connect=connect)
