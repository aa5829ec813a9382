# SPDX-License-Identifier: Apache-2.0
"""One model on one server: the plainest upstream."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from types import TracebackType

from wavetrain_client import AsyncChunkStream, AsyncClient, ChatPrompt, Chunk
from wavetrain_gateway.errors import NotFound
from wavetrain_gateway.upstream import Job, ModelCard, Tokens, UpstreamStream

_TRITON_MODEL = "llm"


class SingleUpstream:
    """Serves `model` from the server at `url`; busy answers are repeated by the client, before the first response."""

    def __init__(self, url: str, model: str) -> None:
        self._url = url
        self._model = model
        self._created_s = int(time.time())
        self._max_model_len: int | None = None
        self._client = AsyncClient(url)

    async def start(self) -> None:
        """Connects with the first request."""

    async def close(self) -> None:
        """Closes the connection; running requests are cancelled."""
        await self._client.close()

    def models(self) -> Sequence[ModelCard]:
        """The one model."""
        return [
            ModelCard(id=self._model, created_s=self._created_s, root=self._model, max_model_len=self._max_model_len)
        ]

    async def is_ready(self) -> bool:
        """Whether the server answers and the model is loaded."""
        return await self._client.is_ready(_TRITON_MODEL, timeout_s=2.0)

    def open(self, job: Job) -> UpstreamStream:
        """Runs a job."""
        self._check(job.model)
        request = dataclasses.replace(job.generation, model=_TRITON_MODEL)
        return _Stream(self._client.open(request), self._url)

    async def tokenize(self, model: str, text: str, *, is_raw: bool = False, timeout_s: float) -> Tokens:
        """Asks the server's tokenizer."""
        self._check(model)
        found = await self._client.tokenize(text, add_special_tokens=not is_raw, timeout_s=timeout_s)
        self._max_model_len = found.max_model_len or self._max_model_len
        return Tokens(token_ids=found.token_ids, max_model_len=found.max_model_len)

    async def tokenize_chat(self, model: str, chat: ChatPrompt, *, timeout_s: float) -> Tokens:
        """Asks the server's tokenizer."""
        self._check(model)
        found = await self._client.tokenize(chat, timeout_s=timeout_s)
        return Tokens(token_ids=found.token_ids, max_model_len=found.max_model_len)

    async def detokenize(self, model: str, token_ids: Sequence[int], *, timeout_s: float) -> str:
        """Asks the server's detokenizer."""
        self._check(model)
        return await self._client.detokenize(token_ids, timeout_s=timeout_s)

    def _check(self, model: str) -> None:
        if model != self._model:
            raise NotFound(
                f"there is no model {model[:64]!r}; GET /v1/models lists them", code="model_not_found", param="model"
            )


class _Stream:
    """A client's stream with the name of its server."""

    def __init__(self, stream: AsyncChunkStream, replica: str) -> None:
        self._stream = stream
        self.replica = replica

    async def __aenter__(self) -> _Stream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stream.aclose()

    def __aiter__(self) -> _Stream:
        return self

    async def __anext__(self) -> Chunk:
        return await self._stream.__anext__()
