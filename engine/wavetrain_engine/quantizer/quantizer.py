# SPDX-License-Identifier: Apache-2.0
"""From an unquantized checkpoint to a quantized one: everything is checked, then layer after layer is finished.

What is in memory at a time is one layer, in float32, and what its method needs; the text's hidden states are in files.
A layer sees the text as the quantized layers before it leave it, so that it can make up for what they lost. Another
text goes through the layers as they were: what the result is compared with.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wavetrain_engine.environment import Environment
from wavetrain_engine.errors import ConfigError
from wavetrain_engine.quantizer.checkpoint_writer import write_checkpoint
from wavetrain_engine.quantizer.comparison import Comparison, compare
from wavetrain_engine.quantizer.compressed_tensors import quantization_config
from wavetrain_engine.quantizer.hidden_states import HiddenStates
from wavetrain_engine.quantizer.layer_quantizer import LayerQuantizer
from wavetrain_engine.quantizer.layer_runner import LayerRunner
from wavetrain_engine.quantizer.layer_source import LayerSource, layer_prefix
from wavetrain_engine.quantizer.layer_structure import LayerStructure
from wavetrain_engine.quantizer.original import Original, weight_bytes
from wavetrain_engine.quantizer.recipe import PER_CHANNEL, Recipe, choose_group_size
from wavetrain_engine.quantizer.report import Report
from wavetrain_engine.quantizer.report_plot import draw_report
from wavetrain_engine.quantizer.rounding import Grid
from wavetrain_engine.quantizer.text_windows import TextWindows, check_tokens
from wavetrain_engine.quantizer.work_folder import WorkFolder, write_json
from wavetrain_engine.tensor_entry import TensorEntry
from wavetrain_engine.text.tokenizer import Tokenizer
from wavetrain_engine.version import VERSION
from wavetrain_engine.worker.cpu_threads import set_cpu_threads
from wavetrain_kernels.ops import choose_kernels

# W = windows, S = tokens of a window, H = hidden size.

REPORT_JSON = "report.json"
REPORT_PLOT = "report.svg"
_CALIBRATION, _HELD_OUT = "calibration", "held-out"
_OUTPUT_HEAD = "lm_head"
_SPARE_BYTES = 2**24  # tokenizer, report, file systems' own

Progress = Callable[[str, int, int], None]
"""Called with (phase, done, total); phase `layers` counts layers, `writing` bytes, `measuring` windows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizerJob:
    """What is asked for.

    Attributes:
        model_dir: the unquantized checkpoint.
        out: where the result goes; nothing, or an empty folder, is there.
        calibration: a file of text; None: what every machine has.
        restarts: an unfinished run's layers are thrown away.
    """

    model_dir: Path
    out: Path
    recipe: Recipe
    calibration: Path | None = None
    restarts: bool = False


def quantize(job: QuantizerJob, environment: Environment, progress: Progress) -> Report:
    """Does a job, or goes on with it where it was interrupted.

    Raises:
        ConfigError: options that do not fit the model or each other, a text that is too short, no room on the disk, or
            unfinished layers of another job.
        CheckpointError: the checkpoint is missing, broken, quantized already, or not supported.
        OSError: a file cannot be written.
    """
    set_cpu_threads(None)
    choose_kernels(environment.kernels, torch.device("cpu"), environment.kernel_cache_dir)
    with torch.inference_mode():
        return _Quantizer(job, progress).run()


class _Quantizer:
    """Everything that can be told before any work is told by the constructor."""

    def __init__(self, job: QuantizerJob, progress: Progress) -> None:
        recipe = job.recipe
        self._job = job
        self._progress = progress
        _check_out(job)
        self._original = Original.open(job.model_dir)
        config = self._original.config
        if recipe.window_tokens > config.max_model_len:
            raise ConfigError(
                f"--window-tokens {recipe.window_tokens} is longer than the {config.max_model_len} tokens that the "
                "model serves"
            )
        self._source = LayerSource(job.model_dir, config, recipe.window_tokens)
        self._structures = [LayerStructure.of(self._source.shape(index), config) for index in range(config.num_layers)]
        widths = {
            f"{layer_prefix(index)}{name}": sizes[1]
            for index, structure in enumerate(self._structures)
            for name, sizes in structure.matrices().items()
        }
        self._group_size = choose_group_size(recipe, widths)
        self._windows = self._read_text()
        self._work = WorkFolder.beside(job.out)
        self._runner = LayerRunner(recipe.window_tokens)
        self._check_room()

    def run(self) -> Report:
        """Does everything that is not done yet."""
        started = time.monotonic()
        self._job.out.parent.mkdir(parents=True, exist_ok=True)
        num_finished = self._work.start(self._inputs(), discards=self._job.restarts)
        num_layers = self._source.num_layers
        if num_finished == 0:
            self._embed()
        quantizer = self._layer_quantizer()
        for index in range(num_finished, num_layers):
            self._progress("layers", index, num_layers)
            self._finish_layer(index, quantizer)
        self._progress("layers", num_layers, num_layers)
        finished = time.monotonic()
        checkpoint = self._work.new_checkpoint()
        self._write(checkpoint)
        comparison = self._compare(checkpoint)
        layers = [self._work.layer_facts(index) for index in range(num_layers)]
        before = sum(layer["seconds"] for layer in layers[:num_finished])
        rest = time.monotonic() - finished
        report = Report(
            model_name=self._job.model_dir.name,
            recipe=self._job.recipe,
            group_size=self._group_size,
            ignored=self._ignored(),
            comparison=comparison,
            original_bytes=weight_bytes(self._job.model_dir),
            num_bytes=weight_bytes(checkpoint),
            seconds=before + finished - started + rest,
            layers=layers,
        )
        write_json(checkpoint / REPORT_JSON, report.to_mapping())
        (checkpoint / REPORT_PLOT).write_text(draw_report(report), encoding="utf-8")
        if self._job.out.exists():
            self._job.out.rmdir()  # it was empty when we looked
        checkpoint.rename(self._job.out)
        self._work.remove()
        return report

    def _read_text(self) -> TextWindows:
        recipe = self._job.recipe
        if not recipe.needs_text and not recipe.num_report_windows:
            none = torch.empty(0, recipe.window_tokens, dtype=torch.int64)
            return TextWindows(none, none)
        windows = TextWindows.make(Tokenizer.load(self._job.model_dir), recipe, self._job.calibration)
        check_tokens(windows, self._source.config.vocab_size)
        return windows

    def _inputs(self) -> dict[str, Any]:
        """What the layers depend on."""
        return {
            "version": VERSION,
            "recipe": self._job.recipe.to_mapping(),
            "model": self._original.fingerprint(),
            "text": self._windows.digest(),
        }

    def _layer_quantizer(self) -> LayerQuantizer:
        grid = Grid.of(self._job.recipe, self._group_size, self._source.dtype)
        return LayerQuantizer(self._source, self._structures, self._job.recipe, grid, self._runner)

    def _texts(self) -> dict[str, Tensor]:
        return {_CALIBRATION: self._windows.calibration, _HELD_OUT: self._windows.held_out}

    def _shape(self, text: str) -> tuple[int, int, int]:
        num_windows, length = self._texts()[text].shape
        return num_windows, length, self._source.config.hidden_size

    def _open_hidden(self, index: int, text: str) -> Tensor:
        return HiddenStates.open(self._work.hidden(index, text), self._shape(text), self._source.dtype).values

    def _embed(self) -> None:
        """Writes what flows into the first layer."""
        ends = self._source.ends()
        for text, token_ids in self._texts().items():
            states = HiddenStates.create(self._work.hidden(0, text), self._shape(text), self._source.dtype)
            for window, ids in zip(states.values, token_ids, strict=True):
                window.copy_(ends.embed_tokens(ids))
            states.commit()

    def _finish_layer(self, index: int, quantizer: LayerQuantizer) -> None:
        started = time.monotonic()
        tensors = self._source.read_layer(index)
        # The held-out text first: quantizing takes the tensors.
        self._pass_on(index, _HELD_OUT, tensors)
        result = quantizer.quantize(index, tensors, self._open_hidden(index, _CALIBRATION))
        self._pass_on(index, _CALIBRATION, result.dense)
        facts = result.facts() | {"seconds": round(time.monotonic() - started, 3)}
        self._work.save_layer(index, result.stored, facts)
        self._work.forget_hidden(index)

    def _pass_on(self, index: int, text: str, tensors: dict[str, Tensor]) -> None:
        """Writes what flows into the next layer, when this one has these tensors."""
        states = HiddenStates.create(self._work.hidden(index + 1, text), self._shape(text), self._source.dtype)

        def take(start: int, output: Tensor) -> None:
            states.values[start : start + output.shape[0]] = output

        if self._texts()[text].shape[0]:
            stage = self._source.stage(self._source.build_layer(index, tensors))
            self._runner.run(stage, self._open_hidden(index, text), take)
        states.commit()

    def _ignored(self) -> list[str]:
        routers = [
            f"{layer_prefix(index)}{name}"
            for index, structure in enumerate(self._structures)
            for name in structure.routers()
        ]
        return [_OUTPUT_HEAD, *routers]

    def _write(self, checkpoint: Path) -> None:
        """Puts the checkpoint together."""
        recipe = self._job.recipe
        tensors: dict[str, TensorEntry] = dict(self._source.rest)
        for index in range(self._source.num_layers):
            prefix = layer_prefix(index)
            entries = self._work.layer_tensors(index)
            tensors |= {prefix + entry.name: replace(entry, name=prefix + entry.name) for entry in entries}
        write_checkpoint(
            checkpoint, tensors, recipe.max_shard_bytes, lambda done, total: self._progress("writing", done, total)
        )
        values = self._original.values | {
            "quantization_config": quantization_config(recipe, self._group_size, self._ignored())
        }
        (checkpoint / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        self._original.copy_other_files(checkpoint)

    def _compare(self, checkpoint: Path) -> Comparison | None:
        if not self._job.recipe.num_report_windows:
            return None
        hidden, token_ids = self._open_hidden(self._source.num_layers, _HELD_OUT), self._windows.held_out
        return compare(
            self._source.ends(),
            hidden,
            token_ids,
            checkpoint,
            lambda done: self._progress("measuring", done, token_ids.shape[0]),
        )

    def _check_room(self) -> None:
        """Refuses a disk that is too full for the layers, the checkpoint made of them, and the text's hidden states."""
        recipe, itemsize = self._job.recipe, self._source.dtype.itemsize
        numbers = groups = 0
        for structure in self._structures:
            for rows, columns in structure.matrices().values():
                numbers += rows * columns
                groups += rows * (1 if self._group_size == PER_CHANNEL else -(-columns // self._group_size))
        layers = numbers * recipe.weight_scheme.num_bits // 8 + 2 * groups * itemsize
        rest = sum(entry.num_bytes for entry in self._source.rest.values())
        states = sum(tokens.numel() for tokens in self._texts().values()) * self._source.config.hidden_size * itemsize
        needed = 2 * layers + rest + 2 * states + _SPARE_BYTES
        folder = next(parent for parent in self._work.path.absolute().parents if parent.exists())
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise ConfigError(
                f"--out: {needed / 2**30:.2f} GiB are needed where it is to be written, and {free / 2**30:.2f} GiB are "
                "free; make room, choose another place, or lower --calibration-windows"
            )


def _check_out(job: QuantizerJob) -> None:
    out = job.out
    if out.resolve() == job.model_dir.resolve():
        raise ConfigError("--out is the model itself; choose another folder")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ConfigError(f"--out {out.name}: there is a file of this name; choose another folder")
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"--out {out.name}: the folder exists and is not empty; choose another, or remove it")
