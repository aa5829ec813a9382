# SPDX-License-Identifier: Apache-2.0
"""Which names a gateway without keys answers to.

A page can make its reader's browser talk to loopback under the page's own name (DNS rebinding); then its origin is the
gateway's. So a gateway that listens on loopback, and asks for no key, answers to loopback's own names only.
"""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from wavetrain_gateway.errors import Forbidden
from wavetrain_gateway.settings import ListenSettings

_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


def loopback_hosts(listen: ListenSettings) -> frozenset[str] | None:
    """The names that are answered to; None: all, where others than this machine may reach the address."""
    try:
        is_loopback = listen.host == "localhost" or ipaddress.ip_address(listen.host).is_loopback
    except ValueError:
        is_loopback = False
    return _LOOPBACK | {listen.host, *listen.allowed_hosts} if is_loopback else None


def check_host(header: str, allowed: frozenset[str] | None) -> None:
    """Refuses a request that was sent to another name.

    Raises:
        Forbidden: it was.
    """
    if allowed is None:
        return
    try:
        name = urlsplit(f"//{header}").hostname
    except ValueError:
        name = None
    if name not in allowed:
        raise Forbidden(
            "this gateway has no keys and answers to loopback's names only; configure keys, or listen.allowed_hosts",
            code="host_not_allowed",
        )
