# SPDX-License-Identifier: Apache-2.0
"""Which beginnings of prompts a replica has seen lately, and so probably has in its prefix cache.

A prompt's text is cut into chunks and hashed chunk by chunk, each hash over the one before it, as the engine hashes
its blocks of 16 tokens: equal hashes mean equal beginnings. One index stands for one replica's cache: it forgets what
was used longest ago, as the replica does. The Kubernetes Gateway API Inference Extension (proposal 0602, prefix cache
aware routing) and SGLang's router keep such books as well.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

CHUNK_CHARS = 64  # about 16 tokens of English, the engine's block
MAX_CHUNKS = 128
_HASH_BYTES = 8


def hash_prefix(text: str, salt: str = "") -> list[bytes]:
    """The hashes of a prompt's beginnings, shortest first; a last chunk that is not full has none.

    Args:
        text: the start of the prompt.
        salt: what keeps requests apart that do not share a prefix cache.
    """
    link = blake2b(salt.encode("utf-8", "surrogatepass"), digest_size=_HASH_BYTES).digest()
    hashes: list[bytes] = []
    for start in range(0, min(len(text), MAX_CHUNKS * CHUNK_CHARS) - CHUNK_CHARS + 1, CHUNK_CHARS):
        chunk = text[start : start + CHUNK_CHARS].encode("utf-8", "surrogatepass")
        link = blake2b(link + chunk, digest_size=_HASH_BYTES).digest()
        hashes.append(link)
    return hashes


class PrefixIndex:
    """The beginnings one replica has seen, up to a number of chunks.

    Args:
        max_chunks: what the replica's cache holds, roughly: its tokens through 16.
    """

    def __init__(self, max_chunks: int = 32_768) -> None:
        self._max_chunks = max_chunks
        self._hashes: OrderedDict[bytes, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._hashes)

    def match(self, hashes: Sequence[bytes]) -> int:
        """How many chunks of this beginning it has seen; changes nothing."""
        count = 0
        for link in hashes:
            if link not in self._hashes:
                break
            count += 1
        return count

    def add(self, hashes: Sequence[bytes]) -> None:
        """The replica was given this beginning."""
        # From the end, so that the shortest beginnings, which the most prompts share, are forgotten last.
        for link in reversed(hashes):
            self._hashes[link] = None
            self._hashes.move_to_end(link)
        while len(self._hashes) > self._max_chunks:
            self._hashes.popitem(last=False)

    def clear(self) -> None:
        """The replica has lost its cache."""
        self._hashes.clear()
