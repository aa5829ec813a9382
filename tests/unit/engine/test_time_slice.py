# SPDX-License-Identifier: Apache-2.0
"""Threads of the engine core give way early, and pass that on to the threads they start."""

from __future__ import annotations

import os
import threading

import pytest

from wavetrain_engine.time_slice import shorten_time_slices, time_slice_ns


def in_a_thread(work):
    results = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    thread.join()
    return results[0]


def knows_slices() -> bool:
    release = os.uname().release.split(".")
    return (int(release[0]), int(release[1])) >= (6, 12)


@pytest.mark.skipif(not knows_slices(), reason="Linux older than 6.12 has no slices to choose")
def test_a_thread_and_those_it_starts_get_short_slices():
    def child_of_a_short_one():
        assert shorten_time_slices()
        return in_a_thread(time_slice_ns)

    before = in_a_thread(time_slice_ns)
    assert in_a_thread(child_of_a_short_one) == 100_000
    assert in_a_thread(time_slice_ns) == before  # nobody else's


def test_another_policy_is_left_alone():
    def batch():
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        return shorten_time_slices(), os.sched_getscheduler(0)

    assert in_a_thread(batch) == (False, os.SCHED_BATCH)


def test_a_refusal_is_no_error(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "another")
    assert not shorten_time_slices()
    assert time_slice_ns() == 0
