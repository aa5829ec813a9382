# SPDX-License-Identifier: Apache-2.0
"""`python -m wavetrain_kernels.cpu.build_all FOLDER`: compiles the kernels for every level of this machine.

One JSON object a line on standard output, as each is done: level, error (null where it can be used).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from wavetrain_kernels.cpu.instruction_set import InstructionSet, available_levels
from wavetrain_kernels.cpu.kernels import build_library, kernels_of
from wavetrain_kernels.errors import BuildError


def main(folder: Path) -> None:
    """Compiles what is not there yet, and loads each library to see whether it can be used."""
    for level in available_levels():
        sys.stdout.write(json.dumps({"level": level.name, "error": _build(level, folder)}) + "\n")
        sys.stdout.flush()


def _build(level: InstructionSet, folder: Path) -> str | None:
    try:
        kernels_of(build_library(level, folder))
    except BuildError as error:
        return str(error)
    return None


if __name__ == "__main__":
    main(Path(sys.argv[1]))
