# SPDX-License-Identifier: Apache-2.0
"""`wavetrain quantize`: makes a quantized checkpoint, on a CPU, and tells what it is worth."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any, Protocol, cast

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from wavetrain_cli.engine_flags import FlagParser
from wavetrain_cli.errors import CommandError
from wavetrain_cli.repository import resolve_model_path
from wavetrain_engine.environment import Environment
from wavetrain_engine.errors import ConfigError
from wavetrain_engine.quantizer.recipe import METHODS, PER_CHANNEL, SCHEMES, Recipe

# Imported when it is needed, and by its name: with it comes torch, which the command never sees otherwise.
_QUANTIZER = "wavetrain_engine.quantizer.quantizer"


class _Report(Protocol):
    def lines(self) -> list[str]:
        """What came of it."""
        ...


def create_parser() -> FlagParser:
    """The parser of `wavetrain quantize`."""
    defaults = Recipe(scheme="w4a16", method="rtn")
    parser = FlagParser(
        prog="wavetrain quantize",
        description="Quantizes the checkpoint MODEL and writes it, in the format of compressed-tensors, to DIR.",
    )
    parser.add_argument("model_dir", metavar="MODEL", help="checkpoint directory (Hugging Face layout, safetensors)")
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to write; missing or empty")
    parser.add_argument("--scheme", required=True, choices=tuple(SCHEMES), help="bits of weights and activations")
    parser.add_argument("--method", required=True, choices=METHODS, help="how weights are rounded")
    parser.add_argument(
        "--group-size",
        type=int,
        metavar="N",
        help=f"inputs that share a scale; {PER_CHANNEL}: all (default: what suits scheme and model, 128 for w4a16)",
    )
    parser.add_argument("--asymmetric", action="store_true", help="with zero points")
    parser.add_argument("--no-act-order", action="store_true", help="gptq rounds inputs in the order they come in")
    parser.add_argument(
        "--smoothing",
        type=float,
        default=defaults.smoothing,
        metavar="X",
        help="how much of the activations' range smoothquant moves into the weights (default: %(default)s)",
    )
    parser.add_argument(
        "--calibration", metavar="FILE", help="text like what is served (default: Python's standard library)"
    )
    _add_sizes(parser, defaults)
    parser.add_argument("--kv-scales", action="store_true", help="find scales for a KV cache in fp8 too")
    parser.add_argument("--restart", action="store_true", help="throw away what an interrupted run has finished")
    return parser


def main(arguments: list[str], environment: Environment) -> int:
    """Runs the subcommand; 130 after Ctrl-C, when the same command goes on where it was."""
    given = create_parser().parse(arguments)
    try:
        recipe = _recipe(given)
    except ConfigError as error:
        raise CommandError(str(error), exit_code=2) from error
    model_dir, out = resolve_model_path(given.model_dir), Path(given.out).expanduser().absolute()
    calibration = None if given.calibration is None else Path(given.calibration).expanduser()
    quantizer: Any = importlib.import_module(_QUANTIZER)
    job = quantizer.QuantizerJob(
        model_dir=model_dir, out=out, recipe=recipe, calibration=calibration, restarts=given.restart
    )
    display = _Display(Console(stderr=True, highlight=False, soft_wrap=True))
    try:
        report = cast("_Report", quantizer.quantize(job, environment, display.progress))
    except KeyboardInterrupt:
        display.stop()
        print("wavetrain: interrupted; the same command goes on after the last finished layer", file=sys.stderr)
        return 130
    finally:
        display.stop()
    for line in report.lines():
        print(line)
    print(f"{out}: ready; serve it with: wavetrain serve {out}")
    return 0


def _add_sizes(parser: argparse.ArgumentParser, defaults: Recipe) -> None:
    for flag, name, text in (
        ("--calibration-windows", "num_windows", "of calibration text"),
        ("--window-tokens", "window_tokens", "tokens of a window"),
        ("--report-windows", "num_report_windows", "of held-out text that the report is measured on; 0: none is"),
        ("--max-shard-bytes", "max_shard_bytes", "a larger checkpoint is written in several files"),
    ):
        default = getattr(defaults, name)
        parser.add_argument(
            flag, dest=name, type=int, default=default, metavar="N", help=f"{text} (default: {default})"
        )


def _recipe(given: argparse.Namespace) -> Recipe:
    return Recipe(
        scheme=given.scheme,
        method=given.method,
        group_size=given.group_size,
        is_symmetric=not given.asymmetric,
        has_kv_scales=given.kv_scales,
        has_act_order=not given.no_act_order,
        smoothing=given.smoothing,
        num_windows=given.num_windows,
        window_tokens=given.window_tokens,
        num_report_windows=given.num_report_windows,
        max_shard_bytes=given.max_shard_bytes,
    )


class _Display:
    """A bar for each phase on a terminal; elsewhere a line for each."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress: Progress | None = None
        self._tasks: dict[str, TaskID | None] = {}

    def progress(self, phase: str, done: int, total: int) -> None:
        """Shows how far a phase is."""
        if not self._console.is_terminal:
            if phase not in self._tasks:
                self._tasks[phase] = None
                self._console.print(f"wavetrain: {escape(phase)}")
            return
        if self._progress is None:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f} %"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._progress.start()
        task = self._tasks.get(phase)
        if task is None:
            task = self._tasks[phase] = self._progress.add_task(escape(phase))
        self._progress.update(task, completed=done, total=max(total, 1))

    def stop(self) -> None:
        """Leaves the bars as they are."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
