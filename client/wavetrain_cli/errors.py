# SPDX-License-Identifier: Apache-2.0
"""What ends a command before its work is done: one line for the person, one exit code for the script."""

from __future__ import annotations


class CommandError(Exception):
    """A person can fix this. `str(error)` is the whole message; the command ends with `exit_code`."""

    def __init__(self, message: str, *, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code
