# SPDX-License-Identifier: Apache-2.0
"""What is shown of the server's log, with lines as the real 2.51 and the engine core write them."""

from __future__ import annotations

import io

import pytest

from wavetrain_cli.server_log import LoadProgress, LogLine, ServerLog, parse_line

LOADED = "I1120 16:27:15.549414 7645 model_lifecycle.cc:839] \"successfully loaded 'echo'\""
NO_DRIVER = 'E1120 16:27:15.300356 7645 server.cc:241] "CudaDriverHelper has not been initialized."'
PINNED = (
    'W1120 16:27:15.300254 7645 pinned_memory_manager.cc:273] "Unable to allocate pinned system memory, pinned memory '
    'pool will not be available: CUDA driver version is insufficient for CUDA runtime version"'
)
CORE = 'I1120 16:30:14.175802 8881 core_process.py:12] "the engine core is ready: 512 KV-cache blocks of 16 tokens"'
FAILED = (
    "E1120 16:28:41.439313 8085 model_lifecycle.cc:642] \"failed to load 'llm' version 1: Internal: "
    'TritonModelException: invalid: config.json: vocab_size is missing\\n\\nAt:\\n  /x/model.py(9): initialize\\n"'
)
BROKEN = 'E1120 16:28:41.439313 8085 grpc_server.cc:1] "something broke"'


class Shown:
    """A ServerLog, and what it passed on."""

    def __init__(self, *, has_gpu: bool = False, is_verbose: bool = False) -> None:
        self.lines: list[LogLine] = []
        self.progress: list[LoadProgress] = []
        self.file = io.StringIO()
        self.log = ServerLog(
            file=self.file,
            show=self.lines.append,
            show_progress=self.progress.append,
            has_gpu=has_gpu,
            is_verbose=is_verbose,
        )

    def read(self, *lines: str) -> list[str]:
        self.log.read(f"{line}\n".encode() for line in lines)
        return [line.text for line in self.lines]


def test_lines_lose_what_only_a_file_needs() -> None:
    assert parse_line(LOADED) == LogLine("triton", "info", "successfully loaded 'echo'")
    assert parse_line(CORE) == LogLine("engine", "info", "the engine core is ready: 512 KV-cache blocks of 16 tokens")
    assert parse_line("Traceback:\n") == LogLine("output", "info", "Traceback:")


@pytest.mark.parametrize("line", ["", "+-----+", "| Model | Version |", "I1120 16:27:15.549493 7645 server.cc:604] "])
def test_tables_are_dropped(line: str) -> None:
    assert parse_line(line) is None


def test_the_engine_speaks_and_triton_is_quiet() -> None:
    shown = Shown()
    assert shown.read(LOADED, NO_DRIVER, PINNED, CORE) == ["the engine core is ready: 512 KV-cache blocks of 16 tokens"]
    assert shown.file.getvalue().splitlines() == [LOADED, NO_DRIVER, PINNED, CORE]


def test_gpu_warnings_count_where_there_is_a_gpu() -> None:
    shown = Shown(has_gpu=True)
    assert len(shown.read(PINNED)) == 1


def test_verbose_shows_everything() -> None:
    assert len(Shown(is_verbose=True).read(LOADED, NO_DRIVER, PINNED, CORE, FAILED)) == 5


def test_progress_lines_drive_the_bar() -> None:
    shown = Shown()
    shown.read(
        'wavetrain-progress {"phase": "weights", "done": 1, "total": 4}', "wavetrain-progress {", "wavetrain-progress 1"
    )
    assert shown.progress == [LoadProgress("weights", 1, 4)]
    assert shown.lines == []


def test_a_load_failure_is_one_plain_sentence() -> None:
    shown = Shown()
    assert shown.read(FAILED) == []
    assert shown.log.load_failure == "config.json: vocab_size is missing"


def test_errors_of_a_start_that_succeeds_are_shown_after_it() -> None:
    shown = Shown()
    assert shown.read(BROKEN) == []
    shown.log.started()
    assert [line.text for line in shown.lines] == ["something broke"]
    assert shown.read(BROKEN) == ["something broke"] * 2
    assert shown.log.last_errors == ["something broke"] * 2
    shown.log.forget()
    assert shown.log.last_errors == []


def test_bytes_that_are_no_text_do_no_harm() -> None:
    shown = Shown()
    shown.log.read([b"\xff\xfe plain\n"])
    assert len(shown.lines) == 1
