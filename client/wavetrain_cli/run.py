# SPDX-License-Identifier: Apache-2.0
"""`wavetrain run`: completes a prompt in the terminal; without one, asks for prompts until Ctrl-D.

The completion is all that goes to standard output, so it can be piped on.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from wavetrain_cli.checkpoint_check import check_checkpoint
from wavetrain_cli.completer import Completer, LocalCompleter, RemoteCompleter
from wavetrain_cli.engine_flags import FlagParser, add_engine_flags, engine_config, has_engine_flags
from wavetrain_cli.errors import CommandError
from wavetrain_cli.repository import ENGINE_TOML, packaged_repository, resolve_model_path
from wavetrain_engine.config import EngineConfig
from wavetrain_engine.environment import Environment
from wavetrain_engine.errors import WavetrainError

if TYPE_CHECKING:
    from collections.abc import Generator

_OPTIONS = ("max_tokens", "temperature", "top_p", "top_k", "seed", "stop")
_HISTORY_LENGTH = 1000


def create_parser() -> FlagParser:
    """The parser of `wavetrain run`."""
    parser = FlagParser(
        prog="wavetrain run",
        description="Completes PROMPT, or what is piped in; without either, asks for prompts until Ctrl-D.",
    )
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help="the text to complete")
    where = parser.add_mutually_exclusive_group()
    # Not `model`, which is the engine option of that name.
    where.add_argument(
        "--model",
        dest="model_path",
        metavar="MODEL",
        help="checkpoint directory or GGUF file (default: the demo model)",
    )
    where.add_argument(
        "--url", metavar="HOST:PORT", help="a server's gRPC address, in place of an engine in this process"
    )
    parser.add_argument("--max-tokens", type=int, default=128, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 is greedy (default: the model's)")
    parser.add_argument("--top-p", type=float, metavar="P", help="(default: the model's)")
    parser.add_argument("--top-k", type=int, metavar="K", help="(default: the model's)")
    parser.add_argument("--seed", type=int, metavar="N", help="same seed, same text")
    parser.add_argument("--stop", action="append", metavar="TEXT", help="ends the completion; may be given repeatedly")
    parser.add_argument("--stats", action="store_true", help="print tokens and tokens/s at the end")
    add_engine_flags(parser)
    return parser


def main(arguments: list[str], environment: Environment) -> int:
    """Runs the subcommand; 130 if Ctrl-C ended the completion of a given prompt."""
    given = create_parser().parse(arguments)
    prompt = given.prompt
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read()
        if not prompt:
            raise CommandError("the prompt is empty; give one as an argument or on standard input", exit_code=2)
    options = {name: value for name in _OPTIONS if (value := getattr(given, name)) is not None}
    completer = _create_completer(given)
    try:
        if prompt is not None:
            return _complete_once(completer, prompt, options, has_stats=given.stats)
        _ask_for_prompts(completer, options, environment.cache_dir / "run_history", has_stats=given.stats)
        return 0
    finally:
        completer.close()


def _create_completer(given: argparse.Namespace) -> Completer:
    if given.url is not None:
        if has_engine_flags(given):
            raise CommandError("engine flags and --url exclude each other: the server has its own engine", exit_code=2)
        try:
            return RemoteCompleter(given.url)
        except ValueError as error:
            raise CommandError(f"--url: {error}", exit_code=2) from error
    if given.model_path is None:
        base, model_path = EngineConfig.load(packaged_repository() / ENGINE_TOML), None
    else:
        base, model_path = EngineConfig(), resolve_model_path(given.model_path)
    config = engine_config(given, model_path=model_path, base=base)
    check_checkpoint(config)
    with Console(stderr=True).status("loading the model"):
        return LocalCompleter(config)


def _complete_once(completer: Completer, prompt: str, options: dict[str, Any], *, has_stats: bool) -> int:
    completion = completer.complete(prompt, options, _show)
    print()
    if has_stats:
        print(completion.describe(), file=sys.stderr)
    return 130 if completion.is_cancelled else 0


def _ask_for_prompts(completer: Completer, options: dict[str, Any], history: Path, *, has_stats: bool) -> None:
    print("Ctrl-C ends a completion, Ctrl-D leaves.", file=sys.stderr)
    with _line_history(history):
        while True:
            try:
                prompt = input("> ")
            except EOFError:
                print(file=sys.stderr)
                return
            except KeyboardInterrupt:
                print(file=sys.stderr)
                continue
            if not prompt:
                continue
            try:
                _complete_once(completer, prompt, options, has_stats=has_stats)
            except (WavetrainError, CommandError) as error:
                # A prompt that is too long, say: the next one may do.
                print(f"wavetrain: {error}", file=sys.stderr)


@contextlib.contextmanager
def _line_history(path: Path) -> Generator[None]:
    """Line editing with a history that outlives the session; without it where Python has no readline."""
    try:
        import readline
    except ImportError:
        yield
        return
    readline.set_history_length(_HISTORY_LENGTH)
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(path)


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
