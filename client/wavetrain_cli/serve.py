# SPDX-License-Identifier: Apache-2.0
"""`wavetrain serve`: puts repository, Triton server, gateway and supervisor together."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from wavetrain_cli.checkpoint_check import check_checkpoint
from wavetrain_cli.display import Display
from wavetrain_cli.engine_flags import FlagParser, add_engine_flags, engine_config, has_engine_flags
from wavetrain_cli.errors import CommandError
from wavetrain_cli.gateway import check_gateway, is_exposed
from wavetrain_cli.gateway_process import FrontedService, GatewayProcess
from wavetrain_cli.ports import check_ports
from wavetrain_cli.repository import ENGINE_TOML, build_repository, packaged_repository, resolve_model_path
from wavetrain_cli.server_log import ServerLog
from wavetrain_cli.shared_memory import SharedMemory
from wavetrain_cli.supervisor import Service, Supervisor, SupervisorPolicy
from wavetrain_cli.triton_server import (
    ServerOptions,
    command_line,
    find_triton_server,
    has_nvidia_device,
    server_environment,
)
from wavetrain_cli.triton_service import TritonService, example_request, example_token_request, local_host
from wavetrain_engine.config import EngineConfig
from wavetrain_engine.environment import Environment

_DEMO_PROMPT = "def __init__(self"
_PROMPT = "Once upon a time"
_GATEWAY_TIMEOUT_S = 20.0
_DEFAULT_MODEL_NAME = re.compile(r"[^A-Za-z0-9._-]+|^[^A-Za-z0-9]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Repository:
    """What is served: the repository, its configuration, and a prompt that suits the model."""

    path: Path
    config: EngineConfig
    prompt: str


def create_parser() -> FlagParser:
    """The parser of `wavetrain serve`."""
    parser = FlagParser(
        prog="wavetrain serve",
        description="Serves a checkpoint on the Triton server, until Ctrl-C or SIGTERM; by default the demo model.",
    )
    parser.add_argument(
        "model_path",
        metavar="MODEL",
        nargs="?",
        help="checkpoint directory (Hugging Face layout, safetensors), or a GGUF file",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--http-port", type=int, default=8000, metavar="PORT", help="(default: %(default)s)")
    parser.add_argument("--grpc-port", type=int, default=8001, metavar="PORT", help="(default: %(default)s)")
    parser.add_argument("--metrics-port", type=int, default=8002, metavar="PORT", help="(default: %(default)s)")
    parser.add_argument(
        "--gateway-port", type=int, default=9000, metavar="PORT", help="of the OpenAI API (default: %(default)s)"
    )
    parser.add_argument("--no-gateway", action="store_true", help="leave the OpenAI API out")
    parser.add_argument(
        "--gateway-config", type=Path, metavar="FILE", help="gateway.toml: keys, limits, caps (docs/gateway.md)"
    )
    parser.add_argument(
        "--served-model-name",
        metavar="NAME",
        help="what callers of the OpenAI API name the model (default: its folder)",
    )
    parser.add_argument(
        "--grace-s",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="how long running requests may go on after SIGINT or SIGTERM (default: %(default)s)",
    )
    parser.add_argument("--verbose", action="store_true", help="show the server's whole log")
    add_engine_flags(parser)
    return parser


def main(arguments: list[str], environment: Environment) -> int:
    """Runs the subcommand. Raises CommandError and WavetrainError for what a person can mend."""
    given = create_parser().parse(arguments)
    if not given.grace_s >= 0:
        raise CommandError(f"--grace-s: expected seconds >= 0, got {given.grace_s}", exit_code=2)
    # What can be told without starting anything is told first.
    repository = _prepare_repository(given, environment.cache_dir)
    server = find_triton_server(environment.cache_dir)
    has_gateway = not given.no_gateway and not repository.config.model.skip_tokenizer_init
    ports = {"--http-port": given.http_port, "--grpc-port": given.grpc_port, "--metrics-port": given.metrics_port}
    check_ports(given.host, ports | ({"--gateway-port": given.gateway_port} if has_gateway else {}))
    log_path = environment.cache_dir / "logs" / f"serve-{given.http_port}.log"
    log_path.parent.mkdir(parents=True, exist_ok=True)
    display, host = Display(), local_host(given.host)
    gateway = _gateway(given, repository, host, environment, display.say) if has_gateway else None
    shared_memory = SharedMemory()
    options = ServerOptions(
        model_repository=repository.path,
        host=given.host,
        http_port=given.http_port,
        grpc_port=given.grpc_port,
        metrics_port=given.metrics_port,
        shm_prefix=shared_memory.prefix,
        is_verbose=given.verbose,
    )
    service: Service = TritonService(host=host, http_port=given.http_port, engine_config=repository.path / ENGINE_TOML)
    with log_path.open("w", encoding="utf-8") as log_file:
        log = ServerLog(
            file=log_file,
            show=display.log,
            show_progress=display.progress,
            has_gpu=has_nvidia_device(),
            is_verbose=given.verbose,
        )
        supervisor = Supervisor(
            command=command_line(server, options),
            environment=server_environment(server, os.environ),
            service=service if gateway is None else FrontedService(service, gateway),
            log=log,
            say=display.say,
            on_ready=lambda: display.ready(_ready_text(given, host, repository, gateway)),
            on_ended=shared_memory.remove_regions,
            companions=frozenset if gateway is None else lambda: gateway.pids,
            policy=SupervisorPolicy(grace_s=given.grace_s),
        )
        try:
            if gateway is not None:
                gateway.start()
            return supervisor.run()
        except CommandError as error:
            raise CommandError(f"{error} (the whole log: {log_path})", exit_code=error.exit_code) from error
        finally:
            if gateway is not None:
                gateway.close()
            display.stop_progress()
            shared_memory.close()


def _prepare_repository(given: argparse.Namespace, cache_dir: Path) -> _Repository:
    if given.model_path is None:
        packaged = packaged_repository()
        config, prompt = EngineConfig.load(packaged / ENGINE_TOML), _DEMO_PROMPT
        if not has_engine_flags(given):
            return _Repository(path=packaged, config=config, prompt=prompt)
        config = engine_config(given, model_path=None, base=config)
    else:
        model_path, prompt = resolve_model_path(given.model_path), _PROMPT
        config = engine_config(given, model_path=model_path, base=EngineConfig())
    check_checkpoint(config)
    # The port is ours alone, so no other server reads the repository that is replaced here.
    path = cache_dir / "repositories" / f"serve-{given.http_port}"
    build_repository(config, path, force=True)
    return _Repository(path=path, config=config, prompt=prompt)


def _gateway(
    given: argparse.Namespace, repository: _Repository, host: str, environment: Environment, say: Callable[[str], None]
) -> GatewayProcess | None:
    """The gateway in front of the server; None where its packages are missing and it was not asked for.

    Raises:
        CommandError: its settings cannot be; told before anything is started.
    """
    name = given.served_model_name or _DEFAULT_MODEL_NAME.sub("-", Path(repository.config.model.model).name) or "model"
    server = f"[{host}]" if ":" in host else host
    arguments = ["--host", given.host, "--port", str(given.gateway_port), "--upstream", f"{server}:{given.grpc_port}"]
    arguments += ["--engine-metrics", f"http://{server}:{given.metrics_port}/metrics"]
    arguments += ["--served-model-name", name, "--drain-s", str(given.grace_s)]
    if given.gateway_config is not None:
        arguments += ["--config", str(given.gateway_config.absolute())]
    traces_endpoint = repository.config.observability.otlp_traces_endpoint
    if traces_endpoint is not None:
        arguments += ["--otlp-traces-endpoint", traces_endpoint]
    # Who may reach the Triton server's ports on this host needs no key either: the gateway's is no reason to stop.
    try:
        settings = check_gateway([*arguments, "--insecure"], environment)
    except ModuleNotFoundError as error:
        if given.gateway_config is not None:
            raise
        say(
            f"without the OpenAI API, as {error.name} is missing: pip install 'wavetrain[gateway]', or say --no-gateway"
        )
        return None
    if is_exposed(settings, environment):
        say(
            f"the gateway listens on {given.host} and asks for no key; --gateway-config can name keys (docs/gateway.md)"
        )
        arguments.append("--insecure")
    log_path = environment.cache_dir / "logs" / f"gateway-{given.gateway_port}.log"
    return GatewayProcess(arguments, log_path=log_path, say=say)


def _ready_text(given: argparse.Namespace, host: str, repository: _Repository, gateway: GatewayProcess | None) -> str:
    if repository.config.model.skip_tokenizer_init:
        example = example_token_request(host=host, http_port=given.http_port)
    else:
        example = example_request(host=host, http_port=given.http_port, prompt=repository.prompt)
    openai = ""
    if gateway is not None and gateway.wait_until_ready(host, given.gateway_port, _GATEWAY_TIMEOUT_S):
        gateway_url = f"http://{given.host}:{given.gateway_port}"
        openai = f"page {gateway_url}/, OpenAI API {gateway_url}/v1, "
    return (
        f"on http://{given.host}:{given.http_port} ({openai}gRPC {given.host}:{given.grpc_port}, metrics "
        f"http://{given.host}:{given.metrics_port}/metrics); try: {example}"
    )
