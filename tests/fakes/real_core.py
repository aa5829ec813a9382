# SPDX-License-Identifier: Apache-2.0
"""An EngineCore on a real model runner over a tiny checkpoint: everything but processes and threads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wavetrain_engine.config import EngineConfig
from wavetrain_engine.core.engine_core import EngineCore
from wavetrain_engine.environment import Environment
from wavetrain_engine.request import EngineRequest, RequestUpdate, TokenLogprobs
from wavetrain_engine.sampling_params import SamplingParams
from wavetrain_engine.worker.load import load_executor


class RealCore:
    """Runs requests to their ends and keeps what it was told about each.

    Args:
        flags: engine options by name; what is not given is small.
    """

    def __init__(self, directory: Path, **flags: Any) -> None:
        small = {"device": "cpu", "num_blocks": 96, "block_size": 8, "max_num_seqs": 8, "max_num_batched_tokens": 128}
        self.config = EngineConfig.from_flags({"model": str(directory)} | small | flags)
        self.executor, self.facts = load_executor(self.config, environment=Environment.read())
        self.core = EngineCore(self.config, self.facts, self.executor)
        self.updates: dict[str, list[RequestUpdate]] = {}

    def add(self, request_id: str, prompt: list[int], **params: Any) -> None:
        """Adds a request, greedy unless told otherwise."""
        self.core.add_request(
            EngineRequest(
                request_id=request_id,
                prompt_token_ids=prompt,
                sampling_params=SamplingParams(**{"temperature": 0.0, "max_tokens": 12, "ignore_eos": True} | params),
            )
        )
        self.updates[request_id] = []

    def step(self) -> None:
        """Runs one step."""
        for update in self.core.step():
            self.updates[update.request_id].append(update)

    def run(self) -> None:
        """Steps until all requests have ended; then no block may be held."""
        while self.core.has_work:
            self.step()
        self.core.check()
        assert self.core.stats().num_blocks_used == 0

    def run_one(self, prompt: list[int], **params: Any) -> list[int]:
        """Runs a request alone and returns its tokens."""
        request_id = f"alone-{len(self.updates)}"
        self.add(request_id, prompt, **params)
        self.run()
        return self.tokens(request_id)

    def tokens(self, request_id: str) -> list[int]:
        """All output tokens of a request."""
        return [token_id for update in self.updates[request_id] for token_id in update.new_token_ids]

    def logprobs(self, request_id: str) -> list[TokenLogprobs]:
        """All log-probabilities of its output."""
        return [entry for update in self.updates[request_id] for entry in update.logprobs or []]

    def prompt_logprobs(self, request_id: str) -> list[list[TokenLogprobs]]:
        """Each delivery of its prompt's log-probabilities."""
        return [update.prompt_logprobs for update in self.updates[request_id] if update.prompt_logprobs is not None]

    def last(self, request_id: str) -> RequestUpdate:
        """The update that ended it."""
        return self.updates[request_id][-1]

    def close(self) -> None:
        """Shuts the executor down."""
        self.executor.shutdown()
