# SPDX-License-Identifier: Apache-2.0
"""The OpenAPI document against what is answered: no 500, no status that it does not name, no route without a key."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from fakes.gateway import RunningGateway, serve_gateway
from fakes.triton import ReceivedRequest, reply
from wavetrain_gateway.admission import Caller, OpenAdmission
from wavetrain_gateway.documentation import openapi_document
from wavetrain_gateway.errors import Unauthenticated
from wavetrain_gateway.routes import ROUTES

_NUM_EXAMPLES = 25


class OneKey(OpenAdmission):
    """Lets one key in."""

    def authenticate(self, headers: Mapping[str, str], client_host: str) -> Caller:
        if headers.get("authorization") != "Bearer right":
            raise Unauthenticated("send a key")
        return Caller(name="k1")


async def quick(request: ReceivedRequest):
    yield reply("x", "stop")


@contextmanager
def gateway_in_thread() -> Iterator[str]:
    """A gateway in a loop of its own: schemathesis waits without one."""
    loop = asyncio.new_event_loop()
    found: list[str] = []
    is_up, stop = threading.Event(), asyncio.Event()

    async def run() -> None:
        async with serve_gateway(quick) as gateway:
            found.append(gateway.url)
            is_up.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(run()))
    thread.start()
    assert is_up.wait(20)
    try:
        yield found[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(20)
        loop.close()


@pytest.mark.filterwarnings("ignore")  # schemathesis uses what hypothesis is about to forbid
def test_what_is_answered_is_what_the_document_says():
    document = openapi_document(ROUTES)
    with gateway_in_thread() as url:
        schema = schemathesis.openapi.from_dict(document)
        checks = [
            not_a_server_error,
            status_code_conformance,
            content_type_conformance,
            response_schema_conformance,
        ]
        statuses: set[int] = set()
        for found in schema.get_all_operations():
            operation = found.ok()

            def run(case: schemathesis.Case) -> None:
                answer = case.call(base_url=url)
                statuses.add(answer.status_code)
                if answer.status_code != 503:  # the fake replica is ready a moment later
                    case.validate_response(answer, checks=checks)

            strategy = operation.as_strategy()
            quiet = settings(
                max_examples=_NUM_EXAMPLES,
                deadline=None,
                database=None,
                derandomize=True,
                phases=(Phase.explicit, Phase.generate),
                suppress_health_check=list(HealthCheck),
            )
            _run_with(strategy, run, quiet)
    assert {200, 400, 404} <= statuses
    assert 500 not in statuses


def _run_with(strategy, run, quiet) -> None:
    from hypothesis import given

    @quiet
    @given(strategy)
    def test(case: schemathesis.Case) -> None:
        run(case)

    test()


async def test_every_route_but_livez_needs_the_key():
    async with serve_gateway(quick, admission=OneKey()) as gateway:
        paths = [(spec.method, re.sub(r"{[^}]*}", "x", spec.path), spec.is_public) for spec in gateway.app.routes]
        paths += [("GET", "/nowhere", False), ("DELETE", "/v1/models", False), ("GET", "/LIVEZ", False)]
        for method, path, is_public in paths:
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic right"}):
                answer = await gateway.http.request(method, path, headers=headers)
                assert (answer.status_code == 401) is not is_public, (method, path)
        assert [path for _, path, is_public in paths if is_public and not _is_page(path)] == ["/livez"]
        answer = await gateway.http.get("/v1/models", headers={"authorization": "Bearer right"})
        assert answer.status_code == 200
        # The path is the parsed one: what a Host header pretends is none of its business.
        raw = await _raw(gateway, b"GET /v1/models HTTP/1.1\r\nhost: x/livez?\r\n\r\n")
        assert raw.startswith(b"HTTP/1.1 401")


def _is_page(path: str) -> bool:
    """The page's own files hold nothing that a key would protect."""
    return path == "/" or path.startswith("/page")


async def _raw(gateway: RunningGateway, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    writer.write(request)
    answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
    writer.close()
    return answer


async def test_the_document_and_the_page_for_people():
    async with serve_gateway(quick) as gateway:
        document = (await gateway.http.get("/openapi.json")).json()
        assert {"/v1/completions", "/v1/chat/completions", "/v1/models/{model}"} <= set(document["paths"])
        fields = document["components"]["schemas"]["ChatRequest"]["properties"]
        assert {"messages", "max_completion_tokens", "cache_salt", "priority"} <= set(fields)
        page = await gateway.http.get("/docs")
        assert page.headers["content-type"].startswith("text/html")
        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert not re.search(r"(?:src|href)=[\"']?https?:", page.text)
