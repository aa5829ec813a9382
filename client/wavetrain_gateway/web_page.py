# SPDX-License-Identifier: Apache-2.0
"""GET / and what the page there consists of: files beside this one, nothing from elsewhere."""

from __future__ import annotations

from importlib import resources

from wavetrain_gateway.errors import NotFound
from wavetrain_gateway.exchange import Exchange
from wavetrain_gateway.services import Services

_MEDIA = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


async def index(exchange: Exchange, services: Services) -> None:
    """GET /: the page. Whoever may not use the API sees it too, and is asked for a key."""
    await _answer(exchange, "index.html")


async def part(exchange: Exchange, services: Services) -> None:
    """GET /page/{name}: a file of the page."""
    await _answer(exchange, str(exchange.scope["path_params"]["name"]))


async def _answer(exchange: Exchange, name: str) -> None:
    folder = resources.files("wavetrain_gateway").joinpath("page")
    # By its name among those that are there: no path of a caller's ever becomes a path of ours.
    for file in folder.iterdir():
        if file.name == name and file.is_file():
            media = _MEDIA[name[name.rindex(".") :]]
            await exchange.answer(file.read_bytes(), media, headers=_HEADERS)
            return
    raise NotFound("the page has no such part; GET / is where it begins", code="unknown_route")
