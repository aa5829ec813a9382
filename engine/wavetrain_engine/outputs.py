# SPDX-License-Identifier: Apache-2.0
"""What the offline API returns, in vLLM's shapes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from wavetrain_engine.errors import WavetrainError


@dataclass(frozen=True, slots=True)
class Logprob:
    """One token at one position.

    Attributes:
        rank: 1 for the likeliest token of the vocabulary.
        decoded_token: the token's text alone; None without a tokenizer.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionOutput:
    """One of the `n` sequences of a request.

    Attributes:
        token_ids: output tokens, the EOS or stop token that ended them included.
        cumulative_logprob: sum over `token_ids`; None where no logprobs were asked for.
        logprobs: one dict per token: the sampled token and the top-k ones, by token id.
        finish_reason: `stop`, `length`, `cancelled` or `error`; None while it runs.
        stop_reason: the stop string or the stop token's id; None for EOS and everything else.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    @property
    def is_finished(self) -> bool:
        """Whether it has ended."""
        return self.finish_reason is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """A request and what came of it, so far or as a whole.

    Attributes:
        prompt: its text; None where token ids were given.
        prompt_logprobs: None for the first token, then one dict per prompt token: that token and the
            top-k ones; None where they were not asked for or are not there yet.
        outputs: `n` of them, in order.
        num_cached_tokens: prompt tokens taken from the prefix cache; None until it is known.
        error: why a sequence ended with the finish reason `error`.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int | None = None
    error: WavetrainError | None = None

    def with_prompt(self, prompt: str | None) -> RequestOutput:
        """Returns a copy that shows this text as its prompt."""
        return replace(self, prompt=prompt)
