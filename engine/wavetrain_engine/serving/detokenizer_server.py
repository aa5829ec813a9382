# SPDX-License-Identifier: Apache-2.0
"""The model `detokenizer`, last step of the ensemble: token ids to text, without state.

It never fails: a step that fails behind a decoupled one leaves its ensemble request in flight for ever (measured
with server 2.51). So ids that have no text give none, and the log says so.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import triton_python_backend_utils as pb_utils  # pyright: ignore[reportMissingImports]

from wavetrain_engine.serving.detokenizer_window import Window, unpack_windows, window_text
from wavetrain_engine.serving.model_files import ModelFiles
from wavetrain_engine.serving.tensors import RequestTensors, text_tensor
from wavetrain_engine.serving.triton_model import TritonModel
from wavetrain_engine.text.tokenizer import Tokenizer

_LOGGER = logging.getLogger(__name__)


class DetokenizerServer(TritonModel):
    """Not decoupled, and alone with the tokenizer: no core. Batched by the server, for speed."""

    _tokenizer: Tokenizer

    def start(self, files: ModelFiles) -> None:
        """Loads the tokenizer."""
        self._tokenizer = files.require_tokenizer()

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Decodes each request's windows."""
        return [
            pb_utils.InferenceResponse(
                output_tensors=[text_tensor("text_output", self._texts(request), has_batch_dimension=True)]
            )
            for request in requests
        ]

    def finalize(self) -> None:
        """Nothing to end."""

    def _texts(self, request: Any) -> list[list[str]]:
        """[rows, sequences]."""
        try:
            tensors = RequestTensors(request, has_batch_dimension=True)
            return [
                [window_text(self._tokenizer, window) for window in _read_windows(tensors, row)]
                for row in range(tensors.num_rows)
            ]
        except Exception:
            _LOGGER.exception("token ids could not be decoded; their text is left out")
            return [[""]]


def _read_windows(tensors: RequestTensors, row: int) -> list[Window]:
    """A caller other than the ensemble may send `token_ids` alone: then all of their text is wanted."""
    token_ids = tensors.token_ids("token_ids", row) or []
    windows = unpack_windows(tensors.token_ids("tail_ids", row) or [], token_ids, tensors.token_ids("span", row) or [])
    return windows or [Window(tail_ids=[], token_ids=token_ids, start=0, end=2**31 - 1, is_final=True)]
