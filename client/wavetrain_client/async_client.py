# SPDX-License-Identifier: Apache-2.0
"""The asyncio shell around `StreamSession`: the same client as `client.py`, waiting with `await`.

One grpc.aio channel, and one call per request. An `AsyncClient` belongs to the event
loop in which it was first used.
"""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections import deque
from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

import grpc
import grpc.aio

from wavetrain_client import protocol
from wavetrain_client.channel import CHANNEL_OPTIONS, DEFAULT_URL, Address
from wavetrain_client.chunk import Chunk, Generation, join_chunks
from wavetrain_client.errors import (
    Cancelled,
    ClientError,
    ConnectionFailed,
    StreamBroken,
    error_from_message,
    error_from_status,
)
from wavetrain_client.options import ChatPrompt, GenerationRequest, Prompt, SamplingOptions
from wavetrain_client.retry import RetryPolicy
from wavetrain_client.stream import StopRequest, StreamSession
from wavetrain_client.tokenization import (
    Tokenization,
    decode_text,
    decode_tokenization,
    decode_tokenizer_info,
    encode_detokenize,
    encode_tokenize,
    encode_tokenizer_info,
)
from wavetrain_client.wire import WireRequest

if TYPE_CHECKING:
    from typing_extensions import Unpack

STOP_TIMEOUT_S = 5.0
# What `read` of a call returns after its last message; grpc's types do not know it.
END_OF_CALL: Any = cast("Any", grpc.aio).EOF


class AsyncClient:
    """Talks to a Triton server that serves Wavetrain's models, from asyncio.

    Args:
        url: the server's gRPC address: `host:port`, or `grpcs://host:port` for TLS.
        max_retries: how often a request that the server refused as busy, or that found no server, is sent again.
        credentials: what TLS needs beyond the system's certificates.

    Raises:
        ValueError: the address has another form.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        max_retries: int = 2,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        self._address = Address.parse(url)
        self._retry_policy = RetryPolicy(max_retries)
        self._credentials = credentials
        self._loop: asyncio.AbstractEventLoop | None = None
        self._channel: grpc.aio.Channel | None = None
        self._stub: Any = None
        self._streams: weakref.WeakSet[AsyncChunkStream] = weakref.WeakSet()
        self._stops: set[asyncio.Task[None]] = set()
        self._is_closed = False

    async def generate(
        self,
        prompt: Prompt,
        *,
        model: str = "llm",
        timeout_s: float | None = None,
        priority: int | None = None,
        cache_salt: str | None = None,
        traceparent: str | None = None,
        request_id: str | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Generation:
        """Generates, and returns when all is there. Arguments as in `GenerationRequest` and `SamplingOptions`.

        Cancelling the task cancels the request.

        Raises:
            ClientError: one of its subclasses, by what went wrong.
            TypeError: an unknown option.
        """
        request = GenerationRequest(
            prompt=prompt,
            model=model,
            options=cast("dict[str, Any]", options),
            is_streaming=False,
            timeout_s=timeout_s,
            priority=priority,
            cache_salt=cache_salt,
            traceparent=traceparent,
            request_id=request_id,
        )
        async with self.open(request) as stream:
            return join_chunks(request.id, request.model, [chunk async for chunk in stream])

    def stream(
        self,
        prompt: Prompt,
        *,
        model: str = "llm",
        timeout_s: float | None = None,
        priority: int | None = None,
        cache_salt: str | None = None,
        traceparent: str | None = None,
        request_id: str | None = None,
        **options: Unpack[SamplingOptions],
    ) -> AsyncChunkStream:
        """Generates, and yields chunks as they come; the request is sent by the first `anext`.

        Closing the stream, leaving its `async with` block, dropping the last reference to it and cancelling the task
        that reads it all cancel the request.

        Raises:
            RequestRejected: here, what can be seen without the server. From `anext`: every ClientError.
            TypeError: an unknown option.
        """
        return self.open(
            GenerationRequest(
                prompt=prompt,
                model=model,
                options=cast("dict[str, Any]", options),
                timeout_s=timeout_s,
                priority=priority,
                cache_salt=cache_salt,
                traceparent=traceparent,
                request_id=request_id,
            )
        )

    async def tokenize(
        self, prompt: str | ChatPrompt, *, add_special_tokens: bool = True, timeout_s: float | None = None
    ) -> Tokenization:
        """Returns a prompt's token ids; `add_special_tokens` is about text, as a chat template has its own.

        Raises:
            ClientError: one of its subclasses, by what went wrong.
        """
        request = encode_tokenize(prompt, add_special_tokens=add_special_tokens)
        return decode_tokenization(await self._ask(request, timeout_s))

    async def tokenizer_info(self, *, timeout_s: float | None = None) -> dict[str, Any]:
        """Returns the named special tokens, the chat template and sizes, in the words of tokenizer_config.json.

        Raises:
            ClientError: one of its subclasses, by what went wrong.
        """
        return decode_tokenizer_info(await self._ask(encode_tokenizer_info(), timeout_s))

    async def detokenize(self, token_ids: Sequence[int], *, timeout_s: float | None = None) -> str:
        """Returns the text of token ids, without special tokens.

        Raises:
            ClientError: one of its subclasses, by what went wrong.
        """
        return decode_text(await self._ask(encode_detokenize(token_ids), timeout_s))

    async def is_ready(self, model: str | None = None, *, timeout_s: float = 5.0) -> bool:
        """Tells whether the server, and the model where one is named, answers and takes requests."""
        stub = self._connected()
        try:
            if not (await stub.server_ready(protocol.ServerReadyRequest(), timeout=timeout_s)).ready:
                return False
            if model is None:
                return True
            return bool((await stub.model_ready(protocol.ModelReadyRequest(name=model), timeout=timeout_s)).ready)
        except grpc.aio.AioRpcError:
            return False

    async def close(self) -> None:
        """Closes the connection; running requests are cancelled. Doing it twice does no harm."""
        if self._is_closed:
            return
        self._is_closed = True
        for stream in list(self._streams):
            stream.close()
        await asyncio.sleep(0)  # lets their cancels go out
        if self._stops:
            await asyncio.wait(self._stops, timeout=STOP_TIMEOUT_S)
        if self._channel is not None:
            await self._channel.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def open(self, request: GenerationRequest) -> AsyncChunkStream:
        """Does what `stream` does with a request that was made before."""
        self._check_open()
        session = StreamSession(request, url=self._address.target, retry_policy=self._retry_policy)
        stream = AsyncChunkStream(self, session)
        self._streams.add(stream)
        return stream

    async def _ask(self, request: WireRequest, timeout_s: float | None) -> Any:
        """One request, one response, by the stream RPC: cancelling a unary one can crash server 2.51."""
        call: Any = None
        try:
            call = self.start_call(request, timeout_s)
            answer = await call.read()
        except grpc.aio.AioRpcError as failure:
            code, details = failure.code().name, failure.details() or ""
            raise error_from_status(code, details, url=self._address.target, has_started=False) from None
        finally:
            if call is not None:
                call.cancel()
        if answer is END_OF_CALL:
            raise StreamBroken("the server ended the call without an answer")
        if answer.error_message:
            raise error_from_message(answer.error_message)
        return answer.infer_response

    def _check_open(self) -> None:
        if self._is_closed:
            raise ConnectionFailed("the client is closed; make a new one")

    def _connected(self) -> Any:
        """Returns the stub, made on first use because its channel belongs to the running loop."""
        self._check_open()
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
            self._channel = self._open_channel()
            self._stub = protocol.InferenceStub(self._channel)
        elif self._loop is not loop:
            raise RuntimeError("an AsyncClient belongs to the event loop it was first used in; make one for each loop")
        return self._stub

    def _open_channel(self) -> grpc.aio.Channel:
        if self._credentials is None and not self._address.is_secure:
            return grpc.aio.insecure_channel(self._address.target, options=CHANNEL_OPTIONS)
        credentials = self._credentials if self._credentials is not None else grpc.ssl_channel_credentials()
        return grpc.aio.secure_channel(self._address.target, credentials, options=CHANNEL_OPTIONS)

    def start_call(self, request: WireRequest, timeout_s: float | None) -> Any:
        """Opens a call with one request; for `AsyncChunkStream`."""
        return self._connected().stream_infer(request, timeout_s)

    def abandon(self, call: Any, stop_request: StopRequest | None) -> None:
        """Cancels a call and sends the stop request, if there is one, without waiting; for `AsyncChunkStream`.

        May be called in any thread and at any time, because a garbage collector may call it.
        """
        if call is None or self._loop is None or self._loop.is_closed():
            return
        with contextlib.suppress(RuntimeError):  # the loop was closed in this very moment
            self._loop.call_soon_threadsafe(self._abandon, call, stop_request)

    def _abandon(self, call: Any, stop_request: StopRequest | None) -> None:
        call.cancel()
        if stop_request is not None:
            stop = asyncio.ensure_future(self._send_stop(stop_request))
            self._stops.add(stop)
            stop.add_done_callback(self._stops.discard)

    async def _send_stop(self, stop_request: StopRequest) -> None:
        for delay_s in stop_request.delays_s:
            await asyncio.sleep(delay_s)
            # Whatever comes back, the caller has given the request up: an error would have nobody to tell.
            with contextlib.suppress(grpc.RpcError, grpc.aio.UsageError):
                async for _ in self._stub.stream_infer(stop_request.request, STOP_TIMEOUT_S):
                    pass


class AsyncChunkStream(AsyncIterator[Chunk]):
    """The chunks of one request, as an async iterator and context manager. Made by `AsyncClient.stream`."""

    def __init__(self, client: AsyncClient, session: StreamSession) -> None:
        self._client = client
        self._session = session
        self._call: Any = None
        self._chunks: deque[Chunk] = deque()
        self._is_done = False
        self._is_closed = False

    @property
    def request_id(self) -> str:
        """The request's id, as the server knows it."""
        return self._session.request.id

    async def __anext__(self) -> Chunk:
        """Waits for the next chunk.

        Raises:
            StopAsyncIteration: the request is finished, or the stream was closed.
            ClientError: what went wrong; the stream is over then.
        """
        while not self._chunks:
            if self._is_done:
                raise StopAsyncIteration
            await self._advance()
        return self._chunks.popleft()

    def close(self) -> None:
        """Cancels the request, if it still runs, without waiting for it; after that the stream is over."""
        self._is_closed = True
        self._chunks.clear()
        if not self._is_done:
            self._is_done = True
            self._client.abandon(self._call, self._session.stop_request)

    async def aclose(self) -> None:
        """Does what `close` does, in the form that `contextlib.aclosing` expects."""
        self.close()
        await asyncio.sleep(0)

    async def __aenter__(self) -> AsyncChunkStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        if hasattr(self, "_is_closed"):  # False where __init__ failed
            self.close()

    async def _advance(self) -> None:
        """Waits for one message of the server, or for the time before the next attempt."""
        try:
            self._chunks.extend(await self._pull())
        except ClientError as error:
            try:
                delay_s = self._session.retry_delay_s(error)
            except ClientError:
                self.close()
                raise
            self._call = None
            await self._wait_to_retry(delay_s)
        except asyncio.CancelledError:
            if self._is_closed and not _is_task_cancelled():
                raise _closed_while_read() from None
            self.close()
            raise
        except BaseException:
            self.close()
            raise

    async def _wait_to_retry(self, delay_s: float) -> None:
        try:
            await asyncio.sleep(delay_s)
        except asyncio.CancelledError:
            self.close()
            raise
        if self._is_closed:
            raise _closed_while_read()

    async def _pull(self) -> list[Chunk]:
        if self._call is None:
            request, timeout_s = self._session.start_attempt()
            self._call = self._client.start_call(request, timeout_s)
        try:
            answer = await self._call.read()
        except grpc.aio.AioRpcError as failure:
            raise self._session.fail(failure.code().name, failure.details() or "") from None
        if answer is END_OF_CALL:
            chunks = self._session.finish()
            self._is_done = True
            return chunks
        if answer.error_message:
            raise self._session.refuse(answer.error_message)
        return self._session.receive(answer.infer_response)


def _is_task_cancelled() -> bool:
    """True when the current task itself is being cancelled; Python 3.10 cannot tell, and the call's end is believed."""
    task = asyncio.current_task()
    cancelling = getattr(task, "cancelling", None)
    return cancelling is not None and cancelling() > 0


def _closed_while_read() -> Cancelled:
    return Cancelled("the stream was closed while it was read")
