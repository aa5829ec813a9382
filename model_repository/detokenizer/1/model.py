# SPDX-License-Identifier: Apache-2.0
"""The model `detokenizer`: token ids to text. Without logic: everything is in wavetrain_engine.serving."""

from wavetrain_engine.serving.detokenizer_server import DetokenizerServer as TritonPythonModel

__all__ = ["TritonPythonModel"]
