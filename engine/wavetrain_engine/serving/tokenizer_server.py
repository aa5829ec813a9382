# SPDX-License-Identifier: Apache-2.0
"""The model `tokenizer`, first step of the ensemble: text to token ids.

It reports its own errors: in an ensemble they end the request before the engine has heard of it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # pyright: ignore[reportMissingImports]

from wavetrain_engine.errors import RequestError, WavetrainError
from wavetrain_engine.facts import EngineFacts
from wavetrain_engine.ipc.core_client import CoreClient
from wavetrain_engine.serving.error_codes import error_response
from wavetrain_engine.serving.llm_prompt import TEMPLATE_TIMEOUT_S, LlmPrompts
from wavetrain_engine.serving.model_files import ModelFiles
from wavetrain_engine.serving.prompts import bad_word_ids, biased_token_ids
from wavetrain_engine.serving.tensors import RequestTensors
from wavetrain_engine.serving.triton_model import TritonModel
from wavetrain_engine.text.chat_template import ChatTemplate
from wavetrain_engine.text.tokenizer import Tokenizer

_LOGGER = logging.getLogger(__name__)
_FINALIZE_TIMEOUT_S = 8.0


class TokenizerServer(TritonModel):
    """Not decoupled. Attaches to the core only to know how long a prompt may be."""

    _client: CoreClient | None = None
    _tokenizer: Tokenizer
    _facts: EngineFacts
    _prompts: LlmPrompts | None = None
    _info: bytes = b""

    def start(self, files: ModelFiles) -> None:
        """Loads the tokenizer and learns the engine's limits."""
        self._tokenizer = files.require_tokenizer()
        self._client = files.core_client(self.core_command)
        self._facts = self._client.start()
        template = files.load_chat_template(self._tokenizer, timeout_s=TEMPLATE_TIMEOUT_S)
        self._prompts = LlmPrompts(self._tokenizer, template, self._facts.max_model_len)
        self._info = _info(self._tokenizer, template, self._facts).encode()

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Tokenizes each request's rows."""
        return [self._respond(request) for request in requests]

    def finalize(self) -> None:
        """Leaves the core."""
        if self._client is not None:
            self._client.close(_FINALIZE_TIMEOUT_S)
        if self._prompts is not None:
            self._prompts.close()

    def _respond(self, request: Any) -> Any:
        try:
            return pb_utils.InferenceResponse(output_tensors=self._tokenize(request))
        except Exception as error:
            if not isinstance(error, WavetrainError):
                _LOGGER.exception("a prompt could not be tokenized")
            return error_response(error)

    def _tokenize(self, request: Any) -> list[Any]:
        tensors = RequestTensors(request, has_batch_dimension=True)
        if "text_input" not in tensors.names:
            raise RequestError("the input text_input is missing; send it with every request")
        if any(tensors.texts("decoder_text_input", row) for row in range(tensors.num_rows)):
            raise RequestError("decoder_text_input is not supported yet; leave it out")
        if self._prompts is None:
            raise RequestError("the model is not loaded")
        if tensors.scalar("return_tokenizer_info", 0):
            info = pb_utils.Tensor("tokenizer_info", np.full((tensors.num_rows, 1), self._info, dtype=np.object_))
        else:
            info = None
        prompts: list[list[int]] = []
        bad_words: list[list[list[int]]] = []
        biases: list[dict[int, float]] = []
        for row in range(tensors.num_rows):
            is_plain = tensors.scalar("add_special_tokens", row) is not False
            prompts.append(self._prompts.read(tensors, row, add_special_tokens=is_plain).token_ids)
            bad_words.append(bad_word_ids(tensors, row, self._tokenizer))
            biases.append(biased_token_ids(tensors, row, self._tokenizer))
        outputs = [
            pb_utils.Tensor("input_ids", _padded(prompts)),
            pb_utils.Tensor("input_lengths", np.array([[len(prompt)] for prompt in prompts], dtype=np.int32)),
            pb_utils.Tensor("bad_words_list", _word_lists(bad_words)),
            pb_utils.Tensor("embedding_bias", self._bias_rows(biases)),
            pb_utils.Tensor("max_model_len", np.full((len(prompts), 1), self._facts.max_model_len, dtype=np.int32)),
        ]
        return outputs if info is None else [*outputs, info]

    def _bias_rows(self, biases: list[dict[int, float]]) -> np.ndarray[Any, Any]:
        """[rows, vocab_size], or [rows, 0] where no row has a bias, as that is a lot to send."""
        width = self._facts.vocab_size if any(biases) else 0
        array = np.zeros((len(biases), width), dtype=np.float32)
        for row, bias in enumerate(biases):
            for token_id, value in bias.items():
                array[row, token_id] = value
        return array


def _info(tokenizer: Tokenizer, template: ChatTemplate | None, facts: EngineFacts) -> str:
    """What harnesses that tokenize by a server want to know of it, in the words of tokenizer_config.json."""
    return json.dumps(
        {
            # That of transformers which reads tokenizer.json alone, as is done here whatever a checkpoint names.
            "tokenizer_class": "PreTrainedTokenizerFast",
            **tokenizer.named_tokens,
            "chat_template": None if template is None else template.source,
            "model_max_length": facts.max_model_len,
            "vocab_size": tokenizer.vocab_size,
        }
    )


def _padded(rows: list[list[int]]) -> np.ndarray[Any, Any]:
    """[rows, longest]; what is beyond a row's length is 0 and never read."""
    array = np.zeros((len(rows), max(map(len, rows))), dtype=np.int32)
    for index, row in enumerate(rows):
        array[index, : len(row)] = row
    return array


def _word_lists(rows: list[list[list[int]]]) -> np.ndarray[Any, Any]:
    """TensorRT-LLM's word lists [rows, 2, longest]: all ids, padded with 0; where each word ends, padded with -1."""
    width = max((sum(map(len, words)) for words in rows), default=0)
    array = np.zeros((len(rows), 2, width), dtype=np.int32)
    array[:, 1, :] = -1
    for row, words in enumerate(rows):
        ids = [token_id for word in words for token_id in word]
        array[row, 0, : len(ids)] = ids
        array[row, 1, : len(words)] = np.cumsum([len(word) for word in words])
    return array
