# SPDX-License-Identifier: Apache-2.0
"""What `wavetrain serve` shows: a progress bar while loading, then lines.

Everything goes to standard error but the ready line, so that a script can wait for that on standard output. Bars are
drawn on terminals only; elsewhere each phase is one line.
"""

from __future__ import annotations

import sys
import threading

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

from wavetrain_cli.server_log import LoadProgress, LogLine

_STYLES = {"debug": "dim", "info": "default", "warning": "yellow", "error": "red"}


class Display:
    """Writes to the terminal from any thread."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self._lock = threading.Lock()
        self._progress: Progress | None = None
        self._phases: dict[str, TaskID | None] = {}

    def say(self, message: str) -> None:
        """Shows a line of the command's own."""
        self._console.print(f"wavetrain: {escape(message)}")

    def log(self, line: LogLine) -> None:
        """Shows a line of the server's log."""
        self._console.print(f"{line.origin}: {escape(line.text)}", style=_STYLES[line.level])

    def ready(self, message: str) -> None:
        """Ends the progress bar and writes the ready line to standard output."""
        self.stop_progress()
        print(f"wavetrain: ready {message}", file=sys.stdout, flush=True)

    def progress(self, update: LoadProgress) -> None:
        """Moves the phase's bar, or mentions the phase once where there is no terminal."""
        with self._lock:
            if not self._console.is_terminal:
                if update.phase not in self._phases:
                    self._phases[update.phase] = None
                    self.say(update.phase)
                return
            if self._progress is None:
                self._progress = _create_progress(self._console)
                self._progress.start()
            task = self._phases.get(update.phase)
            if task is None:
                task = self._phases[update.phase] = self._progress.add_task(escape(update.phase))
            self._progress.update(task, completed=update.done, total=max(update.total, 1))

    def stop_progress(self) -> None:
        """Removes the progress bar, if there is one; another start draws a new one."""
        with self._lock:
            if self._progress is not None:
                self._progress.stop()
            self._progress = None
            self._phases.clear()


def _create_progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )
