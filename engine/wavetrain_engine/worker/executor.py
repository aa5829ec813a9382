# SPDX-License-Identifier: Apache-2.0
"""Runs plans on a model runner in this process: at once, on one worker thread, or on a GPU behind those before."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

import torch

from wavetrain_engine.plan import PendingResult, StepPlan, StepResult
from wavetrain_engine.worker.device_errors import step_error
from wavetrain_engine.worker.device_runner import DeviceRunner
from wavetrain_engine.worker.model_runner import ModelRunner


class LocalExecutor:
    """A plan.Executor over one ModelRunner.

    With `is_async` a step runs on a thread of its own, so the scheduler plans the next one meanwhile
    (torch releases the interpreter inside its operators); plans still run strictly in order.
    """

    def __init__(self, runner: ModelRunner, *, is_async: bool) -> None:
        self._runner: ModelRunner | None = runner
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="wavetrain-worker") if is_async else None

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        """Starts a step; without a thread it is done on return. The future raises what the step raised.

        Raises:
            RuntimeError: after `shutdown`.
        """
        if self._runner is None:
            raise RuntimeError("the executor is shut down")
        if self._thread is not None:
            return self._thread.submit(self._runner.execute, plan)
        future: Future[StepResult] = Future()
        try:
            future.set_result(self._runner.execute(plan))
        except Exception as error:  # handed to whoever asks for the result, as a thread pool does
            future.set_exception(error)
        return future

    def shutdown(self) -> None:
        """Waits for the step in flight, ends the thread, and lets go of weights and KV cache. Idempotent."""
        if self._thread is not None:
            self._thread.shutdown(wait=True)
        self._runner = None


class DeviceExecutor:
    """A plan.Executor over a DeviceRunner, which needs no thread: launching a step returns while it runs."""

    def __init__(self, runner: DeviceRunner) -> None:
        self._runner: DeviceRunner | None = runner

    @property
    def runner(self) -> DeviceRunner | None:
        """Its runner; None after `shutdown`."""
        return self._runner

    def submit(self, plan: StepPlan) -> PendingResult:
        """Launches a step. The result raises what the step raised, at once or on the device.

        Raises:
            RuntimeError: after `shutdown`.
        """
        if self._runner is None:
            raise RuntimeError("the executor is shut down")
        try:
            return self._runner.launch(plan)
        except Exception as error:  # handed to whoever asks for the result
            failed: Future[StepResult] = Future()
            cause = step_error(error, plan.step_id)
            cause.__cause__ = None if cause is error else error
            failed.set_exception(cause)
            return failed

    def shutdown(self) -> None:
        """Lets go of weights and KV cache, and gives the device's memory back. Idempotent."""
        self._runner = None
        if torch.cuda.is_initialized():
            with suppress(RuntimeError):  # a device that failed gives nothing back; the process's end does
                torch.cuda.synchronize()
                torch.cuda.empty_cache()  # torch would keep the memory for itself
