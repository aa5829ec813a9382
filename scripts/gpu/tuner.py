# SPDX-License-Identifier: Apache-2.0
"""Finds launch configurations by measuring: one parameter after the other, from what the launcher's heuristics choose.

What a configuration goes by is learnt by listening to what the kernels ask `tuning.tuned` for as they run. Every
candidate's result is compared with the truth before it is timed; one that is wrong, or does not fit the chip, is out.
"""

from __future__ import annotations

import importlib
import json
import math
import pkgutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import wavetrain_kernels.gpu
from gpu.contest import Contest
from gpu.report import write_json
from gpu.rounds import significant
from gpu.timing import Timer
from wavetrain_kernels.gpu.tuning import key_text

Config = dict[str, Any]
Table = dict[str, dict[str, Config]]

# Faster by less is noise, and not worth an entry.
_LEAST_GAIN = 1.02
_ROUNDS = 3


@dataclass(frozen=True)
class Space:
    """What may be tried of a kernel.

    Attributes:
        fields: values of each parameter.
        start: a whole configuration to begin with; empty where a launcher fills up what is not named.
    """

    fields: Mapping[str, Sequence[Any]]
    start: Mapping[str, Any] = field(default_factory=dict[str, Any])


_PRODUCT = {"block_n": (32, 64, 128, 256), "block_k": (32, 64, 128), "num_warps": (4, 8), "num_stages": (2, 3, 4, 5)}
_LORA = {
    "block_n": (16, 32, 64, 128),
    "block_k": (16, 32, 64, 128, 256),
    "num_warps": (2, 4, 8),
    "num_stages": (2, 3, 4),
}

# By family, which has its contests; kernels in the order in which they depend on each other.
SPACES: dict[str, dict[str, Space]] = {
    "attention": {
        "decode_attention": Space(
            {
                "programs_per_sm": (1, 2, 3, 4),
                "tile_n": (16, 32, 64, 128),
                "num_stages": (2, 3, 4, 5),
                "num_warps": (4, 8),
            }
        ),
        "prefill_attention": Space(
            {
                "block_n": (32, 64, 128),
                "num_stages": (2, 3, 4),
                "is_skewed": (False, True),
                "query_in_registers": (False, True),
                "block_m": (64, 128, 256),
                "num_warps": (4, 8),
            }
        ),
    },
    "layer": {
        "gated_product": Space(
            {
                "is_fused": (True, False),
                "block_n": (16, 32, 64, 128),
                "block_k": (64, 128, 256),
                "num_stages": (2, 3, 4, 5),
                "num_warps": (2, 4, 8),
            }
        ),
    },
    "quantized": {
        "weight_only": Space(
            {
                "is_fused": (True, False),
                "num_splits": (1, 2, 3, 4, 6, 8, 12, 16),
                "block_n": (64, 128, 256),
                "num_warps": (4, 8),
                "num_stages": (2, 3, 4, 5, 6),
                "block_t": (16, 32, 64, 128, 256),
            }
        ),
        "quantized_product": Space(
            {
                "block_n": (64, 128),
                "block_t": (64, 128, 256),
                "num_warps": (4, 8),
                "num_stages": (3, 4, 5, 6),
            }
        ),
    },
    "moe": {
        "moe_rows": Space({"block_m": (16, 32, 64, 128)}),
        "moe_gate_up": Space(
            {**_PRODUCT, "group_m": (1, 8)},
            {"block_n": 64, "block_k": 64, "group_m": 1, "num_warps": 4, "num_stages": 4},
        ),
        "moe_down": Space(
            {**_PRODUCT, "group_m": (1, 8)},
            {"block_n": 128, "block_k": 64, "group_m": 1, "num_warps": 4, "num_stages": 4},
        ),
        "moe_rounded": Space(
            {"block_n": (64, 128), "num_warps": (4, 8), "num_stages": (3, 4, 5, 6), "group_m": (1, 8)}
        ),
        "moe_quantized": Space({"block_n": (64, 128, 256), "num_warps": (4, 8), "num_stages": (2, 3, 4, 5, 6)}),
    },
    "lora": {
        "lora_shrink": Space(_LORA, {"block_m": 16, "block_n": 16, "block_k": 256, "num_warps": 4, "num_stages": 3}),
        "lora_expand": Space(_LORA, {"block_m": 16, "block_n": 64, "block_k": 16, "num_warps": 4, "num_stages": 2}),
    },
}


class Listener:
    """Stands where the kernels ask for measured configurations: answers from a table, and notes what was asked."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self.asked: list[tuple[str, str]] = []
        self._modules = [
            importlib.import_module(f"wavetrain_kernels.gpu.{found.name}")
            for found in pkgutil.iter_modules(wavetrain_kernels.gpu.__path__)
            if found.name != "tuning"
        ]
        for module in self._modules:
            if hasattr(module, "tuned"):
                module.tuned = self  # pyright: ignore[reportAttributeAccessIssue]

    def __call__(self, kernel_name: str, key: Any, device: torch.device | None = None) -> Config | None:
        """As `tuning.tuned`."""
        del device
        question = (kernel_name, key_text(key))
        if question not in self.asked:
            self.asked.append(question)
        return self.table.get(question[0], {}).get(question[1])

    def forget(self) -> None:
        """Lets launchers choose anew: they keep what they chose."""
        for module in self._modules:
            for value in vars(module).values():
                if module.__name__.endswith(".launch") or not hasattr(value, "cache_clear"):
                    continue
                value.cache_clear()

    def keys_of(self, contest: Contest, kernel: str) -> list[str]:
        """Returns what a contest asks for by a kernel's name."""
        self.asked.clear()
        self.forget()
        contest.check(contest.ours)
        return [key for name, key in self.asked if name == kernel]


@dataclass
class Tuner:
    """Tunes family after family within a time, and can go on where another run stopped.

    Attributes:
        out: the file to be written, as `tuning` reads it; measured times lie beside it until all is done.
        deadline: of `time.monotonic`.
    """

    device_name: str
    timer: Timer
    out: Path
    deadline: float
    listener: Listener
    times: dict[str, float] = field(default_factory=dict[str, float])
    is_cut_off: bool = False

    def __post_init__(self) -> None:
        if self.progress.exists():
            saved = json.loads(self.progress.read_text(encoding="utf-8"))
            self.times = {key: math.inf if value is None else value for key, value in saved["times"].items()}
        if self.out.exists():
            self.listener.table.update(json.loads(self.out.read_text(encoding="utf-8"))["kernels"])

    @property
    def progress(self) -> Path:
        """Where the measured times are kept."""
        return self.out.with_suffix(".progress.json")

    def tune(self, family: str, contests: Sequence[Contest]) -> None:
        """Tunes the kernels of a family over its contests; a key's score is the mean over those that ask for it."""
        for kernel, space in SPACES[family].items():
            askers: dict[str, list[Contest]] = {}
            for contest in contests:
                for key in self.listener.keys_of(contest, kernel):
                    askers.setdefault(key, []).append(contest)
            for key, found in askers.items():
                if self.is_cut_off:
                    return
                self._tune_key(kernel, key, space, found)

    def _tune_key(self, kernel: str, key: str, space: Space, contests: Sequence[Contest]) -> None:
        score = self._scorer(kernel, key, contests)
        before = self.listener.table.get(kernel, {}).pop(key, None)
        heuristic = score(None)
        best, best_score = self._search(space, score)
        entries = self.listener.table.setdefault(kernel, {})
        if heuristic / best_score >= _LEAST_GAIN:
            entries[key] = best
        elif self.is_cut_off and before is not None:
            entries[key] = before  # this key's search is not over: what an earlier run found stays
        self.listener.forget()
        self._save()
        gain = heuristic / best_score if best_score < math.inf else 0.0
        print(f"{kernel} {key}: {gain:.3f} times the heuristics' speed with {best}", flush=True)

    def _search(self, space: Space, score: Callable[[Mapping[str, Any]], float]) -> tuple[Config, float]:
        """Varies one parameter of the best so far after the other; twice round, as they depend on each other."""
        best, best_score = dict(space.start), score(space.start) if space.start else math.inf
        for _ in range(2):
            for name, values in space.fields.items():
                for config in [{**best, name: value} for value in values if best.get(name) != value]:
                    if time.monotonic() > self.deadline:
                        self.is_cut_off = True
                        return best, best_score
                    found = score(config)
                    if found < best_score:
                        best, best_score = config, found
        return best, best_score

    def _scorer(
        self, kernel: str, key: str, contests: Sequence[Contest]
    ) -> Callable[[Mapping[str, Any] | None], float]:
        """Returns the function from a configuration to the geometric mean of the contests' seconds."""

        def score(config: Mapping[str, Any] | None) -> float:
            name = f"{kernel} {key} {json.dumps(config, sort_keys=True)}"
            if name not in self.times:
                self._use(kernel, key, config)
                self.times[name] = self._measure(contests)
                self._use(kernel, key, None)
                self._save_times()
            return self.times[name]

        return score

    def _use(self, kernel: str, key: str, config: Mapping[str, Any] | None) -> None:
        entries = self.listener.table.setdefault(kernel, {})
        entries.pop(key, None)
        if config is not None:
            entries[key] = dict(config)
        self.listener.forget()

    def _measure(self, contests: Sequence[Contest]) -> float:
        seconds = [self._seconds(contest) for contest in contests]
        return math.inf if math.inf in seconds else statistics.geometric_mean(seconds)

    def _seconds(self, contest: Contest) -> float:
        """Returns the time of a contest; inf where this candidate is none for it."""
        try:
            if not contest.check(contest.ours) <= contest.tolerance:
                return math.inf
            once = self.timer.make(contest.ours)
            return statistics.median(once() for _ in range(_ROUNDS))
        except Exception:  # too much shared memory, a shape that the compiler refuses
            return math.inf

    def _save(self) -> None:
        kernels = {kernel: entries for kernel, entries in self.listener.table.items() if entries}
        write_json(self.out, {"device": self.device_name, "kernels": kernels})

    def _save_times(self) -> None:
        shown = {key: None if value == math.inf else significant(value, 6) for key, value in self.times.items()}
        write_json(self.progress, {"device": self.device_name, "times": shown})

    def finish(self) -> None:
        """Drops the measured times once nothing is left to do."""
        if not self.is_cut_off:
            self.progress.unlink(missing_ok=True)
