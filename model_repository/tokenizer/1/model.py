# SPDX-License-Identifier: Apache-2.0
"""The model `tokenizer`: text to token ids. Without logic: everything is in wavetrain_engine.serving."""

from wavetrain_engine.serving.tokenizer_server import TokenizerServer as TritonPythonModel

__all__ = ["TritonPythonModel"]
