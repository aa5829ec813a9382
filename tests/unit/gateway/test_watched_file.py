# SPDX-License-Identifier: Apache-2.0
"""A file that is read again when it changes: never half written, never in place of what was good when it is broken."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from wavetrain_gateway.watched_file import WatchedFile


def parse(data: bytes) -> int:
    return int(data)


async def settle(file: WatchedFile[int], taken: list[int]) -> bool:
    """Two looks, as a change is taken by the second that finds it."""
    first = await file.poll(taken.append)
    return await file.poll(taken.append) or first


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "number"
    path.write_text("1")
    return path


async def test_a_change_is_taken_once(path: Path) -> None:
    file = WatchedFile(path, parse, what="number")
    taken: list[int] = []
    assert file.load() == 1
    assert not await settle(file, taken)
    path.write_text("22")
    assert not await file.poll(taken.append)  # it may still be being written
    assert await file.poll(taken.append)
    assert not await settle(file, taken)
    assert taken == [22]


async def test_a_file_is_not_read_while_it_is_written(path: Path) -> None:
    file = WatchedFile(path, parse, what="number")
    file.load()
    taken: list[int] = []
    for text in ("12", "123", "1234"):
        path.write_text(text)
        assert not await file.poll(taken.append)
    assert await file.poll(taken.append)
    assert taken == [1234]


async def test_a_broken_file_changes_nothing_and_is_counted(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = WatchedFile(path, parse, what="number file")
    file.load()
    taken: list[int] = []
    path.write_text("one")
    assert not await settle(file, taken)
    assert not await settle(file, taken)
    assert (taken, file.num_errors) == ([], 1)
    assert "number file is not taken" in caplog.text
    assert str(path.parent) not in caplog.text
    path.write_text("300")
    assert await settle(file, taken)
    assert (taken, file.num_errors, file.last_error) == ([300], 1, None)


async def test_a_change_that_is_refused_is_an_error_too(path: Path) -> None:
    def refuse(value: int) -> None:
        raise ValueError(f"{value} is not liked")

    file = WatchedFile(path, parse, what="number")
    file.load()
    path.write_text("22")
    await file.poll(refuse)
    assert not await file.poll(refuse)
    assert (file.num_errors, file.last_error) == (1, "22 is not liked")


async def test_a_file_that_goes_away_and_comes_back(path: Path) -> None:
    file = WatchedFile(path, parse, what="number")
    file.load()
    taken: list[int] = []
    path.unlink()
    for _ in range(3):
        assert not await settle(file, taken)
    assert (taken, file.num_errors) == ([], 1)
    path.write_text("1")
    assert await settle(file, taken)
    assert taken == [1]


async def test_a_swapped_link_is_a_change(tmp_path: Path) -> None:
    # How Kubernetes changes a mounted ConfigMap.
    for name, text in (("v1", "1"), ("v2", "2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "number").write_text(text)
        os.utime(tmp_path / name / "number", (0, 0))
    (tmp_path / "now").symlink_to("v1")
    file = WatchedFile(tmp_path / "now" / "number", parse, what="number")
    assert file.load() == 1
    (tmp_path / "next").symlink_to("v2")
    (tmp_path / "next").rename(tmp_path / "now")
    taken: list[int] = []
    assert await settle(file, taken)
    assert taken == [2]


async def test_it_looks_by_itself_until_it_is_closed(path: Path) -> None:
    file = WatchedFile(path, parse, what="number", period_s=0.001)
    file.load()
    changed = asyncio.Event()
    file.start(lambda _: changed.set())
    path.write_text("22")
    await asyncio.wait_for(changed.wait(), 30)
    await file.close()
    await file.close()


def test_the_first_reading_must_succeed(path: Path, tmp_path: Path) -> None:
    path.write_text("one")
    with pytest.raises(ValueError, match="one"):
        WatchedFile(path, parse, what="number").load()
    with pytest.raises(OSError, match="No such file"):
        WatchedFile(tmp_path / "none", parse, what="number").load()
