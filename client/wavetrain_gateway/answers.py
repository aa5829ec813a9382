# SPDX-License-Identifier: Apache-2.0
"""The bodies of answers, whole and in pieces, as OpenAI's two APIs have them. Pure; no I/O."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from wavetrain_client import FinishReason
from wavetrain_gateway.errors import GatewayError, InternalError, RequestCancelled
from wavetrain_gateway.feed import FeedStats, News
from wavetrain_gateway.logprobs import Position, chat_logprobs, completion_logprobs
from wavetrain_gateway.plan import Plan

_dumps = json.JSONEncoder(separators=(",", ":")).encode
DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"


@dataclass(slots=True)
class GrowingText:
    """One generated sequence, as it grows.

    Attributes:
        num_chars: of the text that was shown, the echoed prompt included; where the next token's text begins.
    """

    prompt_index: int
    sequence_index: int
    text: list[str] = field(default_factory=list[str])
    positions: list[Position] = field(default_factory=list[Position])
    finish_reason: FinishReason | None = None
    cumulative_logprob: float = 0.0
    num_tokens: int = 0
    num_chars: int = 0
    is_shown: bool = False
    is_collected: bool = False


class Answer:
    """Collects a plan's news, and shows them piece by piece or as a whole.

    Args:
        answer_id: "cmpl-..." or "chatcmpl-...".
        created_s: seconds since the epoch.
        prompt_texts: what is echoed, for each prompt; empty where nothing is.
        is_kept: what is shown in pieces is also collected for `whole`.
    """

    def __init__(
        self, plan: Plan, answer_id: str, created_s: int, prompt_texts: Sequence[str] = (), *, is_kept: bool = True
    ) -> None:
        self._plan = plan
        self._is_kept = is_kept
        self._prompt_texts = prompt_texts
        self._sequences: dict[tuple[int, int], GrowingText] = {}
        self._running_usage: dict[str, Any] | None = None
        kind = "chat.completion" if plan.is_chat else "text_completion"
        self._whole_object = kind
        self._head = {
            "id": answer_id,
            "object": f"{kind}.chunk" if plan.is_chat else kind,
            "created": created_s,
            "model": plan.model,
        }
        # The same beginning for every chunk of a stream.
        self._head_text = _dumps(self._head)[:-1]

    def add(self, news: News) -> None:
        """Takes news of one sequence, for `whole`.

        Raises:
            GatewayError: the sequence was cancelled, or failed.
        """
        self._collect(self._sequence_of(news), news)

    def pieces(self, news: News, stats: FeedStats) -> list[str]:
        """Takes news of one sequence; returns the chunks, JSON texts, that tell them.

        Raises:
            GatewayError: the sequence was cancelled, or failed.
        """
        sequence = self._sequence_of(news)
        if self._is_kept:
            self._collect(sequence, news)
        self._running_usage = self.usage(stats) if self._plan.has_running_usage else None
        index = self._index_of(sequence)
        if self._plan.is_chat:
            return self._chat_pieces(index, sequence, news)
        return self._completion_pieces(index, sequence, news)

    def usage_piece(self, stats: FeedStats) -> str:
        """The chunk with the usage and no choices, which ends a stream that asks for it."""
        self._running_usage = self.usage(stats)
        return self._piece([])

    def usage(self, stats: FeedStats) -> dict[str, Any]:
        """`usage`: what the request has cost."""
        num_output = stats.num_output_tokens if self._plan.max_tokens else 0
        return {
            "prompt_tokens": stats.num_prompt_tokens,
            "completion_tokens": num_output,
            "total_tokens": stats.num_prompt_tokens + num_output,
            "prompt_tokens_details": {"cached_tokens": stats.num_cached_tokens},
        }

    def whole(self, stats: FeedStats) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        choices = [self._whole_choice(index, sequence) for index, sequence in enumerate(self._chosen())]
        body = {**self._head, "object": self._whole_object, "choices": choices, "usage": self.usage(stats)}
        return body | ({"system_fingerprint": None} if self._plan.is_chat else {})

    def finish_reasons(self) -> list[str]:
        """Why each sequence ended, for the log."""
        return [sequence.finish_reason or "error" for sequence in self._sequences.values()]

    def _sequence_of(self, news: News) -> GrowingText:
        key = (news.prompt_index, news.sequence_index)
        sequence = self._sequences.get(key)
        if sequence is None:
            sequence = self._sequences[key] = GrowingText(*key)
        if news.finish_reason is not None:
            sequence.finish_reason = news.finish_reason
            _check_reason(news.finish_reason)
        if news.cumulative_logprob is not None:
            sequence.cumulative_logprob = news.cumulative_logprob
        sequence.num_tokens += news.num_tokens
        return sequence

    def _collect(self, sequence: GrowingText, news: News) -> None:
        self._begin(sequence)
        if news.prompt_logprobs is not None:
            self._share_prompt_logprobs(news)
        if self._plan.max_tokens:
            sequence.text.append(news.text)
            sequence.positions += news.logprobs

    def _begin(self, sequence: GrowingText) -> None:
        if self._plan.is_echoed and not sequence.is_collected:
            sequence.text.append(self._prompt_texts[sequence.prompt_index])
        sequence.is_collected = True

    def _index_of(self, sequence: GrowingText) -> int:
        return sequence.prompt_index * self._plan.num_choices + sequence.sequence_index

    def _share_prompt_logprobs(self, news: News) -> None:
        """All sequences of a prompt echo it; the server tells of it once."""
        for number in range(self._plan.num_generated):
            key = (news.prompt_index, number)
            sequence = self._sequences.setdefault(key, GrowingText(*key))
            self._begin(sequence)
            sequence.positions[:0] = news.prompt_logprobs or []

    def _chosen(self) -> list[GrowingText]:
        """The sequences that are answered: of each prompt the best, where more were generated than asked for."""
        chosen: list[GrowingText] = []
        for prompt_index in range(len(self._plan.prompts)):
            of_prompt = [item for item in self._sequences.values() if item.prompt_index == prompt_index]
            of_prompt.sort(key=lambda item: item.sequence_index)
            if self._plan.num_generated > self._plan.num_choices:
                of_prompt.sort(key=lambda item: item.cumulative_logprob / max(1, item.num_tokens), reverse=True)
            chosen += of_prompt[: self._plan.num_choices]
        return chosen

    def _whole_choice(self, index: int, sequence: GrowingText) -> dict[str, Any]:
        text = "".join(sequence.text)
        num_top = self._plan.num_top
        reason = sequence.finish_reason if self._plan.max_tokens else "length"
        if self._plan.is_chat:
            logprobs = None if num_top is None else chat_logprobs(sequence.positions, num_top)
            message = {"role": "assistant", "content": text, "refusal": None}
            return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}
        logprobs = None if num_top is None else completion_logprobs(sequence.positions, num_top, 0)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _chat_pieces(self, index: int, sequence: GrowingText, news: News) -> list[str]:
        pieces: list[str] = []
        if not sequence.is_shown:
            sequence.is_shown = True
            pieces.append(self._chat_piece(index, {"role": "assistant", "content": ""}, None, None))
        if news.text or news.logprobs:
            num_top = self._plan.num_top
            logprobs = None if num_top is None else chat_logprobs(news.logprobs, num_top)
            pieces.append(self._chat_piece(index, {"content": news.text}, logprobs, None))
        if news.finish_reason is not None:
            pieces.append(self._chat_piece(index, {}, None, news.finish_reason))
        return pieces

    def _completion_pieces(self, index: int, sequence: GrowingText, news: News) -> list[str]:
        text, positions = (news.text, news.logprobs) if self._plan.max_tokens else ("", [])
        if self._plan.is_echoed and not sequence.is_shown:
            sequence.is_shown = True
            text = self._prompt_texts[news.prompt_index] + text
        if news.prompt_logprobs is not None and news.sequence_index == 0:
            positions = [*news.prompt_logprobs, *positions]
        if not text and not positions and news.finish_reason is None:
            return []
        num_top = self._plan.num_top
        logprobs = None if num_top is None else completion_logprobs(positions, num_top, sequence.num_chars)
        sequence.num_chars += len(text)
        reason = news.finish_reason and (news.finish_reason if self._plan.max_tokens else "length")
        return [self._piece([{"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}])]

    def _chat_piece(
        self, index: int, delta: dict[str, str], logprobs: dict[str, Any] | None, reason: FinishReason | None
    ) -> str:
        return self._piece([{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}])

    def _piece(self, choices: list[dict[str, Any]]) -> str:
        usage = {} if self._running_usage is None else {"usage": self._running_usage}
        return f"{self._head_text},{_dumps({'choices': choices, **usage})[1:]}"


def as_events(pieces: Iterable[str]) -> bytes:
    """Chunks as server-sent events."""
    return "".join([f"data: {piece}\n\n" for piece in pieces]).encode()


def error_event(error: GatewayError, request_id: str) -> bytes:
    """What ends a stream that failed; no [DONE] follows, so that nobody takes what came for the whole."""
    return f"event: error\ndata: {json.dumps(error.body(request_id))}\n\n".encode()


def _check_reason(reason: FinishReason) -> None:
    if reason == "cancelled":
        raise RequestCancelled("the request was cancelled")
    if reason == "error":
        raise InternalError("the engine failed on this request; its log says why")
