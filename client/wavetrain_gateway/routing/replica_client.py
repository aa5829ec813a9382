# SPDX-License-Identifier: Apache-2.0
"""What routing asks of the connection to one server: a part of `wavetrain_client.AsyncClient`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from wavetrain_client import AsyncChunkStream, AsyncClient, ChatPrompt, GenerationRequest, Tokenization


class ReplicaClient(Protocol):
    """The connection to one server. It repeats nothing by itself."""

    def open(self, request: GenerationRequest) -> AsyncChunkStream:
        """Runs a generation, sent by the first `anext`."""
        ...

    async def tokenize(
        self, prompt: str | ChatPrompt, *, add_special_tokens: bool = True, timeout_s: float | None = None
    ) -> Tokenization:
        """Returns the token ids of a text or of chat messages."""
        ...

    async def tokenizer_info(self, *, timeout_s: float | None = None) -> dict[str, Any]:
        """Returns what the tokenizer says of itself."""
        ...

    async def detokenize(self, token_ids: Sequence[int], *, timeout_s: float | None = None) -> str:
        """Returns the text of token ids."""
        ...

    async def is_ready(self, model: str | None = None, *, timeout_s: float = 5.0) -> bool:
        """Whether the server says that it is ready."""
        ...

    async def close(self) -> None:
        """Ends the connection, and with it what still runs."""
        ...


ClientFactory = Callable[[str], ReplicaClient]


def connect(url: str) -> ReplicaClient:
    """A connection to the server at this address. Routing decides about retries, not the client."""
    return AsyncClient(url, max_retries=0)
