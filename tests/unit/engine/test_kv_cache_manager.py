# SPDX-License-Identifier: Apache-2.0
"""Requests hold no more blocks than they need, and share exactly the prefixes that are equal and certain."""

from __future__ import annotations

from typing import Any

import pytest

from wavetrain_engine.core.block_pool import OutOfBlocks
from wavetrain_engine.core.kv_cache_manager import KVCacheManager
from wavetrain_engine.core.request_state import RequestState
from wavetrain_engine.request import EngineRequest
from wavetrain_engine.sampling_params import SamplingParams

BLOCK_SIZE = 4
_PROMPT = list(range(10))  # two full blocks and a half


def _manager(num_blocks: int = 8, *, is_caching: bool = True) -> KVCacheManager:
    return KVCacheManager(num_blocks=num_blocks, block_size=BLOCK_SIZE, is_caching=is_caching)


def _request(prompt: list[int], *, salt: str = "", index: int = 0, **params: Any) -> RequestState:
    request = EngineRequest(
        request_id=f"r{index}",
        prompt_token_ids=prompt,
        sampling_params=SamplingParams(**params),
        cache_salt=salt,
    )
    return RequestState(
        request,
        sampling_params=request.sampling_params,
        token_ids=prompt.copy(),
        index=index,
        max_num_tokens=100,
        eos_token_ids=frozenset(),
        arrival_time_ns=1,
    )


def _admit(manager: KVCacheManager, request: RequestState, *, num_spare_blocks: int = 0) -> int:
    """Admits with room for the whole prompt; returns how many tokens were cached."""
    prefix = manager.find_prefix(request)
    manager.admit(request, prefix, request.num_tokens, num_spare_blocks=num_spare_blocks)
    num_cached, request.num_computed_tokens = request.num_computed_tokens, request.num_tokens
    return num_cached


def _serve(manager: KVCacheManager, request: RequestState) -> None:
    _admit(manager, request)
    manager.commit(request, request.num_tokens)
    manager.release(request)


def test_room_grows_by_the_block_and_never_ahead() -> None:
    manager, request = _manager(), _request(_PROMPT)
    _admit(manager, request)
    assert len(request.block_ids) == 3
    assert manager.grow(request, 12) == []
    assert manager.grow(request, 13) == request.block_ids[3:]
    assert (request.num_slots, request.num_new_blocks) == (16, 4)


def test_growing_takes_nothing_when_it_does_not_fit() -> None:
    manager, request = _manager(3), _request(_PROMPT)
    _admit(manager, request)
    with pytest.raises(OutOfBlocks):
        manager.grow(request, 13)
    assert len(request.block_ids) == 3
    manager.check([request])


def test_an_equal_prefix_is_shared_while_held_and_after() -> None:
    manager = _manager()
    first, second, third = (_request(_PROMPT, index=index) for index in range(3))
    _admit(manager, first)
    manager.commit(first, 10)
    assert _admit(manager, second) == 8
    assert second.block_ids[:2] == first.block_ids[:2]
    manager.check([first, second])
    manager.release(first)
    manager.release(second)
    assert _admit(manager, third) == 8
    assert (third.num_reused_blocks, third.num_new_blocks) == (2, 1)


def test_the_last_token_is_always_computed() -> None:
    manager = _manager()
    _serve(manager, _request(_PROMPT[:8]))
    assert _admit(manager, _request(_PROMPT[:8], index=1)) == 4


def test_what_is_not_committed_is_not_found() -> None:
    manager = _manager()
    first = _request(_PROMPT)
    _admit(manager, first)
    manager.commit(first, 7)
    assert _admit(manager, _request(_PROMPT, index=1)) == 4


def test_a_different_token_ends_the_prefix() -> None:
    manager = _manager()
    _serve(manager, _request(_PROMPT))
    assert _admit(manager, _request([0, 1, 2, 3, 9, *_PROMPT[5:]], index=1)) == 4
    assert _admit(manager, _request([9, *_PROMPT[1:]], index=2)) == 0


def test_equal_blocks_after_different_prefixes_are_different() -> None:
    manager = _manager()
    _serve(manager, _request([1, 1, 1, 1, 5, 5, 5, 5, 0]))
    assert _admit(manager, _request([2, 2, 2, 2, 5, 5, 5, 5, 0], index=1)) == 0


def test_salts_share_nothing() -> None:
    manager = _manager()
    _serve(manager, _request(_PROMPT, salt="a"))
    assert _admit(manager, _request(_PROMPT, salt="b", index=1)) == 0
    assert _admit(manager, _request(_PROMPT, index=2)) == 0
    assert manager.find_prefix(_request(_PROMPT, salt="a", index=3)) != []


def test_output_tokens_are_cached_too() -> None:
    manager = _manager()
    first = _request(_PROMPT)
    _admit(manager, first)
    first.token_ids += [20, 21, 22]
    first.num_tokens += 3
    manager.commit(first, 12)
    assert _admit(manager, _request([*_PROMPT, 20, 21, 22], index=1)) == 12


def test_tails_are_evicted_before_heads() -> None:
    manager = _manager(4)
    _serve(manager, _request(_PROMPT[:9]))
    hog = _request([50] * 8, index=1)
    _admit(manager, hog)  # takes the two blocks that hold no prefix
    assert manager.find_prefix(_request(_PROMPT, index=2)) != []
    manager.grow(hog, 12)
    assert len(manager.find_prefix(_request(_PROMPT, index=3))) == 1


def test_prompt_logprobs_read_nothing_from_the_cache() -> None:
    manager = _manager()
    _serve(manager, _request(_PROMPT))
    assert _admit(manager, _request(_PROMPT, index=1, prompt_logprobs=0)) == 0


def test_without_caching_nothing_is_hashed_or_found() -> None:
    manager = _manager(is_caching=False)
    first = _request(_PROMPT)
    _serve(manager, first)
    assert first.block_hashes == []
    assert (manager.num_cached_blocks, manager.find_prefix(_request(_PROMPT, index=1))) == (0, [])


def test_a_tainted_request_takes_its_own_blocks_out_of_the_cache_only() -> None:
    manager = _manager()
    _serve(manager, _request(_PROMPT[:5]))
    bad = _request(_PROMPT, index=1)
    assert _admit(manager, bad) == 4
    manager.commit(bad, 8)
    manager.release(bad, is_tainted=True)
    assert len(manager.find_prefix(_request(_PROMPT, index=2))) == 1


def test_admission_counts_the_whole_prompt_and_what_must_stay_free() -> None:
    manager = _manager(4)
    request = _request(_PROMPT)
    with pytest.raises(OutOfBlocks):
        manager.admit(request, [], 4, num_spare_blocks=2)
    manager.admit(request, [], 4, num_spare_blocks=1)
    assert len(request.block_ids) == 1


def test_cached_blocks_that_are_free_count_as_taken_when_they_are_revived() -> None:
    manager = _manager(4)
    _serve(manager, _request(_PROMPT))
    hog = _request([50] * 4, index=1)
    _admit(manager, hog)
    again = _request(_PROMPT, index=2)
    with pytest.raises(OutOfBlocks):
        _admit(manager, again, num_spare_blocks=1)
    assert _admit(manager, again) == 8
    manager.check([hog, again])


def test_check_finds_blocks_held_ahead_of_need() -> None:
    manager, request = _manager(), _request(_PROMPT)
    _admit(manager, request)
    manager.grow(request, 16)
    with pytest.raises(RuntimeError, match="ahead of need"):
        manager.check([request])
