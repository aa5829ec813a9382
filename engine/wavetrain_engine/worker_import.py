# SPDX-License-Identifier: Apache-2.0
"""The one import that brings torch in: late, when a model is to be loaded, and no slower than it must be."""

from __future__ import annotations

import gc
from collections.abc import Callable

from wavetrain_engine.facts import EngineFacts
from wavetrain_engine.plan import Executor


def import_worker() -> Callable[..., tuple[Executor, EngineFacts]]:
    """Imports the worker, and torch with it, and returns its `load_executor`.

    The garbage collector rests meanwhile: what a thousand modules make is there to stay, and looking through it over
    and over takes a fifth of the time (torch 2.13 alone: 1.4 s of processor time, 1.1 without).
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        from wavetrain_engine.worker.load import load_executor
    finally:
        if was_enabled:
            gc.enable()
    return load_executor
