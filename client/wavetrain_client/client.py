# SPDX-License-Identifier: Apache-2.0
"""The blocking shell around `StreamSession`: opens calls, waits, cancels. One gRPC call per request on one channel.

A `Client` may be used from any number of threads at once; a `ChunkStream` by one thread at a time, but any thread may
close it. Works under gevent too, once `grpc.experimental.gevent.init_gevent()` was called.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

import grpc

from wavetrain_client import protocol
from wavetrain_client.channel import CHANNEL_OPTIONS, DEFAULT_URL, Address
from wavetrain_client.chunk import Chunk, Generation, join_chunks
from wavetrain_client.errors import Cancelled, ClientError, ConnectionFailed
from wavetrain_client.options import GenerationRequest, Prompt, SamplingOptions
from wavetrain_client.retry import RetryPolicy
from wavetrain_client.stream import StopRequest, StreamSession
from wavetrain_client.wire import WireRequest

if TYPE_CHECKING:
    from typing_extensions import Unpack

STOP_TIMEOUT_S = 5.0


class Client:
    """Talks to a Triton server that serves Wavetrain's models.

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
        address = Address.parse(url)
        self._target = address.target
        self._retry_policy = RetryPolicy(max_retries)
        if address.is_secure or credentials is not None:
            credentials = credentials if credentials is not None else grpc.ssl_channel_credentials()
            self._channel: Any = grpc.secure_channel(address.target, credentials, options=CHANNEL_OPTIONS)
        else:
            self._channel = grpc.insecure_channel(address.target, options=CHANNEL_OPTIONS)
        self._stub = protocol.InferenceStub(self._channel)
        self._lock = threading.Lock()  # guards the weak set, which must not grow while it is read
        self._streams: weakref.WeakSet[ChunkStream] = weakref.WeakSet()
        self._stops: set[threading.Thread] = set()
        self._is_closed = False

    def generate(
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
        with self._open(request) as stream:
            return join_chunks(request.id, request.model, stream)

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
    ) -> ChunkStream:
        """Generates, and yields chunks as they come; the request is sent by the first `next`.

        Closing the stream, leaving its `with` block or dropping the last reference to it cancels the request.

        Raises:
            RequestRejected: here, what can be seen without the server. From `next`: every ClientError.
            TypeError: an unknown option.
        """
        return self._open(
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

    def is_ready(self, model: str | None = None, *, timeout_s: float = 5.0) -> bool:
        """Tells whether the server, and the model where one is named, answers and takes requests."""
        self._check_open()
        try:
            if not self._stub.server_ready(protocol.ServerReadyRequest(), timeout=timeout_s).ready:
                return False
            if model is None:
                return True
            return bool(self._stub.model_ready(protocol.ModelReadyRequest(name=model), timeout=timeout_s).ready)
        except grpc.RpcError:
            return False

    def close(self) -> None:
        """Closes the connection; running requests are cancelled. Doing it twice does no harm."""
        if self._is_closed:
            return
        self._is_closed = True
        with self._lock:
            streams = list(self._streams)
        for stream in streams:
            stream.close()
        for stop in list(self._stops):
            stop.join(STOP_TIMEOUT_S)
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self, request: GenerationRequest) -> ChunkStream:
        self._check_open()
        stream = ChunkStream(self, StreamSession(request, url=self._target, retry_policy=self._retry_policy))
        with self._lock:
            self._streams.add(stream)
        return stream

    def _check_open(self) -> None:
        if self._is_closed:
            raise ConnectionFailed("the client is closed; make a new one")

    def start_call(self, request: WireRequest, timeout_s: float | None) -> Any:
        """Opens a call with one request; for `ChunkStream`."""
        self._check_open()
        return self._stub.stream_infer(request, timeout_s)

    def abandon(self, call: Any, stop_request: StopRequest | None) -> None:
        """Cancels a call and sends the stop request, if there is one, without waiting; for `ChunkStream`."""
        if call is not None:
            call.cancel()
        if stop_request is None or sys.is_finalizing():  # a thread begun now would never run, nor start() return
            return
        stop = threading.Thread(target=self._send_stop, args=(stop_request,), name="wavetrain-stop", daemon=True)
        self._stops.add(stop)
        try:
            stop.start()
        except RuntimeError:  # no new threads while the interpreter shuts down
            self._stops.discard(stop)

    def _send_stop(self, stop_request: StopRequest) -> None:
        for delay_s in stop_request.delays_s:
            time.sleep(delay_s)
            # Whatever comes back, the caller has given the request up: an error would have nobody to tell.
            with contextlib.suppress(grpc.RpcError, ValueError):
                deque(self._stub.stream_infer(stop_request.request, STOP_TIMEOUT_S), maxlen=0)
        self._stops.discard(threading.current_thread())


class ChunkStream(Iterator[Chunk]):
    """The chunks of one request, as an iterator and a context manager. Made by `Client.stream`."""

    def __init__(self, client: Client, session: StreamSession) -> None:
        self._client = client
        self._session = session
        self._call: Any = None
        self._chunks: deque[Chunk] = deque()
        self._is_done = False
        self._closed = threading.Event()

    @property
    def request_id(self) -> str:
        """The request's id, as the server knows it."""
        return self._session.request.id

    def __next__(self) -> Chunk:
        """Waits for the next chunk.

        Raises:
            StopIteration: the request is finished, or the stream was closed.
            ClientError: what went wrong; the stream is over then.
        """
        while not self._chunks:
            if self._is_done:
                raise StopIteration
            self._advance()
        return self._chunks.popleft()

    def close(self) -> None:
        """Cancels the request, if it still runs; after that the stream is over."""
        self._closed.set()
        self._chunks.clear()
        if not self._is_done:
            self._is_done = True
            self._client.abandon(self._call, self._session.stop_request)

    def __enter__(self) -> ChunkStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_closed"):  # False where __init__ failed
            self.close()

    def _advance(self) -> None:
        """Waits for one message of the server, or for the time before the next attempt."""
        try:
            self._chunks.extend(self._pull())
        except ClientError as error:
            try:
                delay_s = self._session.retry_delay_s(error)
            except ClientError:
                self.close()
                raise
            self._call = None
            if self._closed.wait(delay_s):
                raise _closed_while_read() from None
        except BaseException:  # KeyboardInterrupt: the reader is gone, so is the request
            self.close()
            raise

    def _pull(self) -> list[Chunk]:
        if self._call is None:
            request, timeout_s = self._session.start_attempt()
            self._call = self._client.start_call(request, timeout_s)
        try:
            message = next(self._call)
        except StopIteration:
            chunks = self._session.finish()
            self._is_done = True
            return chunks
        except grpc.RpcError as error:
            if self._closed.is_set():
                raise _closed_while_read() from None
            status = cast("Any", error)
            raise self._session.fail(status.code().name, status.details() or "") from None
        if message.error_message:
            raise self._session.refuse(message.error_message)
        return self._session.receive(message.infer_response)


def _closed_while_read() -> Cancelled:
    return Cancelled("the stream was closed while it was read")
