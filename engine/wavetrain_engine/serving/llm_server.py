# SPDX-License-Identifier: Apache-2.0
"""The model `llm`: text in, text out, for clients of the legacy ensemble and of vLLM's backend alike."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from wavetrain_engine.errors import RequestError
from wavetrain_engine.facts import EngineFacts
from wavetrain_engine.sampling_params import SamplingParams, parse_json_object
from wavetrain_engine.serving.contracts import LLM
from wavetrain_engine.serving.generating_model import GeneratingModel
from wavetrain_engine.serving.generation import Generation
from wavetrain_engine.serving.live_request import Answer, live_sequences
from wavetrain_engine.serving.llm_prompt import MESSAGES_INPUT, TEMPLATE_TIMEOUT_S, LlmPrompts
from wavetrain_engine.serving.llm_writer import LlmWriter
from wavetrain_engine.serving.model_files import ModelFiles
from wavetrain_engine.serving.prompts import word_inputs
from wavetrain_engine.serving.request_parameters import RequestParameters
from wavetrain_engine.serving.row_inputs import (
    RowInputs,
    check_inputs,
    end_id_params,
    legacy_sampling_params,
    merge_params,
    read_row,
    vllm_sampling_params,
)
from wavetrain_engine.serving.tensors import RequestTensors
from wavetrain_engine.text.tokenizer import Tokenizer

_LOGGER = logging.getLogger(__name__)
_LEGACY_MARK = "max_tokens"


class LlmServer(GeneratingModel):
    """Decoupled, without a batch dimension."""

    _tokenizer: Tokenizer
    _facts: EngineFacts
    _defaults: SamplingParams
    _prompts: LlmPrompts
    _chats: ThreadPoolExecutor | None = None

    def start(self, files: ModelFiles) -> None:
        """Loads the tokenizer and the chat template, and attaches to the core."""
        self._tokenizer = files.require_tokenizer()
        template = files.load_chat_template(self._tokenizer, timeout_s=TEMPLATE_TIMEOUT_S)
        self._facts = self.attach(files)
        self._defaults = self._facts.generation.sampling_defaults()
        self._prompts = LlmPrompts(self._tokenizer, template, self._facts.max_model_len)
        # Triton starts all requests from one thread, which must not wait for a template: messages have their own.
        self._chats = ThreadPoolExecutor(max_workers=1, thread_name_prefix="chat-template")

    def execute(self, requests: Sequence[Any]) -> None:
        """Starts each request and returns; responses come from the thread that hears from the core."""
        for request in requests:
            if self._chats is not None and any(item.name() == MESSAGES_INPUT for item in request.inputs()):
                self._chats.submit(self.start_or_refuse, request)
            else:
                self.start_or_refuse(request)

    def finalize(self) -> None:
        """Ends the model, and the core if no other model needs it."""
        if self._chats is not None:
            self._chats.shutdown()
            self._prompts.close()
        super().finalize()

    def start_request(self, request: Any, generation: Generation) -> None:
        """Reads the request's tensors and starts its sequences."""
        tensors = RequestTensors(request, has_batch_dimension=False)
        inputs = read_row(tensors, LLM, 0)
        if inputs.options.stop:
            generation.stop(request)
            return
        check_inputs(tensors, LLM)
        prompt = self._prompts.read(tensors)
        parameters = RequestParameters.read(request)
        is_legacy = _LEGACY_MARK in inputs.sampling
        params = self._sampling_params(tensors, inputs, parameters, is_legacy=is_legacy)
        prompt_text = self._prompts.text_of(prompt) if _includes_prompt(inputs, is_legacy=is_legacy) else ""
        core_requests = generation.core_requests(
            prompt_token_ids=prompt.token_ids, params=params, parameters=parameters, tokenizer=self._tokenizer
        )

        def make_answer() -> Answer:
            sequences = live_sequences(
                core_requests, row=0, options=inputs.options, tokenizer=self._tokenizer, prompt_text=prompt_text
            )
            return Answer(sequences, LlmWriter(self._tokenizer, is_legacy=is_legacy))

        generation.run(request, core_requests, make_answer)

    def _sampling_params(
        self, tensors: RequestTensors, inputs: RowInputs, parameters: RequestParameters, *, is_legacy: bool
    ) -> SamplingParams:
        extra = merge_params(
            end_id_params(tensors.scalar("end_id", 0), self._facts.vocab_size),
            word_inputs(tensors, 0, self._tokenizer),
        )
        text = tensors.text("sampling_parameters", 0)
        if text is None:
            # As vLLM's backend: without the tensor, the request's own parameters are sampling parameters.
            given = {} if is_legacy else parameters.others
            if is_legacy:
                parameters.refuse_others()
        else:
            given = parse_json_object(text or "{}")
            parameters.refuse_others()
        if not is_legacy:
            return vllm_sampling_params(inputs, extra, given, self._defaults)
        legacy = legacy_sampling_params(inputs, extra)
        if not given:
            return legacy
        return vllm_sampling_params(inputs, extra, given, legacy)


def _includes_prompt(inputs: RowInputs, *, is_legacy: bool) -> bool:
    """Whether the prompt precedes the output's text, as each dialect has it."""
    options = inputs.options
    if options.stream:
        if not is_legacy and options.exclude_input is False:
            raise RequestError("exclude_input_in_output = false is not possible with stream; leave it out")
        return False
    return not options.exclude_input
