# SPDX-License-Identifier: Apache-2.0
"""One process of bench_gpu: an engine loads, does its parts, and writes each result as soon as it has it.

Engines get processes of their own: each may take the whole memory, a crash costs only what was still to come, and the
start can be measured from its beginning.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from gpu import machine


def run_worker(
    engine: str,
    parts: Sequence[str],
    shape: str,
    results: Path,
    started_at: float,
    flags: Mapping[str, Any],
    *,
    is_dry_run: bool,
) -> None:
    """Measures the parts of one engine and appends {part: result} lines to a file."""
    machine.prepare(is_dry_run=False)  # the engine in a dry run is the CPU's, nothing is interpreted
    import torch

    from gpu.engine_parts import DRY, FULL
    from gpu.shapes import write_config

    plan = DRY if is_dry_run else FULL
    device = torch.device("cpu" if is_dry_run else "cuda")
    model_dir = write_config(results.parent / "model", shape)
    if engine == "transformers":
        from gpu.peer_continuous import measure_peer

        dtype = torch.float32 if is_dry_run else torch.bfloat16
        began = partial(_append, results, "began_at")
        _note(results, "throughput", lambda: measure_peer(model_dir, plan, device, dtype, began))
        return
    _run_ours(parts, shape, model_dir, results, started_at, flags, is_dry_run=is_dry_run)


def _run_ours(
    parts: Sequence[str],
    shape: str,
    model_dir: Path,
    results: Path,
    started_at: float,
    asked: Mapping[str, Any],
    *,
    is_dry_run: bool,
) -> None:
    from gpu.engine import Engine
    from gpu.engine_parts import DRY, FULL, measure_idle, measure_replays, measure_start, measure_steps
    from gpu.engine_parts import measure_throughput as measure_requests

    plan = DRY if is_dry_run else FULL
    flags: dict[str, Any] = {"load_format": "dummy", "max_model_len": plan.max_model_len}
    flags |= {"max_num_seqs": plan.requests, "device": "cpu" if is_dry_run else "cuda"}
    if is_dry_run:
        flags |= {"dtype": "float32", "num_blocks": 64}
    flags |= asked
    with Engine(model_dir, **flags) as engine:
        _note(results, "start", lambda: measure_start(engine, started_at))
        _note(results, "facts", lambda: _facts(engine))
        measures: dict[str, Callable[[], dict[str, Any]]] = {
            "throughput": partial(measure_requests, engine, plan),
            "replay": partial(measure_replays, engine, plan),
            "idle": partial(measure_idle, engine, plan),
        }
        if "step" in parts:
            limits = _limits(is_dry_run=is_dry_run)
            _note(results, "limits", limits.as_json)
            measures["step"] = partial(measure_steps, engine, plan, shape, limits)
        for part in parts:
            _note(results, part, measures[part])
        if not is_dry_run:
            _note(results, "compiled", _compiled)


def _limits(*, is_dry_run: bool) -> Any:
    import torch

    from gpu.limits import measure_limits
    from gpu.timing import GraphTimer, HostTimer

    device = torch.device("cpu" if is_dry_run else "cuda")
    timer = HostTimer(device) if is_dry_run else GraphTimer(device)
    with torch.inference_mode():
        return measure_limits(timer, torch.bfloat16, 5, is_dry_run=is_dry_run)


def _facts(engine: Any) -> dict[str, Any]:
    names = ("kernels", "dtype", "device", "num_blocks", "kv_cache_bytes", "weight_bytes", "max_num_batched_tokens")
    graphs = engine.graphs
    return {
        **{name: getattr(engine.facts, name) for name in names},
        "graph_sizes": None if graphs is None else graphs.sizes(),
        "stand_in_for_msgspec": not hasattr(__import__("msgspec"), "__version__"),
    }


def _compiled() -> dict[str, Any]:
    from wavetrain_kernels.gpu.launch import compile_count

    return {"kernel_variants": compile_count()}


def _note(results: Path, part: str, measure: Callable[[], dict[str, Any]]) -> None:
    """Writes what a part found, or why it failed; the parts after it go on."""
    started = time.monotonic()
    try:
        found = measure()
    except Exception as error:
        found = {"failed": f"{type(error).__name__}: {error}"[:400]}
    found = {**found, "took_s": round(time.monotonic() - started, 1)}
    _append(results, part, found)
    print(f"{part}: {json.dumps(found)}", flush=True)


def _append(results: Path, name: str, found: object) -> None:
    with results.open("a", encoding="utf-8") as file:
        file.write(json.dumps({name: found}) + "\n")


def read_results(results: Path) -> dict[str, Any]:
    """Returns the results of a worker by part; what a cut-off process left, too."""
    found: dict[str, Any] = {}
    text = results.read_text(encoding="utf-8") if results.exists() else ""
    for line in text.splitlines(keepends=True):
        if line.endswith("\n"):  # else the last line of a process that was ended as it wrote
            found |= json.loads(line)
    return found
