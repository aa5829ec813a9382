# SPDX-License-Identifier: Apache-2.0
"""The model `llm`: text in, text out. Without logic: everything is in wavetrain_engine.serving."""

from wavetrain_engine.serving.llm_server import LlmServer as TritonPythonModel

__all__ = ["TritonPythonModel"]
