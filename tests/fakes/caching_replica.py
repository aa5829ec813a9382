# SPDX-License-Identifier: Apache-2.0
"""A fake replica whose prefix cache is real: the engine's own cache manager, over "tokens" of four letters each."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from typing import Any

from fakes.replicas import FakeReplica
from fakes.triton import ReceivedRequest, tensor_response
from wavetrain_engine.core.kv_cache_manager import KVCacheManager
from wavetrain_engine.core.request_state import RequestState
from wavetrain_engine.request import EngineRequest
from wavetrain_engine.sampling_params import SamplingParams


class CachingReplica(FakeReplica):
    """Answers with one token, and how many of the prompt's it found."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__(self._generate)
        self._manager = KVCacheManager(num_blocks=num_blocks, block_size=16, is_caching=True)
        self._numbers = itertools.count()

    async def _generate(self, request: ReceivedRequest) -> AsyncIterator[Any]:
        prompt = request.inputs["text_input"][0]
        token_ids = [int.from_bytes(prompt[at : at + 4], "big") for at in range(0, len(prompt), 4)]
        num_cached = self._serve(token_ids, request.parameters.get("cache_salt", ""))
        yield tensor_response(
            text_output=("BYTES", [1], ["x"]),
            finish_reason=("BYTES", [1], ["length"]),
            num_input_tokens=("UINT32", [1], [len(token_ids)]),
            num_output_tokens=("UINT32", [1], [1]),
            num_cached_tokens=("INT32", [1], [num_cached]),
        )

    def _serve(self, token_ids: list[int], salt: str) -> int:
        number = next(self._numbers)
        request = EngineRequest(
            request_id=f"r{number}", prompt_token_ids=token_ids, sampling_params=SamplingParams(), cache_salt=salt
        )
        state = RequestState(
            request,
            sampling_params=request.sampling_params,
            token_ids=token_ids.copy(),
            index=number,
            max_num_tokens=len(token_ids) + 1,
            eos_token_ids=frozenset(),
            arrival_time_ns=number,
        )
        prefix = self._manager.find_prefix(state)
        self._manager.admit(state, prefix, state.num_tokens, num_spare_blocks=0)
        num_cached, state.num_computed_tokens = state.num_computed_tokens, state.num_tokens
        self._manager.commit(state, state.num_tokens)
        self._manager.release(state)
        return num_cached
