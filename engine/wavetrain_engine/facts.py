# SPDX-License-Identifier: Apache-2.0
"""What is found out at load, once, and never configured: EngineFacts."""

from __future__ import annotations

import msgspec

from wavetrain_engine.generation_config import GenerationConfig


class EngineFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The loaded engine, as front ends and logs need to know it.

    Attributes:
        cpu_threads: threads that compute; on a GPU what little is left for the CPU.
        kernels: which kernel set answers `wavetrain_kernels.ops` on the device.
        num_blocks: blocks of the KV cache; `num_blocks * block_size / max_model_len` requests of full
            length fit at once.
        kv_cache_dtype: what those hold: bfloat16, float16, float32, fp8_e4m3 or int8.
    """

    architecture: str
    dtype: str
    device: str
    cpu_threads: int
    kernels: str
    vocab_size: int
    max_model_len: int
    block_size: int
    num_blocks: int
    kv_cache_dtype: str
    kv_cache_bytes: int
    weight_bytes: int
    max_num_seqs: int
    max_num_batched_tokens: int
    generation: GenerationConfig
    load_s: float
    version: str

    @property
    def max_concurrency(self) -> float:
        """How many requests of max_model_len tokens the KV cache holds."""
        return self.num_blocks * self.block_size / self.max_model_len
