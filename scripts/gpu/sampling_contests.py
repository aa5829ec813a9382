# SPDX-License-Identifier: Apache-2.0
"""Sampling for 256 rows of a vocabulary of 128k, beside torch and FlashInfer. The floor is reading the logits once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gpu.contest import Calls, Contest
from gpu.timing import num_sets
from wavetrain_kernels import ops

# N = rows, V = vocabulary size.

_TOP_K, _TOP_P, _MIN_P = 50, 0.9, 0.01


@dataclass
class Buffers:
    """One set of inputs: logits as float32, as the output head leaves them, with a few likely tokens in each row."""

    logits: Tensor
    seeds: Tensor
    positions: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor

    @classmethod
    def random(cls, num_rows: int, vocab_size: int, device: torch.device) -> Buffers:
        """Draws inputs."""
        rows = torch.arange(num_rows, device=device)
        return cls(
            logits=torch.randn(num_rows, vocab_size, device=device) * 3,
            seeds=rows * 7919,
            positions=rows + 100,
            temperature=torch.full((num_rows,), 0.8, device=device),
            top_k=torch.full((num_rows,), min(_TOP_K, vocab_size), device=device),
            top_p=torch.full((num_rows,), _TOP_P, device=device),
            min_p=torch.full((num_rows,), _MIN_P, device=device),
        )

    def greedy(self) -> Tensor:
        """Ours, the likeliest token."""
        return ops.sample_greedy(self.logits)[0]

    def plain(self) -> Tensor:
        """Ours, from the whole distribution."""
        return ops.sample(self.logits, self.seeds, self.positions, self.temperature)[0]

    def filtered(self) -> Tensor:
        """Ours, with all three filters."""
        lowest = ops.filter_thresholds(
            self.logits, self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p
        )
        return ops.sample(self.logits, self.seeds, self.positions, self.temperature, lowest)[0]

    def plain_by_torch(self) -> Tensor:
        """Softmax, then the exponential race."""
        shares = torch.softmax(self.logits / self.temperature[:, None], dim=-1)
        return (shares / torch.empty_like(shares).exponential_()).argmax(dim=-1)

    def filtered_by_torch(self) -> Tensor:
        """By a full sort, as most engines without a kernel for it."""
        values, ids = (self.logits / self.temperature[:, None]).sort(dim=-1, descending=True)
        places = torch.arange(values.shape[1], device=values.device)
        values = values.masked_fill(places >= self.top_k[:, None], -torch.inf)
        shares = torch.softmax(values, dim=-1)
        is_out = (shares.cumsum(-1) - shares >= self.top_p[:, None]) | (shares < shares[:, :1] * self.min_p[:, None])
        shares = shares.masked_fill(is_out, 0.0)
        return ids.gather(1, (shares / torch.empty_like(shares).exponential_()).argmax(-1, keepdim=True))[:, 0]

    def by_flashinfer(self) -> Tensor:
        """Rejection sampling with top-k and top-p; it knows no min-p together with them."""
        import flashinfer  # pyright: ignore[reportMissingImports]

        shares = torch.softmax(self.logits / self.temperature[:, None], dim=-1)
        return flashinfer.sampling.top_k_top_p_sampling_from_probs(shares, self.top_k.int(), self.top_p)

    def share_outside(self, token_ids: Tensor) -> float:
        """Returns the share of drawn ids that the filters leave out: 0 where all is right."""
        shares = torch.softmax(self.logits.double() / self.temperature[:, None].double(), dim=-1)
        drawn = shares.gather(1, token_ids.long()[:, None])
        allowed = shares.topk(min(_TOP_K, shares.shape[1]), dim=-1).values
        return float((drawn < allowed[:, -1:]).double().mean())


def sampling_contests(device: torch.device, *, is_dry_run: bool) -> Iterator[Contest]:
    """Yields the contests of sampling, over one lot of buffers."""
    num_rows, vocab_size = (3, 130) if is_dry_run else (256, 128 * 1024)
    num_bytes = num_rows * vocab_size * 4
    sets = [Buffers.random(num_rows, vocab_size, device) for _ in range(num_sets(num_bytes, device))]
    first, case = sets[0], f"{num_rows} x {vocab_size}"

    def not_likeliest(token_ids: Tensor) -> float:
        return float((token_ids != first.logits.argmax(dim=-1)).double().mean())

    def outside(token_ids: Tensor) -> float:
        return float(((token_ids < 0) | (token_ids >= vocab_size)).double().mean())

    argmax: Calls = [lambda one=one: one.logits.argmax(dim=-1) for one in sets]
    yield Contest("greedy", case, num_bytes, 0, [s.greedy for s in sets], not_likeliest, 0, {"torch": lambda: argmax})
    yield Contest(
        *("sampling", case, num_bytes, 0, [one.plain for one in sets], outside, 0),
        {"torch": lambda: [one.plain_by_torch for one in sets]},
    )
    yield Contest(
        *("sampling, top-k, top-p, min-p", case, num_bytes, 0, [one.filtered for one in sets], first.share_outside, 0),
        {
            "torch, full sort": lambda: [one.filtered_by_torch for one in sets],
            "flashinfer": lambda: [one.by_flashinfer for one in sets],
        },
    )
