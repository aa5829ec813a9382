# SPDX-License-Identifier: Apache-2.0
"""Which blocks a request holds, and which of them others may find.

Invariants:
    1. a request never holds a block it does not need yet: only its last block may be partly empty
    2. a block enters the prefix cache when it is full and its KV is certain (`commit`), never before
    3. a block table only grows; blocks found in the prefix cache stand at its front and are never written
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable

from wavetrain_engine.core.block_pool import BlockPool, OutOfBlocks
from wavetrain_engine.core.request_state import RequestState

_DIGEST_BYTES = 16  # a collision, which would leak one prompt's KV into another, costs 2**64 tries


class KVCacheManager:
    """Gives blocks to requests, and prefixes back to those that share them.

    The hash of a full block is blake2b(hash of the block before it, its tokens as int32); the salt's
    hash stands before the first block, so requests with different salts share nothing.
    """

    def __init__(self, *, num_blocks: int, block_size: int, is_caching: bool) -> None:
        self.block_size = block_size
        self.is_caching = is_caching
        self._pool = BlockPool(num_blocks)

    @property
    def num_blocks(self) -> int:
        """All blocks there are."""
        return self._pool.num_blocks

    @property
    def num_used_blocks(self) -> int:
        """Blocks that requests hold."""
        return self._pool.num_used

    @property
    def num_cached_blocks(self) -> int:
        """Blocks in the prefix cache, held or free."""
        return self._pool.num_cached

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold this many tokens."""
        return -(-num_tokens // self.block_size)

    def may_read_cache(self, request: RequestState) -> bool:
        """False where the request has to compute its whole prompt.

        That is while its prompt log-probabilities are wanted: they need the logits of every prompt token.
        """
        return self.is_caching and request.prompt_logprobs is None

    def find_prefix(self, request: RequestState) -> list[int]:
        """Returns the blocks of the longest cached prefix; takes none of them.

        The last token is never part of it: its logits are needed, so it has to be computed.
        """
        if not self.may_read_cache(request):
            return []
        num_full_blocks = (request.num_tokens - 1) // self.block_size
        self._extend_hashes(request, num_full_blocks)
        block_ids: list[int] = []
        for block_hash in request.block_hashes[:num_full_blocks]:
            block_id = self._pool.find(block_hash)
            if block_id is None:
                break
            block_ids.append(block_id)
        return block_ids

    def admit(self, request: RequestState, prefix: list[int], num_tokens: int, *, num_spare_blocks: int) -> None:
        """Gives a request without blocks its cached prefix, and room for its first `num_tokens` tokens.

        Args:
            prefix: from `find_prefix`, with nothing in between.
            num_spare_blocks: free blocks that must be left once *all* known tokens have their room. Admitting
                what has room for its first chunk only would fill the pool with prompts that preempt each other.

        Raises:
            OutOfBlocks: it does not fit; nothing was taken.
        """
        num_held = sum(map(self._pool.is_held, prefix))
        needed = self.num_blocks_for(request.num_tokens) - num_held + num_spare_blocks
        if needed > self._pool.num_free:
            raise OutOfBlocks(needed=needed, free=self._pool.num_free)
        self._pool.share(prefix)  # before allocating, which could take a free block of the prefix
        request.block_ids = prefix.copy()
        request.num_slots = len(prefix) * self.block_size
        request.num_computed_tokens = request.num_slots
        request.num_committed_blocks = request.num_reused_blocks_now = len(prefix)
        request.num_reused_blocks += len(prefix)
        self.grow(request, num_tokens)

    def grow(self, request: RequestState, num_tokens: int) -> list[int]:
        """Makes room for the request's first `num_tokens` tokens and returns the blocks it took for that.

        Raises:
            OutOfBlocks: too few are free; nothing was taken.
        """
        num_new_blocks = self.num_blocks_for(num_tokens) - len(request.block_ids)
        if num_new_blocks <= 0:
            return []
        block_ids = self._pool.allocate(num_new_blocks)
        request.block_ids += block_ids
        request.num_slots += num_new_blocks * self.block_size
        request.num_new_blocks += num_new_blocks
        return block_ids

    def commit(self, request: RequestState, num_tokens: int) -> None:
        """Offers the full blocks among the first `num_tokens` tokens to the prefix cache.

        The caller knows that their KV is written and finite, and that the tokens are final.
        """
        num_full_blocks = num_tokens // self.block_size
        if not self.is_caching or num_full_blocks <= request.num_committed_blocks:
            return
        self._extend_hashes(request, num_full_blocks)
        for position in range(request.num_committed_blocks, num_full_blocks):
            self._pool.register(request.block_ids[position], request.block_hashes[position])
        request.num_committed_blocks = num_full_blocks

    def release(self, request: RequestState, *, is_tainted: bool = False) -> None:
        """Takes all blocks from the request, the tail first, so that heads of prefixes stay longest.

        Args:
            is_tainted: the request's KV turned out bad; what it wrote itself leaves the prefix cache.
        """
        if is_tainted:
            for block_id in request.block_ids[request.num_reused_blocks_now :]:
                self._pool.forget(block_id)
        self._pool.free(reversed(request.block_ids))
        request.block_ids = []
        request.num_slots = 0
        request.num_computed_tokens = 0
        request.num_committed_blocks = request.num_reused_blocks_now = 0

    def check(self, requests: Iterable[RequestState]) -> None:
        """Verifies that these requests hold exactly the blocks that are held.

        Raises:
            RuntimeError: a block leaked, or an invariant of the pool is broken.
        """
        num_holders: Counter[int] = Counter()
        for request in requests:
            num_holders.update(request.block_ids)
            if request.num_slots != len(request.block_ids) * self.block_size:
                raise RuntimeError(f"request {request.request_id}: {request.num_slots} slots contradict its blocks")
            if len(request.block_ids) > self.num_blocks_for(request.num_computed_tokens):
                raise RuntimeError(f"request {request.request_id} holds blocks ahead of need")
        self._pool.check(num_holders)

    def _extend_hashes(self, request: RequestState, num_blocks: int) -> None:
        hashes = request.block_hashes
        if len(hashes) >= num_blocks:
            return
        tokens = array("i", request.token_ids[len(hashes) * self.block_size : num_blocks * self.block_size]).tobytes()
        num_block_bytes = len(tokens) // (num_blocks - len(hashes))
        parent = hashes[-1] if hashes else _hash(request.cache_salt.encode("utf-8", "surrogatepass"), person=b"salt")
        for start in range(0, len(tokens), num_block_bytes):
            parent = _hash(parent + tokens[start : start + num_block_bytes])
            hashes.append(parent)


def _hash(content: bytes, *, person: bytes = b"block") -> bytes:
    return hashlib.blake2b(content, digest_size=_DIGEST_BYTES, person=person).digest()
