# SPDX-License-Identifier: Apache-2.0
"""What a front end tells the engine loop: the same structs in process and over IPC."""

from __future__ import annotations

import msgspec

from wavetrain_engine.request import EngineRequest


class Add(msgspec.Struct, frozen=True, array_like=True, tag="add"):
    """Run this request; its updates, the last with a finish reason, follow."""

    request: EngineRequest


class Cancel(msgspec.Struct, frozen=True, array_like=True, tag="cancel"):
    """End these requests now. Unknown and finished ids are no error: an end may cross a cancel."""

    request_ids: list[str]


class Shutdown(msgspec.Struct, frozen=True, array_like=True, tag="shutdown"):
    """End every unfinished request and leave the loop."""


Command = Add | Cancel | Shutdown
