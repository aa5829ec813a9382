# SPDX-License-Identifier: Apache-2.0
"""The engine core's process: loads the model, then runs the engine loop on the main thread.

This is a composition root: the only place where the socket, the scheduler and the worker meet. It is
started by the first Triton model that needs it and ends by itself (see ipc/core_socket.py).

While it loads, its log has lines that `wavetrain serve` draws a progress bar from:

    wavetrain-progress {"phase": "weights", "done": 1048576, "total": 12582912}
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from wavetrain_engine.config import EngineConfig
from wavetrain_engine.core.engine_core import EngineCore
from wavetrain_engine.core.engine_loop import EngineLoop
from wavetrain_engine.environment import Environment, bound_waiting_threads
from wavetrain_engine.errors import ErrorCode, WavetrainError
from wavetrain_engine.facts import EngineFacts
from wavetrain_engine.ipc.core_socket import CoreSocket
from wavetrain_engine.ipc.runtime_dir import RuntimeDir
from wavetrain_engine.plan import Executor
from wavetrain_engine.request_tracer import RequestTracer
from wavetrain_engine.time_slice import shorten_time_slices
from wavetrain_engine.worker_import import import_worker

_LOGGER = logging.getLogger(__name__)
# Weights come in thousands of small steps; a bar needs a few a second.
_PROGRESS_INTERVAL_S = 0.1

Progress = Callable[[str, int, int], None]
LoadExecutor = Callable[[EngineConfig, Progress], tuple[Executor, EngineFacts]]


class _ServerLogFormatter(logging.Formatter):
    """As the Triton server's lines, so that one log reads as one: `I1120 16:30:14.175802 8881 file.py:12] "..."`."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.localtime(record.created)
        stamp = f"{time.strftime('%m%d %H:%M:%S', moment)}.{int(record.created % 1 * 1e6):06d}"
        text = f'{record.levelname[0]}{stamp} {os.getpid()} {record.filename}:{record.lineno}] "{record.getMessage()}"'
        if record.exc_info is not None:
            text += "\n" + self.formatException(record.exc_info)
        return text


def main(arguments: Sequence[str] | None = None, *, load: LoadExecutor | None = None) -> int:
    """Runs the core until its server or its last model has gone. Returns the exit status.

    `load` replaces the worker, so that tests can run the process without torch.
    """
    options = _parse(arguments)
    _log_to_stderr()
    runtime_dir = RuntimeDir(options.runtime_dir)
    socket = CoreSocket(runtime_dir.socket_path(os.getpid()), options.server_pid)
    socket.install_signal_handlers()
    shorten_time_slices()
    try:
        logging.getLogger().setLevel(Environment.read().log_level.upper())
        config = EngineConfig.load(options.engine_config)
        tracer = RequestTracer.to(config.observability.otlp_traces_endpoint)
        executor, facts = (load or _load_worker)(config, _progress_reporter(socket))
    except WavetrainError as error:
        _LOGGER.error("%s: %s", type(error).__name__, error)
        socket.report_load_failure(error.code, str(error))
        socket.close()
        return 1
    except SystemExit:  # everybody has left while it loaded
        socket.close()
        return 0
    except Exception as error:  # no memory, a broken device, a bug of ours: the models must hear of it, not wait
        _LOGGER.exception("the model could not be loaded")
        socket.report_load_failure(ErrorCode.INTERNAL, f"the model could not be loaded: {type(error).__name__}")
        socket.close()
        return 1
    try:
        core = EngineCore(config, facts, executor, on_end=None if tracer is None else tracer.record)
        socket.report_ready(facts, core.stats)
        _LOGGER.info("the engine core is ready: %d KV-cache blocks of %d tokens", facts.num_blocks, facts.block_size)
        EngineLoop(core, socket, socket.emit).run()
    finally:
        executor.shutdown()
        socket.close()
        if tracer is not None:
            tracer.close()
    return 0


def _load_worker(config: EngineConfig, progress: Progress) -> tuple[Executor, EngineFacts]:
    bound_waiting_threads()
    load_executor = import_worker()  # late, as it takes seconds: clients may say Hello meanwhile
    executor, facts = load_executor(config, environment=Environment.read(), progress=progress)
    # What is there now stays until the process ends: no collection needs to look at it while requests wait.
    gc.freeze()
    return executor, facts


def _progress_reporter(socket: CoreSocket) -> Progress:
    last_s = -1.0

    def report(phase: str, done: int, total: int) -> None:
        nonlocal last_s
        now_s = time.monotonic()
        if now_s - last_s < _PROGRESS_INTERVAL_S and done < total:
            return
        last_s = now_s
        line = json.dumps({"phase": phase, "done": done, "total": total})
        sys.stderr.write(f"wavetrain-progress {line}\n")
        sys.stderr.flush()
        socket.report_progress(phase, done, total)

    return report


def _log_to_stderr() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_ServerLogFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="wavetrain_engine.core_process", description=__doc__, allow_abbrev=False)
    parser.add_argument("--engine-config", type=Path, required=True, help="the engine.toml to load")
    parser.add_argument("--runtime-dir", type=Path, required=True, help="where the models look for the socket")
    parser.add_argument("--server-pid", type=int, required=True, help="the Triton server; the core ends with it")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
