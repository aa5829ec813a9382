# SPDX-License-Identifier: Apache-2.0
"""`wavetrain gateway`: OpenAI's API in front of running Triton servers."""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import resource
import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wavetrain_cli.engine_flags import FlagParser
from wavetrain_cli.errors import CommandError
from wavetrain_engine.environment import Environment

if TYPE_CHECKING:
    from wavetrain_gateway.settings import GatewaySettings


def create_parser() -> FlagParser:
    """The parser of `wavetrain gateway`. Flags not given leave the file's values, and the defaults, alone."""
    parser = FlagParser(
        prog="wavetrain gateway",
        description="Answers OpenAI's API from running Triton servers, until Ctrl-C or SIGTERM.",
    )
    parser.add_argument(
        "--upstream",
        action="append",
        metavar="HOST:PORT",
        help="gRPC address of a Triton server; give it again for more replicas (default: 127.0.0.1:8001)",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="gateway.toml; flags go before what it says")
    parser.add_argument("--keys", type=Path, metavar="FILE", help="API keys, made with `wavetrain keys create`")
    parser.add_argument("--redis", metavar="URL", help="Redis server on which gateways share the limits of their keys")
    parser.add_argument(
        "--routing", type=Path, metavar="FILE", help="several models, replicas and rules, in place of --upstream"
    )
    parser.add_argument("--host", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, help="(default: 9000; 0: any free one)")
    parser.add_argument("--served-model-name", metavar="NAME", help="what callers name the model (default: wavetrain)")
    parser.add_argument(
        "--engine-metrics",
        action="append",
        metavar="URL",
        help="metrics page of a Triton server, http://HOST:8002/metrics, for GET /load and the charts of the page",
    )
    parser.add_argument(
        "--otlp-traces-endpoint",
        metavar="URL",
        help="where spans are sent, by OTLP over HTTP: http://collector:4318/v1/traces; needs the extra otel",
    )
    parser.add_argument(
        "--drain-s", type=float, metavar="SECONDS", help="how long running requests may go on at the end"
    )
    parser.add_argument(
        "--insecure", action="store_true", help="listen on other than loopback addresses without keys all the same"
    )
    return parser


def main(arguments: list[str], environment: Environment) -> int:
    """Runs the subcommand. Raises CommandError for what a person can mend."""
    return _serve(check_gateway(arguments, environment), environment)


def check_gateway(arguments: list[str], environment: Environment) -> GatewaySettings:
    """The settings that a command line asks for.

    Raises:
        CommandError: they cannot be, or would let strangers in.
    """
    given = create_parser().parse(arguments)
    settings = read_settings(given)
    if not given.insecure and is_exposed(settings, environment):
        raise CommandError(
            f"--host {settings.listen.host}: whoever reaches this address could use the models; configure keys "
            "(docs/gateway.md), or say --insecure",
            exit_code=2,
        )
    if settings.keys.redis_url is not None and settings.keys.file is None:
        raise CommandError("limits belong to keys: a Redis server for them needs a key file (--keys)", exit_code=2)
    if settings.admin.port is not None and environment.admin_key is None:
        raise CommandError("the admin API needs a key: set WAVETRAIN_ADMIN_KEY", exit_code=2)
    return settings


def read_settings(given: argparse.Namespace) -> GatewaySettings:
    """The file's settings with the flags' in their place.

    Raises:
        CommandError: a file or a value that cannot be; the message says which.
    """
    from pydantic import ValidationError

    from wavetrain_gateway.settings import GatewaySettings
    from wavetrain_gateway.toml_file import FileError, describe

    try:
        base = GatewaySettings() if given.config is None else GatewaySettings.read(given.config)
        values = base.model_dump(exclude_unset=True, by_alias=True)
        listen: dict[str, Any] = values.setdefault("listen", {})
        flags = {"host": given.host, "port": given.port, "drain_timeout_s": given.drain_s}
        listen |= {name: value for name, value in flags.items() if value is not None}
        tables = {
            "keys": {"file": given.keys, "redis_url": given.redis},
            "routing": {"file": given.routing},
            "trace": {"otlp_endpoint": given.otlp_traces_endpoint},
        }
        for name, flags in tables.items():
            table: dict[str, Any] = values.setdefault(name, {})
            table |= {key: value for key, value in flags.items() if value is not None}
        if given.upstream:
            values["upstreams"] = tuple(given.upstream)
        if given.engine_metrics:
            values["engine_metrics"] = tuple(given.engine_metrics)
        if given.served_model_name is not None:
            values["model"] = given.served_model_name
        return GatewaySettings.model_validate(values)
    except FileError as error:
        raise CommandError(str(error), exit_code=2) from None
    except ValidationError as error:
        raise CommandError(describe(error, GatewaySettings), exit_code=2) from None


def is_exposed(settings: GatewaySettings, environment: Environment) -> bool:
    """Whether others than this machine could use the models without a key."""
    if settings.keys.file is not None or environment.api_keys is not None:
        return False
    host = settings.listen.host
    try:
        return host != "localhost" and not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return True


def _serve(settings: GatewaySettings, environment: Environment) -> int:
    from wavetrain_gateway.request_log import install_log

    install_log(settings.log)
    # Each connection is a file, and 1,024 of them, what processes usually begin with, are few.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    listener = _listen(settings.listen.host, settings.listen.port)
    admin = None if settings.admin.port is None else _listen(settings.admin.host, settings.admin.port)
    # A signal before the loop takes them must end the process as one after it does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    host, port = listener.getsockname()[:2]
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    asyncio.run(_run(settings, environment, listener, admin, f"wavetrain: gateway ready on {address}/v1"))
    return 0


def _listen(host: str, port: int) -> socket.socket:
    from wavetrain_gateway.server import listen_on

    try:
        return listen_on(host, port)
    except OSError as error:
        message = f"cannot listen on {host}:{port} ({error.strerror}); choose another port or host"
        raise CommandError(message) from None


async def _run(
    settings: GatewaySettings,
    environment: Environment,
    listener: socket.socket,
    admin: socket.socket | None,
    ready_line: str,
) -> None:
    from wavetrain_gateway.assembly import build_admin, build_gateway
    from wavetrain_gateway.server import GatewayServer

    try:
        app = build_gateway(settings, api_keys=environment.api_keys)
        admin_app = None if admin is None else build_admin(app, environment.admin_key or "")
    except (OSError, ValueError) as error:
        raise CommandError(str(error), exit_code=2) from None
    server = GatewayServer(app, on_ready=lambda: print(ready_line, flush=True))
    await server.serve([listener], admin=None if admin is None else (admin_app, admin))
