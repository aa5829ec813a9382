# SPDX-License-Identifier: Apache-2.0
"""The model `engine`: token ids in, token ids out. Without logic: everything is in wavetrain_engine.serving."""

from wavetrain_engine.serving.engine_server import EngineServer as TritonPythonModel

__all__ = ["TritonPythonModel"]
