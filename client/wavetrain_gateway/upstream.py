# SPDX-License-Identifier: Apache-2.0
"""What a request handler reaches models through: the seam between the API and replicas.

A handler makes a `Job` and reads `Upstream.open(job)`:

    async with upstream.open(job) as stream:
        async for chunk in stream: ...

Leaving the block cancels what still runs, at once. Errors are the client's (`wavetrain_client.ClientError`) or a
GatewayError; the handler turns them into answers. A request that no byte was sent of may be sent to another replica
by whoever implements this; the handler never sends one twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

from wavetrain_client import ChatPrompt, Chunk, GenerationRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One generation to run somewhere.

    Attributes:
        model: the public name the caller used, or an alias.
        generation: what to ask a replica for; its `model` is replaced by the replica's Triton model.
        num_prompt_tokens: an estimate, exact where the prompt is token ids.
        max_output_tokens: an estimate of what the output may cost.
        tier: the caller's tier, for routing rules.
        affinity: the start of the prompt, for prefix affinity; equal beginnings are equal.
    """

    model: str
    generation: GenerationRequest
    num_prompt_tokens: int = 0
    max_output_tokens: int = 0
    tier: str = "default"
    affinity: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """One model callers may name.

    Attributes:
        created_s: seconds since the epoch, for OpenAI's `created`.
        root: the model an alias stands for; its own id otherwise.
        max_model_len: tokens of prompt and output together; None while no replica has told.
    """

    id: str
    created_s: int
    root: str
    max_model_len: int | None = None


class UpstreamStream(Protocol):
    """The chunks of one job."""

    @property
    def replica(self) -> str:
        """The replica's name, for metrics; "" before one was chosen."""
        ...

    async def __aenter__(self) -> UpstreamStream: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def __aiter__(self) -> UpstreamStream: ...

    async def __anext__(self) -> Chunk:
        """Waits for the next chunk. Raises ClientError or GatewayError; the stream is over then."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """A text, or chat messages, as token ids."""

    token_ids: Sequence[int]
    max_model_len: int | None


class Upstream(Protocol):
    """Models and their replicas. Made once per process; all calls come from its event loop."""

    async def start(self) -> None:
        """Connects. Does not wait for replicas to be ready."""
        ...

    async def close(self) -> None:
        """Ends connections, and with them what still runs. Idempotent."""
        ...

    def models(self) -> Sequence[ModelCard]:
        """All models that may be named, aliases included."""
        ...

    async def is_ready(self) -> bool:
        """Whether at least one replica takes requests now."""
        ...

    def open(self, job: Job) -> UpstreamStream:
        """Runs a job; it is sent by the first `anext`.

        Raises:
            NotFound: there is no such model.
        """
        ...

    async def tokenize(self, model: str, text: str, *, is_raw: bool = False, timeout_s: float) -> Tokens:
        """Returns a text's token ids, `is_raw` without those that the tokenizer puts around it.

        Raises:
            NotFound: there is no such model.
            ClientError: no replica could do it.
        """
        ...

    async def tokenize_chat(self, model: str, chat: ChatPrompt, *, timeout_s: float) -> Tokens:
        """Returns the token ids of chat messages, rendered by the checkpoint's template. Raises as `tokenize` does."""
        ...

    async def tokenizer_info(self, model: str, *, timeout_s: float) -> dict[str, Any]:
        """Returns named special tokens, the chat template and sizes. Raises as `tokenize` does."""
        ...

    async def detokenize(self, model: str, token_ids: Sequence[int], *, timeout_s: float) -> str:
        """Returns the text of token ids. Raises as `tokenize` does."""
        ...
