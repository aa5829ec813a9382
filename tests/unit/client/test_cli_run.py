# SPDX-License-Identifier: Apache-2.0
"""`wavetrain run`: one completion, a conversation, Ctrl-C; with a real engine in this process and with a fake one."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from fakes.tiny_checkpoints import make_tiny_checkpoint
from wavetrain_cli import run
from wavetrain_cli.completer import Completion, LocalCompleter
from wavetrain_cli.errors import CommandError
from wavetrain_cli.main import main
from wavetrain_engine.config import EngineConfig
from wavetrain_engine.errors import PromptTooLong, WavetrainError


class EchoCompleter:
    """Answers with the prompt in capitals; `fail` refuses, `stop` is interrupted."""

    def __init__(self) -> None:
        self.options: list[dict[str, Any]] = []
        self.is_closed = False

    def complete(self, prompt: str, options: Mapping[str, Any], show: Callable[[str], None]) -> Completion:
        self.options.append(dict(options))
        if prompt == "fail":
            raise PromptTooLong("the prompt is too long")
        show(prompt.upper())
        is_cancelled = prompt == "stop"
        return Completion(num_output_tokens=5, first_token_s=0.1, total_s=0.5, is_cancelled=is_cancelled)

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def completer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> EchoCompleter:
    fake = EchoCompleter()
    monkeypatch.setattr(run, "_create_completer", lambda given: fake)
    monkeypatch.setenv("WAVETRAIN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("WAVETRAIN_LOG_LEVEL", raising=False)
    return fake


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def type_lines(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Answers input() with these lines; an exception among them is raised. Ends as Ctrl-D does."""

    def start(*lines: str | type[BaseException]) -> None:
        monkeypatch.setattr("sys.stdin", Terminal())
        left = iter(lines)

        def answer(_prompt: str) -> str:
            line = next(left, EOFError)
            if isinstance(line, str):
                return line
            raise line

        monkeypatch.setattr("builtins.input", answer)

    return start


def test_a_prompt_is_completed_on_standard_output(completer: EchoCompleter, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "hello", "--max-tokens", "9", "--temperature", "0", "--stop", "a", "--stop", "b"]) == 0
    assert capsys.readouterr() == ("HELLO\n", "")
    assert completer.options == [{"max_tokens": 9, "temperature": 0.0, "stop": ["a", "b"]}]
    assert completer.is_closed


def test_stats_go_to_standard_error(completer: EchoCompleter, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "hello", "--stats"]) == 0
    assert capsys.readouterr() == ("HELLO\n", "5 tokens, first after 100 ms, 10.0 tokens/s\n")


def test_a_pipe_is_the_prompt(
    completer: EchoCompleter, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("two\nlines"))
    assert main(["run"]) == 0
    assert capsys.readouterr().out == "TWO\nLINES\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert main(["run"]) == 2


def test_an_interrupted_completion_is_told_by_the_exit_code(completer: EchoCompleter) -> None:
    assert main(["run", "stop"]) == 130


def test_a_conversation_survives_errors_and_interrupts(
    completer: EchoCompleter,
    type_lines: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    type_lines("one", "", KeyboardInterrupt, "stop", "fail", "two")
    assert main(["run"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "ONE\nSTOP\nTWO\n"
    assert "wavetrain: the prompt is too long" in captured.err
    assert completer.is_closed


def test_flags_that_make_no_sense_together(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "x", "--url", "localhost:1", "--max-num-seqs", "3"]) == 2
    assert "exclude each other" in capsys.readouterr().err
    assert main(["run", "x", "--url", "localhost:1", "--model", "m"]) == 2
    assert "not allowed with" in capsys.readouterr().err
    assert main(["run", "x", "--url", "no address"]) == 2
    assert "--url" in capsys.readouterr().err


def test_a_server_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "x", "--url", "127.0.0.1:1"]) == 1
    assert capsys.readouterr().err.startswith("wavetrain: no Triton server answers at 127.0.0.1:1")


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCompleter]:
    model_dir = make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), "llama")
    config = EngineConfig.from_flags({"model": str(model_dir), "num_blocks": 64, "dtype": "float32"})
    completer = LocalCompleter(config)
    yield completer
    completer.close()


def test_an_engine_in_this_process_streams(local: LocalCompleter) -> None:
    pieces: list[str] = []
    options = {"max_tokens": 24, "temperature": 0, "ignore_eos": True}
    completion = local.complete("def f(", options, pieces.append)
    assert completion.num_output_tokens == 24
    assert not completion.is_cancelled
    assert 0 < completion.first_token_s <= completion.total_s
    again: list[str] = []
    local.complete("def f(", options, again.append)
    assert "".join(again) == "".join(pieces) != ""


def test_ctrl_c_cancels_the_completion_and_the_next_one_works(local: LocalCompleter) -> None:
    def interrupt(_text: str) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    options = {"max_tokens": 400, "temperature": 0, "ignore_eos": True}
    completion = local.complete("def f(", options, interrupt)
    assert completion.is_cancelled
    assert completion.num_output_tokens < 400
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert local.complete("def f(", options | {"max_tokens": 4}, lambda _text: None).num_output_tokens == 4


def test_bad_options_are_refused(local: LocalCompleter) -> None:
    with pytest.raises(WavetrainError, match="temperature"):
        local.complete("x", {"temperature": -1}, lambda _text: None)


def test_the_model_directory_is_checked_first(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="there is no checkpoint directory"):
        run._create_completer(run.create_parser().parse(["--model", str(tmp_path / "none"), "x"]))
