# SPDX-License-Identifier: Apache-2.0
"""Ownership of KV-cache blocks: who holds which block, and which may be reused.

This module moves integers around. It never sees a tensor and never imports torch, so the scheduler
above it can be fuzzed in milliseconds on any machine.

Invariants, checked by `BlockPool.check()` in tests and whenever the engine is idle:
    1. a block is either free or held, never both; held means ref_count > 0
    2. a hashed block is full, and its tokens do not change while the hash is set
    3. a hash leads to exactly one block, and that block has that hash
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping


class OutOfBlocks(Exception):
    """Too few blocks are free. Private to core: it triggers preemption and never reaches a caller."""

    def __init__(self, needed: int, free: int) -> None:
        super().__init__(f"{needed} blocks needed, {free} free")


class BlockPool:
    """Hands out cache blocks and takes them back.

    A freed block keeps its content and hash until someone else needs the space, so a later request with
    the same prefix can revive it. Hence the free list is a queue ordered by last use; a stack would
    destroy the most useful prefixes first. Blocks without a hash hold nothing of use and go first.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._ref_counts = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._block_by_hash: dict[bytes, int] = {}
        # An OrderedDict is a doubly linked list: a block is revived from its middle in O(1).
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        """Blocks nobody holds; some may still be in the prefix cache."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks somebody holds."""
        return self.num_blocks - len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks that `find` can return."""
        return len(self._block_by_hash)

    def allocate(self, num_blocks: int) -> list[int]:
        """Takes blocks off the free queue and forgets the prefixes they cached.

        Raises:
            OutOfBlocks: too few are free; nothing was taken.
        """
        free = self._free
        if num_blocks > len(free):
            raise OutOfBlocks(needed=num_blocks, free=len(free))
        block_ids: list[int] = []
        for _ in range(num_blocks):
            block_id, _none = free.popitem(last=False)
            self.forget(block_id)
            self._ref_counts[block_id] = 1
            block_ids.append(block_id)
        return block_ids

    def find(self, block_hash: bytes) -> int | None:
        """Returns the block that holds the content of this hash, held or free; None: no block does."""
        return self._block_by_hash.get(block_hash)

    def is_held(self, block_id: int) -> bool:
        """True where at least one request holds the block."""
        return self._ref_counts[block_id] > 0

    def share(self, block_ids: Iterable[int]) -> None:
        """Adds a holder to blocks that `find` returned; free ones are revived with their content."""
        for block_id in block_ids:
            if self._ref_counts[block_id] == 0:
                del self._free[block_id]
            self._ref_counts[block_id] += 1

    def free(self, block_ids: Iterable[int]) -> None:
        """Takes one holder off each block; those nobody holds any more queue up in the order given."""
        for block_id in block_ids:
            count = self._ref_counts[block_id] - 1
            if count < 0:
                raise RuntimeError(f"block {block_id} was freed twice")
            self._ref_counts[block_id] = count
            if count == 0:
                self._free[block_id] = None
                if self._hashes[block_id] is None:
                    self._free.move_to_end(block_id, last=False)

    def register(self, block_id: int, block_hash: bytes) -> None:
        """Makes a full, held block findable. Content another block has already stays with that block.

        Two equal blocks are not merged: block tables stay append-only, for the price of a rare duplicate.
        """
        if block_hash not in self._block_by_hash:
            self._block_by_hash[block_hash] = block_id
            self._hashes[block_id] = block_hash

    def forget(self, block_id: int) -> None:
        """Takes the block out of the prefix cache; whoever holds it keeps it."""
        block_hash = self._hashes[block_id]
        if block_hash is not None:
            self._hashes[block_id] = None
            del self._block_by_hash[block_hash]

    def check(self, num_holders: Mapping[int, int]) -> None:
        """Verifies the invariants against what the holders themselves say.

        Args:
            num_holders: block id to how many requests list it; unlisted blocks have none.

        Raises:
            RuntimeError: an invariant is broken; the message names the block.
        """
        for block_id, count in enumerate(self._ref_counts):
            if count != num_holders.get(block_id, 0):
                raise RuntimeError(f"block {block_id}: ref count {count}, {num_holders.get(block_id, 0)} holders")
            if (count == 0) != (block_id in self._free):
                raise RuntimeError(f"block {block_id}: ref count {count} contradicts the free queue")
            block_hash = self._hashes[block_id]
            if block_hash is not None and self._block_by_hash.get(block_hash) != block_id:
                raise RuntimeError(f"block {block_id}: its hash leads elsewhere")
        num_hashed = self.num_blocks - self._hashes.count(None)
        if num_hashed != len(self._block_by_hash):
            raise RuntimeError(f"{num_hashed} blocks have a hash, {len(self._block_by_hash)} are findable")
