# SPDX-License-Identifier: Apache-2.0
"""Replicas that come and go: by file and by the admin API, and none of them takes a running request with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from fakes.replicas import QUICK, FakeReplica, all_healthy, job, routed, serving, table_of, text_of, until
from fakes.triton import ReceivedRequest, reply
from wavetrain_gateway.routing.admin import AdminApi
from wavetrain_gateway.routing.replica_set import ReplicaSet
from wavetrain_gateway.routing.routed_upstream import RoutedUpstream, make_upstream
from wavetrain_gateway.routing.routing_table import ReplicaEntry
from wavetrain_gateway.routing.settings import RoutingSettings

ADMIN = {"authorization": "Bearer admin-key"}


class Held:
    """A script that answers with two words, the second when it is let go."""

    def __init__(self) -> None:
        self.go = asyncio.Event()

    async def __call__(self, request: ReceivedRequest) -> AsyncIterator[Any]:
        yield reply("begun ")
        await self.go.wait()
        yield reply("done", "stop")


@asynccontextmanager
async def admin_of(upstream: RoutedUpstream) -> AsyncIterator[httpx.AsyncClient]:
    app = AdminApi(upstream.router.replicas, "admin-key").app()
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://admin", headers=ADMIN) as client:
        yield client


async def test_a_retired_replica_finishes_its_requests_and_gets_no_new_ones() -> None:
    held = Held()
    old, new = FakeReplica(held), FakeReplica()
    async with serving(old, new), routed(table_of(old)) as upstream:
        running = [asyncio.create_task(text_of(upstream, job())) for _ in range(20)]
        await until(lambda: len(old.asked) == 20)
        both = table_of(old, new)
        upstream.router.apply(both.model_copy(update={"replicas": both.replicas[1:]}))
        await all_healthy(upstream)
        assert [replica.name for replica in upstream.router.replicas.replicas] == ["b"]
        assert [replica.name for replica in upstream.router.replicas.retiring] == ["a"]
        for _ in range(5):
            assert (await text_of(upstream, job()))[1] == "b"
        held.go.set()
        assert await asyncio.gather(*running) == [("begun done", "a")] * 20
        await until(lambda: not upstream.router.replicas.retiring)
        assert len(old.asked) == 20
        assert old.cancelled == []


async def test_a_drain_that_takes_too_long_is_cut_off() -> None:
    held = Held()
    fake = FakeReplica(held)
    async with serving(fake), routed(table_of(fake), drain_timeout_s=0.01) as upstream:
        running = asyncio.create_task(text_of(upstream, job()))
        await until(lambda: len(fake.asked) == 1)
        upstream.router.replicas.retire("a")
        assert (await asyncio.gather(running, return_exceptions=True))[0] is not None
        await until(lambda: not upstream.router.replicas.retiring)
        assert await asyncio.to_thread(fake.was_cancelled.wait, 30)


async def test_a_changed_file_adds_removes_and_weighs_anew(tmp_path: Path) -> None:
    first, second = FakeReplica(), FakeReplica()
    path = tmp_path / "routing.toml"

    def write(*entries: tuple[str, str, float]) -> None:
        path.write_text(
            "\n".join(f'[[replica]]\nname="{n}"\nurl="{u}"\nmodel="m"\nweight={w}' for n, u, w in entries),
            encoding="utf-8",
        )

    async with serving(first, second):
        write(("a", first.url, 1))
        upstream = make_upstream(RoutingSettings.model_validate({"file": path, "health": QUICK}))
        await upstream.start()
        try:
            replicas = upstream.router.replicas
            assert (await text_of(upstream, job()))[1] == "a"
            same = replicas.find("a")
            write(("a", first.url, 2.5), ("b", second.url, 1))
            await until(lambda: replicas.find("b") is not None)
            assert replicas.find("a") is same
            assert same is not None
            assert same.entry.weight == 2.5
            path.write_text("[[replica]]\nurl=3", encoding="utf-8")
            await until(lambda: upstream.num_file_errors == 1)
            assert [replica.name for replica in replicas.replicas] == ["a", "b"]
            write(("a", second.url, 1))  # the name moves to another server
            await until(lambda: replicas.find("b") is None)
            assert replicas.find("a") is not same
            await all_healthy(upstream)
            await text_of(upstream, job())
            assert (len(first.asked), len(second.asked)) == (1, 1)
        finally:
            await upstream.close()


async def test_a_file_cannot_take_the_name_of_an_added_replica() -> None:
    fake = FakeReplica()
    async with serving(fake), routed(table_of(fake)) as upstream:
        replicas = upstream.router.replicas
        replicas.add(ReplicaEntry(url=fake.url, model="m", name="b"), "admin")
        with pytest.raises(ValueError, match="the admin API has added one of this name"):
            upstream.router.apply(table_of(fake, fake))
        upstream.router.apply(table_of())  # the file's own go, the added one stays
        assert [replica.name for replica in replicas.replicas] == ["b"]


async def test_the_admin_adds_drains_resumes_and_removes() -> None:
    first, second = FakeReplica(), FakeReplica()
    async with serving(first, second), routed(table_of(first)) as upstream, admin_of(upstream) as admin:
        added = await admin.post("/replicas", json={"name": "x/y", "url": second.url, "model": "m", "weight": 2})
        assert (added.status_code, added.json()["state"], added.json()["origin"]) == (201, "starting", "admin")
        await all_healthy(upstream)
        assert (await admin.post("/replicas/a/drain")).json()["state"] == "draining"
        assert {(await text_of(upstream, job()))[1] for _ in range(6)} == {"x/y"}
        assert (await admin.post("/replicas/a/resume")).json()["state"] == "healthy"
        removed = await admin.delete("/replicas/x/y")
        assert (removed.status_code, removed.json()["state"]) == (202, "removing")
        assert {(await text_of(upstream, job()))[1] for _ in range(6)} == {"a"}
        await until(lambda: not upstream.router.replicas.retiring)
        listed = (await admin.get("/replicas")).json()["replicas"]
        assert [(item["name"], item["state"], item["num_requests"]) for item in listed] == [("a", "healthy", 6)]


async def test_a_replica_being_removed_is_shown_until_it_is_drained() -> None:
    held = Held()
    fake = FakeReplica(held)
    async with serving(fake), routed(table_of(fake)) as upstream, admin_of(upstream) as admin:
        running = asyncio.create_task(text_of(upstream, job()))
        await until(lambda: len(fake.asked) == 1)
        await admin.delete("/replicas/a")
        (shown,) = (await admin.get("/replicas")).json()["replicas"]
        assert (shown["state"], shown["num_running"]) == ("removing", 1)
        held.go.set()
        assert await running == ("begun done", "a")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/replicas", 401),
        ("POST", "/replicas", 401),
        ("DELETE", "/replicas/a", 401),
        ("POST", "/replicas/a/drain", 401),
        ("POST", "/replicas/a/resume", 401),
        ("GET", "/", 401),
        ("PUT", "/replicas", 401),
    ],
)
async def test_the_admin_api_answers_nobody_without_its_key(method: str, path: str, status: int) -> None:
    async with admin_of(make_upstream(RoutingSettings(), upstreams=["h:1"], model="m")) as admin:
        for key in ("", "Bearer", "Bearer wrong"):
            answer = await admin.request(method, path, headers={"authorization": key})
            assert answer.status_code == status
            assert answer.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "message"),
    [
        ("POST", "/replicas", b'{"url": "h:1", "model": "m", "name": "h:1"}', 409, "there is a replica named 'h:1'"),
        ("POST", "/replicas", b'{"url": "h", "model": "m"}', 400, "url: 'h' is no server address"),
        ("POST", "/replicas", b'{"url": "h:2", "modle": "m"}', 400, "did you mean 'model'?"),
        ("POST", "/replicas", b"{", 400, "the body must be JSON"),
        ("POST", "/replicas", b"[" * 60_000, 400, "the body must be JSON"),
        ("POST", "/replicas", b" " * 70_000, 413, "the body is larger than"),
        ("POST", "/replicas/none/drain", b"", 404, "there is no replica 'none'"),
        ("DELETE", "/replicas/none", b"", 404, "GET /replicas lists them"),
        ("GET", "/nothing", b"", 404, "there is no such route"),
        ("PUT", "/replicas", b"", 405, "the route takes another method"),
    ],
)
async def test_what_is_wrong_with_a_request_is_said(
    method: str, path: str, body: bytes, status: int, message: str
) -> None:
    async with admin_of(make_upstream(RoutingSettings(), upstreams=["h:1"], model="m")) as admin:
        answer = await admin.request(method, path, content=body)
        assert answer.status_code == status
        assert message in answer.json()["error"]["message"]


def test_the_admin_api_needs_a_key() -> None:
    with pytest.raises(ValueError, match="needs a key of its own"):
        AdminApi(ReplicaSet(RoutingSettings()), "")
