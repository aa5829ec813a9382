# SPDX-License-Identifier: Apache-2.0
"""Client of Wavetrain's Triton models over gRPC: streaming, deadlines, retries, cancels. No torch, no engine.

with Client("127.0.0.1:8001") as client:
    for chunk in client.stream("def __init__(self", max_tokens=64):
        print(chunk.text, end="")
"""

from wavetrain_client.async_client import AsyncChunkStream, AsyncClient
from wavetrain_client.chunk import Chunk, FinishReason, GeneratedSequence, Generation, Logprob, PerfMetrics
from wavetrain_client.client import ChunkStream, Client
from wavetrain_client.errors import (
    Cancelled,
    ClientError,
    ConnectionFailed,
    DeadlineExceeded,
    RequestRejected,
    ServerBusy,
    ServerFailed,
    StreamBroken,
)
from wavetrain_client.options import ChatPrompt, GenerationRequest, Prompt, SamplingOptions
from wavetrain_client.retry import RetryPolicy
from wavetrain_client.tokenization import Tokenization

__all__ = [
    "AsyncChunkStream",
    "AsyncClient",
    "Cancelled",
    "ChatPrompt",
    "Chunk",
    "ChunkStream",
    "Client",
    "ClientError",
    "ConnectionFailed",
    "DeadlineExceeded",
    "FinishReason",
    "GeneratedSequence",
    "Generation",
    "GenerationRequest",
    "Logprob",
    "PerfMetrics",
    "Prompt",
    "RequestRejected",
    "RetryPolicy",
    "SamplingOptions",
    "ServerBusy",
    "ServerFailed",
    "StreamBroken",
    "Tokenization",
]
