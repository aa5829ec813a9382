# SPDX-License-Identifier: Apache-2.0
"""The gateway's page in a real browser: sending, stopping, errors, keys, charts, by mouse and by keyboard."""

from __future__ import annotations

import asyncio
import hashlib
import http.server
import shutil
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from fakes.gateway import RunningGateway, is_canary, sampling, serve_gateway
from fakes.triton import ReceivedRequest, reply

_CHROMIUM, _DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.alone,  # a browser, and what its pages wait for
    pytest.mark.skipif(_CHROMIUM is None or _DRIVER is None, reason="no Chromium: see scripts/setup"),
]

KEY = "wt-of-a-test"
METRICS = """\
# TYPE wavetrain_num_requests_running gauge
wavetrain_num_requests_running{model="engine"} 3
wavetrain_num_requests_waiting{model="engine"} 2
wavetrain_kv_cache_usage_perc{model="engine"} 0.25
wavetrain_prompt_tokens_total{model="engine"} 70
wavetrain_generation_tokens_total{model="engine"} 50
nv_inference_count{model="llm",version="1"} 4
"""


class Page:
    """The page in a browser. Each step runs beside the event loop, which the gateway needs."""

    def __init__(self, browser: webdriver.Chrome) -> None:
        self.browser = browser

    async def open(self, gateway: RunningGateway) -> None:
        await asyncio.to_thread(self.browser.get, f"{gateway.url}/")
        await self.until(lambda: self.text("state") != "connecting")

    def at(self, name: str) -> WebElement:
        return self.browser.find_element(By.ID, name)

    def text(self, name: str) -> str:
        return self.at(name).text

    async def type(self, name: str, keys: str) -> None:
        await asyncio.to_thread(self.at(name).send_keys, keys)

    async def click(self, name: str) -> None:
        await asyncio.to_thread(self.at(name).click)

    async def until(self, is_so: Callable[[], Any], seconds: float = 30.0) -> None:
        deadline_s = asyncio.get_running_loop().time() + seconds
        while not await asyncio.to_thread(is_so):
            assert asyncio.get_running_loop().time() < deadline_s, self.browser.page_source[:4000]
            await asyncio.sleep(0.02)

    def messages(self) -> list[str]:
        return [item.text for item in self.browser.find_elements(By.CSS_SELECTOR, "#log pre")]

    def notes(self) -> list[str]:
        return [item.text for item in self.browser.find_elements(By.CSS_SELECTOR, "#log .note")]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(_CHROMIUM)
    for flag in (
        "headless=new",
        "no-sandbox",
        "disable-gpu",
        "disable-dev-shm-usage",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "window-size=1280,900",
        f"user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(_DRIVER)))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser: webdriver.Chrome) -> Iterator[Page]:
    yield Page(browser)
    # What the page asked for elsewhere, or did wrong, is in the console. Refusals are meant, and the gateway has gone.
    severe = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert [message for message in severe if not message.startswith("http://127.0.0.1:") or ".js" in message] == []


async def test_a_chat_is_sent_and_streamed(page: Page) -> None:
    async with serve_gateway() as gateway:
        await page.open(gateway)
        await page.type("system", "Be brief.")
        await page.type("prompt", "Hello" + Keys.ENTER)
        await page.until(lambda: page.text("state") == "ready" and len(page.notes()) == 1)
        assert page.messages() == ["Hello", "one two three"]
        assert page.notes()[0].startswith("first token ")
        await page.type("prompt", "And" + Keys.SHIFT + Keys.ENTER + Keys.SHIFT + "now?" + Keys.ENTER)
        await page.until(lambda: len(page.notes()) == 2)
        assert page.messages()[2:] == ["And\nnow?", "one two three"]
        sent = gateway.generations[-1].inputs["messages"][0].decode()
        assert "Be brief." in sent
        assert "one two three" in sent  # the conversation goes along
        assert sampling(gateway.generations[-1])["temperature"] == 0.7


async def test_a_completion_continues_its_prompt(page: Page) -> None:
    async with serve_gateway() as gateway:
        await page.open(gateway)
        await asyncio.to_thread(page.browser.find_element(By.CSS_SELECTOR, "[value=completion]").click)
        await page.type("seed", "7")
        await page.type("prompt", "zero ")
        await page.click("send")
        await page.until(lambda: page.notes())
        assert page.messages() == ["zero one two three"]
        assert gateway.generations[-1].inputs["text_input"] == [b"zero "]
        assert sampling(gateway.generations[-1])["seed"] == 7


@pytest.mark.parametrize("by", ["button", "key"])
async def test_stop_ends_the_request_where_it_runs(page: Page, by: str) -> None:
    async def endless(_: ReceivedRequest) -> AsyncIterator[Any]:
        while True:
            yield reply(" more", None)
            await asyncio.sleep(0.01)

    async with serve_gateway(endless) as gateway:
        await page.open(gateway)
        await page.type("prompt", "go on" + Keys.ENTER)
        await page.until(lambda: "more more" in " ".join(page.messages()))
        assert page.text("state") == "generating"
        if by == "button":
            await page.click("stop")
        else:
            await page.type("log", Keys.ESCAPE)
        await page.until(lambda: page.text("state") == "ready")
        assert await asyncio.to_thread(gateway.fake.was_cancelled.wait, 30)
        assert page.notes()[0].startswith("stopped")
        assert not page.at("error").is_displayed()


async def test_clearing_ends_what_runs_and_begins_anew(page: Page) -> None:
    async def slow(request: ReceivedRequest) -> AsyncIterator[Any]:
        yield reply("first", None)
        if b"one" in request.inputs["messages"][0]:
            await asyncio.sleep(60)
        yield reply(" and last", "stop")

    async with serve_gateway(slow) as gateway:
        await page.open(gateway)
        await page.type("prompt", "one" + Keys.ENTER)
        await page.until(lambda: page.messages() == ["one", "first"])
        await page.click("clear")
        await page.until(lambda: page.text("state") == "ready")
        assert page.messages() == []
        await page.type("prompt", "two" + Keys.ENTER)
        await page.until(lambda: page.notes())
        assert page.messages() == ["two", "first and last"]
        assert b"one" not in gateway.generations[-1].inputs["messages"][0]


async def test_a_failure_is_told_and_the_text_kept(page: Page) -> None:
    async def failing(request: ReceivedRequest) -> AsyncIterator[Any]:
        if not is_canary(request):
            yield reply("so far", None)
        yield "dead: the engine failed"

    async with serve_gateway(failing) as gateway:
        await page.open(gateway)
        await page.type("prompt", "hi" + Keys.ENTER)
        await page.until(lambda: page.at("error").is_displayed())
        assert "[request " in page.text("error")
        assert page.messages() == ["hi", "so far"]
        assert page.notes()[0].startswith("failed")


async def test_a_refusal_names_the_field_and_gives_the_prompt_back(page: Page) -> None:
    async with serve_gateway() as gateway:
        await page.open(gateway)
        await page.type("stop_text", "x" * 300)
        await page.type("prompt", "hi" + Keys.ENTER)
        await page.until(lambda: page.at("error").is_displayed())
        assert "stop" in page.text("error")
        assert page.at("prompt").get_attribute("value") == "hi"


async def test_a_key_is_asked_for_and_used(page: Page, tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(f'[[key]]\nname = "someone"\nsha256 = "{hashlib.sha256(KEY.encode()).hexdigest()}"\n')
    async with serve_gateway(keys={"file": file}) as gateway:
        await page.open(gateway)
        assert page.text("state") == "an API key is needed"
        await page.type("key", KEY + Keys.TAB)
        await page.until(lambda: page.text("state") == "ready")
        await page.type("prompt", "hi" + Keys.ENTER)
        await page.until(lambda: page.notes())
        assert page.messages()[-1] == "one two three"


async def test_the_engine_s_load_is_drawn(page: Page) -> None:
    class Metrics(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(METRICS.encode())

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's name
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metrics) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/metrics"
        async with serve_gateway(engine_metrics=[address, "http://127.0.0.1:1/metrics"]) as gateway:
            (engine,) = (await gateway.http.get("/load")).json()["engines"]
            assert engine.pop("engine") == f"127.0.0.1:{server.server_port}"
            assert engine == {
                "num_running": 3,
                "num_waiting": 2,
                "kv_cache_usage": 0.25,
                "num_prompt_tokens": 70,
                "num_output_tokens": 50,
            }
            await page.open(gateway)
            await page.until(lambda: page.at("charts").is_displayed())
            captions = [item.text for item in page.browser.find_elements(By.TAG_NAME, "figcaption")]
            assert captions[0].replace("\n", " ") == "Requests 3 running, 2 waiting"
            assert "25.0 %" in captions[1]
            charts = page.browser.find_elements(By.CSS_SELECTOR, "svg[role=img]")
            assert charts[0].get_attribute("aria-label") == ("Requests: 3 running, 2 waiting; at most 3 in two minutes")
        server.shutdown()


async def test_every_control_has_a_name_and_both_themes_are_there(page: Page) -> None:
    async with serve_gateway() as gateway:
        await page.open(gateway)
        for control in page.browser.find_elements(By.CSS_SELECTOR, "input, select, textarea, button"):
            assert control.accessible_name, control.get_attribute("outerHTML")
        colours = set()
        for _ in range(2):
            await page.click("theme")
            colours.add(page.browser.find_element(By.TAG_NAME, "body").value_of_css_property("background-color"))
        assert len(colours) == 2


async def test_parts_that_are_none_are_not_found() -> None:
    async with serve_gateway() as gateway:
        for name in ("settings.py", "..%2Fkeys.py", "index"):
            assert (await gateway.http.get(f"/page/{name}")).status_code == 404, name
        policy = (await gateway.http.get("/")).headers["content-security-policy"]
        assert "default-src 'none'" in policy
