# SPDX-License-Identifier: Apache-2.0
"""Commands in, one list of updates per step out; and whoever was let in is told how it ended."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from fakes.core import VOCAB_SIZE, CoreHarness
from fakes.executor import sequential_output
from wavetrain_engine.command import Add, Cancel, Command, Shutdown
from wavetrain_engine.core.engine_loop import EngineLoop
from wavetrain_engine.errors import ErrorCode
from wavetrain_engine.request import EngineRequest, FinishReason, RequestUpdate
from wavetrain_engine.sampling_params import SamplingParams


class ScriptedInbox:
    """Gives out one batch of commands per drain; after the last, shuts down when the loop is idle."""

    def __init__(self, *batches: list[Command]) -> None:
        self.batches = list(batches)
        self.timeouts: list[float] = []
        self.num_idle_drains = 0

    def drain(self, timeout_s: float) -> list[Command]:
        self.timeouts.append(timeout_s)
        if self.batches:
            return self.batches.pop(0)
        if timeout_s > 0:
            self.num_idle_drains += 1
            return [Shutdown()] if self.num_idle_drains > 2 else []
        return []


def _request(request_id: str, prompt: list[int], **params: Any) -> EngineRequest:
    return EngineRequest(
        request_id=request_id, prompt_token_ids=prompt, sampling_params=SamplingParams(temperature=0.0, **params)
    )


def _run(harness: CoreHarness, *batches: list[Command]) -> tuple[ScriptedInbox, list[list[RequestUpdate]]]:
    inbox, emitted = ScriptedInbox(*batches), list[list[RequestUpdate]]()
    EngineLoop(harness.core, inbox, emitted.append).run()
    return inbox, emitted


def _ends(emitted: list[list[RequestUpdate]]) -> dict[str, tuple[FinishReason, ErrorCode | None]]:
    ends: dict[str, tuple[FinishReason, ErrorCode | None]] = {}
    for update in (update for updates in emitted for update in updates):
        if update.finish_reason is not None:
            assert update.request_id not in ends, "told twice"
            ends[update.request_id] = (update.finish_reason, update.error_code)
    return ends


def test_runs_what_arrives_and_emits_one_list_per_step() -> None:
    harness = CoreHarness()
    _inbox, emitted = _run(
        harness,
        [Add(_request("a", [1, 2], max_tokens=3)), Add(_request("b", [3], max_tokens=3))],
    )
    assert [[update.request_id for update in updates] for updates in emitted] == [["a", "b"]] * 3
    tokens = [updates[0].new_token_ids[0] for updates in emitted]
    params = SamplingParams(temperature=0.0, max_tokens=3)
    assert tokens == sequential_output([1, 2], params, vocab_size=VOCAB_SIZE, max_model_len=256)[0]


def test_waits_only_when_idle() -> None:
    inbox, _emitted = _run(CoreHarness(), [], [Add(_request("a", [1], max_tokens=3))])
    assert [timeout_s > 0 for timeout_s in inbox.timeouts] == [True, True, False, False, True, True, True, False]


def test_refused_requests_are_told_and_the_others_go_on() -> None:
    harness = CoreHarness(max_num_seqs=1, max_queue_size=1)
    _inbox, emitted = _run(
        harness,
        [
            Add(_request("a", [1], max_tokens=2)),
            Add(_request("empty", [])),
            Add(_request("b", [1], max_tokens=2)),
            Add(_request("late", [1])),
            Add(_request("unknown", [10**6])),
        ],
    )
    assert _ends(emitted) == {
        "a": (FinishReason.LENGTH, None),
        "b": (FinishReason.LENGTH, None),
        "empty": (FinishReason.ERROR, ErrorCode.INVALID),
        "late": (FinishReason.ERROR, ErrorCode.BUSY),
        "unknown": (FinishReason.ERROR, ErrorCode.INVALID),
    }


def test_a_request_that_makes_the_core_stumble_hurts_nobody_else(caplog: pytest.LogCaptureFixture) -> None:
    broken = _request("broken", [1])
    msgspec.structs.force_setattr(broken, "sampling_params", None)
    _inbox, emitted = _run(CoreHarness(), [Add(broken), Add(_request("a", [1], max_tokens=1))])
    assert _ends(emitted) == {
        "broken": (FinishReason.ERROR, ErrorCode.INTERNAL),
        "a": (FinishReason.LENGTH, None),
    }
    assert "broken could not be accepted" in caplog.text


def test_cancels_by_id() -> None:
    _inbox, emitted = _run(
        CoreHarness(),
        [Add(_request("a", [1], max_tokens=50)), Add(_request("b", [1], max_tokens=3))],
        [Cancel(["a", "never"])],
    )
    assert _ends(emitted) == {"a": (FinishReason.CANCELLED, None), "b": (FinishReason.LENGTH, None)}


def test_shutdown_ends_what_is_unfinished_and_refuses_what_is_queued() -> None:
    _inbox, emitted = _run(
        CoreHarness(max_num_seqs=1),
        [Add(_request("runs", [1], max_tokens=50)), Add(_request("waits", [1]))],
        [Shutdown()],
        [Add(_request("late", [1]))],
    )
    assert _ends(emitted) == dict.fromkeys(["runs", "waits", "late"], (FinishReason.ERROR, ErrorCode.DEAD))


@pytest.mark.parametrize("is_async", [False, True])
def test_a_failing_step_ends_every_request_once_and_is_raised(is_async: bool) -> None:
    harness = CoreHarness(max_num_seqs=2, async_scheduling=is_async, fails_at_step=2)
    inbox = ScriptedInbox(
        [Add(_request("short", [1], max_tokens=1)), Add(_request("runs", [1], max_tokens=9))],
        [Add(_request("waits", [1], max_tokens=9))],
        [Add(_request("refused", []))],
        [Add(_request("late", [1]))],
    )
    emitted: list[list[RequestUpdate]] = []
    with pytest.raises(RuntimeError, match="the device is gone"):
        EngineLoop(harness.core, inbox, emitted.append).run()
    assert _ends(emitted) == {
        "short": (FinishReason.LENGTH, None),
        "runs": (FinishReason.ERROR, ErrorCode.DEAD),
        "waits": (FinishReason.ERROR, ErrorCode.DEAD),
        "refused": (FinishReason.ERROR, ErrorCode.INVALID),
        "late": (FinishReason.ERROR, ErrorCode.DEAD),
    }
    error = emitted[-1][-1].error
    assert error is not None
    assert "device" not in error


def test_deadlines_end_requests_of_a_running_loop() -> None:
    harness = CoreHarness(max_num_seqs=1)
    request = msgspec.structs.replace(_request("waits", [1], max_tokens=1), deadline_s=harness.clock.now_s - 1)
    _inbox, emitted = _run(harness, [Add(_request("runs", [1], max_tokens=5)), Add(request)])
    assert [update.request_id for update in emitted[0]] == ["waits", "runs"]
    assert _ends(emitted)["waits"] == (FinishReason.CANCELLED, ErrorCode.DEADLINE)


def test_an_idle_loop_checks_its_core_once_per_pause() -> None:
    harness = CoreHarness()
    num_checks = 0

    def check() -> None:
        nonlocal num_checks
        num_checks += 1

    harness.core.check = check  # pyright: ignore[reportAttributeAccessIssue]
    _run(harness, [Add(_request("a", [1], max_tokens=1))])
    assert num_checks == 1


def test_commands_survive_the_wire() -> None:
    commands: list[Command] = [Add(_request("a", [1, 2], max_tokens=3)), Cancel(["a"]), Shutdown()]
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(commands), type=list[Command]) == commands
