# SPDX-License-Identifier: Apache-2.0
"""Whether the compiled kernels can serve here, for tests of what only they promise."""

from __future__ import annotations

from wavetrain_engine.environment import Environment
from wavetrain_kernels.cpu.build import find_compiler
from wavetrain_kernels.cpu.instruction_set import available_levels


def are_compiled_kernels_to_be_had() -> bool:
    """True where an engine on the CPU takes them: they exist for its instruction set, and nobody chose others."""
    is_wanted = Environment.read().kernels in ("auto", "cpu")
    return is_wanted and bool(available_levels()) and find_compiler() is not None
