# SPDX-License-Identifier: Apache-2.0
"""Blocks are held or free, keep their content for as long as possible, and are never given out twice."""

from __future__ import annotations

import pytest

from wavetrain_engine.core.block_pool import BlockPool, OutOfBlocks


def test_hands_out_each_block_once() -> None:
    pool = BlockPool(4)
    taken = pool.allocate(3) + pool.allocate(1)
    assert sorted(taken) == [0, 1, 2, 3]
    assert (pool.num_free, pool.num_used) == (0, 4)
    pool.check(dict.fromkeys(taken, 1))


def test_takes_nothing_when_too_few_are_free() -> None:
    pool = BlockPool(2)
    pool.allocate(1)
    with pytest.raises(OutOfBlocks, match="2 blocks needed, 1 free"):
        pool.allocate(2)
    assert pool.num_free == 1


def test_freed_content_is_found_until_the_block_is_needed() -> None:
    pool = BlockPool(3)
    (block_id,) = pool.allocate(1)
    pool.register(block_id, b"prefix")
    pool.free([block_id])
    pool.allocate(2)  # the two blocks that hold nothing go first
    assert pool.find(b"prefix") == block_id
    assert pool.allocate(1) == [block_id]
    assert pool.find(b"prefix") is None


def test_least_recently_freed_content_goes_first() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(3)
    for block_id in blocks:
        pool.register(block_id, bytes([block_id]))
    pool.free([blocks[1], blocks[2], blocks[0]])
    assert pool.allocate(2) == [blocks[1], blocks[2]]


def test_blocks_without_content_go_before_older_ones_with_content() -> None:
    pool = BlockPool(2)
    cached, plain = pool.allocate(2)
    pool.register(cached, b"prefix")
    pool.free([cached])
    pool.free([plain])
    assert pool.allocate(1) == [plain]


def test_reviving_from_the_middle_of_the_queue_keeps_the_rest_in_order() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(3)
    for block_id in blocks:
        pool.register(block_id, bytes([block_id]))
    pool.free(blocks)
    pool.share([blocks[1]])
    assert pool.is_held(blocks[1])
    pool.check({blocks[1]: 1})
    assert pool.allocate(2) == [blocks[0], blocks[2]]


def test_a_shared_block_is_free_when_the_last_holder_leaves() -> None:
    pool = BlockPool(1)
    (block_id,) = pool.allocate(1)
    pool.share([block_id])
    pool.free([block_id])
    assert pool.num_free == 0
    pool.free([block_id])
    assert pool.num_free == 1


def test_equal_content_stays_with_the_first_block() -> None:
    pool = BlockPool(2)
    first, second = pool.allocate(2)
    pool.register(first, b"same")
    pool.register(second, b"same")
    assert (pool.find(b"same"), pool.num_cached) == (first, 1)
    pool.forget(second)
    assert pool.find(b"same") == first
    pool.forget(first)
    assert pool.find(b"same") is None
    pool.check({first: 1, second: 1})


def test_freeing_twice_is_a_bug_of_ours_and_says_so() -> None:
    pool = BlockPool(1)
    blocks = pool.allocate(1)
    pool.free(blocks)
    with pytest.raises(RuntimeError, match="freed twice"):
        pool.free(blocks)


def test_check_finds_a_leak() -> None:
    pool = BlockPool(2)
    (block_id,) = pool.allocate(1)
    with pytest.raises(RuntimeError, match=f"block {block_id}: ref count 1, 0 holders"):
        pool.check({})
