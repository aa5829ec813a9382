# SPDX-License-Identifier: Apache-2.0
"""What the Triton server and its models write, made readable: levels, progress, noise, and the cause of a failure.

Every line goes unchanged into the log file. On the terminal, Triton's own lines lose their time stamp and place, and
its info lines are left out; what the engine itself says at info level is shown.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import IO, Any, Literal, cast

Level = Literal["debug", "info", "warning", "error"]

# The engine's processes log in Triton's own format; their places are Python files.
_LINE = re.compile(r"(?P<level>[DIWEFC])\d{4} [\d:.]+ \d+ (?P<file>\S+):\d+\] ?(?P<text>.*)")
_LEVELS: dict[str, Level] = {
    "D": "debug",
    "I": "info",
    "W": "warning",
    "E": "error",
    "F": "error",
    "C": "error",
}
_PROGRESS = "wavetrain-progress "
# Said by every 2.51 without an NVIDIA driver; none of it matters to a model that runs on the CPU.
_NO_GPU_NOISE = re.compile(
    r"CUDA driver version|CudaDriverHelper|CUDA memory pool|NVML|DCGM|nvidia-smi|pinned system memory"
)
# An idle connection that a client keeps open, at the end of a drained server.
_EXPECTED = re.compile(r"failed to stop server: .*Exit timeout expired")
_LOAD_FAILURE = re.compile(
    r"failed to load '(?P<model>[^']+)' version \d+: (?:Internal|Invalid argument|\w+): (?P<cause>.*)"
)
_EXCEPTION_NAME = re.compile(r"^(?:[A-Za-z_][\w.]*(?:Error|Exception|Exit)|[A-Z]\w+): ")
_CODE_WORD = re.compile(r"^(?:invalid|not_found|busy|cancelled|deadline|dead|internal): ")


@dataclass(frozen=True, slots=True)
class LogLine:
    """One line, without what only a log file needs. `origin` is who wrote it; `output` is what no logger formatted."""

    origin: Literal["triton", "engine", "output"]
    level: Level
    text: str


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """How far a start is: `done` of `total` units of the phase's own kind (bytes, layers)."""

    phase: str
    done: int
    total: int


def parse_line(raw: str) -> LogLine | LoadProgress | None:
    """Reads one line of the server's output; None for blank lines and the tables Triton draws."""
    line = raw.strip()
    if not line or line[0] in "+|":
        return None
    if line.startswith(_PROGRESS):
        return _parse_progress(line[len(_PROGRESS) :])
    if found := _LINE.fullmatch(line):
        text = _unquote(found["text"].strip())
        origin = "engine" if found["file"].endswith(".py") else "triton"
        return LogLine(origin, _LEVELS[found["level"]], text) if text else None
    if line.startswith("Signal ("):
        return LogLine("triton", "info", line)
    if line.startswith("error: "):
        return LogLine("triton", "error", line[len("error: ") :])
    return LogLine("output", "info", raw.rstrip())  # a stack trace lives by its indentation


def is_noise(line: LogLine, *, has_gpu: bool) -> bool:
    """Whether a line says nothing to the person who started the server."""
    if line.origin == "triton" and (line.level in ("info", "debug") or _EXPECTED.search(line.text)):
        return True
    return not has_gpu and line.origin == "triton" and _NO_GPU_NOISE.search(line.text) is not None


class ServerLog:
    """Reads a server's output to its end, keeps what explains a failure, and passes the rest on.

    `read` runs in a thread of its own; the properties may be read from another at any time.
    """

    def __init__(
        self,
        *,
        file: IO[str],
        show: Callable[[LogLine], None],
        show_progress: Callable[[LoadProgress], None],
        has_gpu: bool,
        is_verbose: bool = False,
    ) -> None:
        self._file = file
        self._show = show
        self._show_progress = show_progress
        self._has_gpu = has_gpu
        self._is_verbose = is_verbose
        self._errors: deque[str] = deque(maxlen=5)
        self._load_failure: str | None = None
        # While the server starts, one failure is told by up to a dozen lines; they wait until it is known which it is.
        self._is_starting = True
        self._held_back: list[LogLine] = []

    @property
    def last_errors(self) -> list[str]:
        """The last few error lines since `forget`, oldest first."""
        return list(self._errors)

    @property
    def load_failure(self) -> str | None:
        """Why the first model that failed did not load; None if none failed since `forget`."""
        return self._load_failure

    def forget(self) -> None:
        """Starts afresh, for a new server process."""
        self._errors.clear()
        self._load_failure = None
        self._held_back.clear()
        self._is_starting = True

    def started(self) -> None:
        """The server is ready: errors so far were not fatal, and are shown now."""
        self._is_starting = False
        for line in self._held_back:
            self._show(line)
        self._held_back.clear()

    def read(self, lines: Iterable[bytes]) -> None:
        """Handles lines until they end, which is when the last process that holds the pipe ended."""
        for raw in lines:
            text = raw.decode("utf-8", errors="replace")
            self._file.write(text)
            self._file.flush()
            line = parse_line(text)
            if isinstance(line, LoadProgress):
                self._show_progress(line)
            elif line is not None:
                self._handle(line)

    def _handle(self, line: LogLine) -> None:
        noise = is_noise(line, has_gpu=self._has_gpu)
        if line.level == "error" and not noise:
            self._errors.append(line.text.splitlines()[0])
            if self._load_failure is None and (found := _LOAD_FAILURE.match(line.text.replace("\n", "\\n"))):
                self._load_failure = _plain_cause(found["cause"].replace("\\n", "\n"))
        if self._is_verbose:
            self._show(line)
        elif not noise and self._is_starting and line.level == "error":
            self._held_back.append(line)
        elif not noise:
            self._show(line)


def _parse_progress(text: str) -> LoadProgress | None:
    # Progress is an ornament: a line that does not fit is dropped, as the log file has it anyway.
    try:
        values: Any = json.loads(text)
    except ValueError:
        return None
    if not isinstance(values, dict):
        return None
    fields = cast("dict[str, Any]", values)
    phase, done, total = fields.get("phase"), fields.get("done"), fields.get("total")
    if isinstance(phase, str) and isinstance(done, int) and isinstance(total, int):
        return LoadProgress(phase, done, total)
    return None


def _unquote(text: str) -> str:
    """Since 24.09 Triton quotes its messages as JSON strings, so that a line break does not break a line."""
    if len(text) >= 2 and text[0] == text[-1] == '"':
        try:
            return str(json.loads(text))
        except ValueError:
            return text[1:-1]
    return text


def _plain_cause(cause: str) -> str:
    """An exception's message as Triton passes it on, without class name, code word and Python's places."""
    message = cause.partition("\n\nAt:")[0].strip()
    message = _EXCEPTION_NAME.sub("", message)
    message = _CODE_WORD.sub("", message)
    return " ".join(message.split())
