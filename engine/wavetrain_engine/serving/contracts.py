# SPDX-License-Identifier: Apache-2.0
"""What each input tensor of the models means: one table per contract, and nothing about a tensor elsewhere.

Every input that a config.pbtxt declares is in exactly one of its contract's columns; a contract test compares them.

    sampling    a sampling parameter, by its name in SamplingParams
    switches    a BOOL that says what the caller wants back, by its name in RowOptions
    refused     something we do not support, with the values that ask for nothing
    special     read by code, each for its own reason
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

# Refused whatever it holds.
NOTHING: tuple[float, ...] = ()
_OFF = (0.0,)

# Neutral values are TensorRT-LLM's defaults. A length penalty and the like only ever compare beams, of which there is
# one; so a value that asks for a difference is refused rather than dropped.
_REFUSED_EVERYWHERE: dict[str, tuple[float, ...]] = {
    "beam_width": (1.0,),
    "prompt_embedding_table": NOTHING,
    "prompt_vocab_size": _OFF,
    "lora_task_id": NOTHING,
    "lora_weights": NOTHING,
    "lora_config": NOTHING,
    "guided_decoding_guide_type": NOTHING,
    "guided_decoding_guide": NOTHING,
    "return_context_logits": _OFF,
    "return_generation_logits": _OFF,
}
_PENALTIES = {
    "temperature": "temperature",
    "repetition_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "seed": "seed",
    "min_tokens": "min_tokens",
    "min_length": "min_tokens",
    "num_return_sequences": "n",
}
_COUNTS = {
    "return_num_input_tokens": "return_num_input_tokens",
    "return_num_output_tokens": "return_num_output_tokens",
}
_LEGACY_SWITCHES = _COUNTS | {
    "exclude_input_in_output": "exclude_input",
    "return_log_probs": "return_log_probs",
    "return_perf_metrics": "return_perf_metrics",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Contract:
    """The inputs of one model. `required` are those without which there is no request."""

    required: tuple[str, ...]
    sampling: Mapping[str, str]
    switches: Mapping[str, str]
    refused: Mapping[str, tuple[float, ...]]
    special: frozenset[str]
    outputs: frozenset[str] = field(default=frozenset())

    @property
    def inputs(self) -> frozenset[str]:
        """The names of all inputs."""
        return frozenset((*self.sampling, *self.switches, *self.refused, *self.special))


# What the engine gives the ensemble's detokenizer: the tail and the ids it decodes, and which characters to keep.
DETOKENIZER_TAIL_IDS = "detokenizer_tail_ids"
DETOKENIZER_TOKEN_IDS = "detokenizer_token_ids"
DETOKENIZER_SPAN = "detokenizer_span"
# The one output of the engine that no ensemble can ask for: where it is asked for, all outputs are, which is what
# Triton does for a client that names none.
NEVER_MAPPED_OUTPUT = "context_phase_params"

ENGINE = Contract(
    required=("input_ids", "input_lengths", "request_output_len"),
    sampling=_PENALTIES | {"request_output_len": "max_tokens", "runtime_top_k": "top_k", "runtime_top_p": "top_p"},
    switches=_LEGACY_SWITCHES | {"streaming": "stream", "stop": "stop"},
    refused=_REFUSED_EVERYWHERE
    | {
        "encoder_input_features": NOTHING,
        "encoder_output_lengths": _OFF,
        "draft_input_ids": NOTHING,
        "decoder_input_ids": NOTHING,
        "decoder_input_lengths": _OFF,
        "draft_logits": NOTHING,
        "draft_acceptance_threshold": _OFF,
        "runtime_top_p_min": (0.0, 1e-6),
        "runtime_top_p_decay": (0.0, 1.0),
        "runtime_top_p_reset_ids": (-1.0,),
        "len_penalty": (0.0, 1.0),
        # A rule for when beams are done; with one beam both values mean the same.
        "early_stopping": (0.0, 1.0),
        "beam_search_diversity_rate": _OFF,
        "prompt_table_extra_ids": NOTHING,
        "cross_attention_mask": NOTHING,
        "mrope_rotary_cos_sin": NOTHING,
        "mrope_position_deltas": NOTHING,
        "context_phase_params": NOTHING,
        "skip_cross_attn_blocks": _OFF,
        "retention_token_range_starts": NOTHING,
        "retention_token_range_ends": NOTHING,
        "retention_token_range_priorities": NOTHING,
        "retention_token_range_durations_ms": NOTHING,
        "retention_decode_priority": NOTHING,
        "retention_decode_duration_ms": NOTHING,
        "lookahead_window_size": NOTHING,
        "lookahead_ngram_size": NOTHING,
        "lookahead_verification_set_size": NOTHING,
    },
    special=frozenset(
        {
            "input_ids",
            "input_lengths",
            "end_id",
            "pad_id",
            "stop_words_list",
            "bad_words_list",
            "embedding_bias",
            "stop_words",  # ours: the ensemble's stop words as they are, so that no word is changed on its way
        }
    ),
)

_ENSEMBLE_SAMPLING = _PENALTIES | {"max_tokens": "max_tokens", "top_k": "top_k", "top_p": "top_p"}
_ENSEMBLE_REFUSED = _REFUSED_EVERYWHERE | {
    "decoder_text_input": NOTHING,
    "length_penalty": (0.0, 1.0),
    "prompt_table_extra_id": NOTHING,
}
_ENSEMBLE_SPECIAL = frozenset(
    {"text_input", "end_id", "pad_id", "stop_words", "bad_words", "embedding_bias_words", "embedding_bias_weights"}
)

ENSEMBLE = Contract(
    required=("text_input", "max_tokens"),
    sampling=_ENSEMBLE_SAMPLING,
    switches=_LEGACY_SWITCHES | {"stream": "stream"},
    refused=_ENSEMBLE_REFUSED,
    special=_ENSEMBLE_SPECIAL,
)

LLM = Contract(
    required=("text_input",),
    sampling=_ENSEMBLE_SAMPLING,
    switches=_LEGACY_SWITCHES
    | {
        "stream": "stream",
        "stop": "stop",
        "return_finish_reason": "return_finish_reason",
        "return_cumulative_logprob": "return_cumulative_logprob",
        "return_logprobs": "return_logprobs",
    },
    refused=_ENSEMBLE_REFUSED | {"image": NOTHING, "embedding_request": NOTHING},
    # Ours: a prompt as token ids or as messages of a chat, each in place of text_input.
    special=_ENSEMBLE_SPECIAL | {"sampling_parameters", "input_ids", "messages", "template_variables"},
)
