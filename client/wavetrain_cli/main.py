# SPDX-License-Identifier: Apache-2.0
"""The `wavetrain` command: finds the subcommand, and turns what went wrong into one line and an exit code.

A subcommand's module is imported when it is called for, so that `wavetrain --help` and a client-only install need
none of the server's packages. Exit codes: 0 done, 1 it failed, 2 the command line is wrong, 130 interrupted.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Protocol, cast

from wavetrain_cli.errors import CommandError
from wavetrain_engine.environment import Environment
from wavetrain_engine.errors import WavetrainError

# name: (module, what it does)
_COMMANDS = {
    "serve": ("wavetrain_cli.serve", "serve a model on the Triton server"),
    "gateway": ("wavetrain_cli.gateway", "answer OpenAI's API from running Triton servers"),
    "keys": ("wavetrain_cli.keys", "make API keys of the gateway, and keep the file of their hashes"),
    "run": ("wavetrain_cli.run", "complete a prompt in the terminal, or talk to a model"),
    "repo": ("wavetrain_cli.repo", "build a Triton model repository for a checkpoint"),
    "quantize": ("wavetrain_cli.quantize", "make a quantized checkpoint of one that is not"),
    "doctor": ("wavetrain_cli.doctor", "tell what this machine can run, and what to do about the rest"),
}
# Packages of the server extra, by import name.
_SERVER_PACKAGES = frozenset({"torch", "safetensors", "tokenizers", "jinja2", "msgspec", "tomli", "numpy"})
# And of the gateway extra.
_GATEWAY_PACKAGES = frozenset(
    {"starlette", "uvicorn", "httptools", "websockets", "pydantic", "pydantic_core", "prometheus_client", "limits"}
)


class _Command(Protocol):
    def main(self, arguments: list[str], environment: Environment) -> int:
        """Runs the subcommand and returns the exit code."""
        ...


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line (`arguments`, else the process's) and returns the exit code.

    Users' errors are printed, not raised, except where WAVETRAIN_LOG_LEVEL is debug.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    is_debugging = False
    try:
        environment = Environment.read()
        is_debugging = environment.log_level == "debug"
        return _dispatch(given, environment)
    except CommandError as error:
        return _report(error, error.exit_code, is_debugging=is_debugging)
    except WavetrainError as error:
        return _report(error, 1, is_debugging=is_debugging)
    except ModuleNotFoundError as error:
        package = "" if error.name is None else error.name.partition(".")[0]
        if package not in _SERVER_PACKAGES | _GATEWAY_PACKAGES:
            raise
        extra = "gateway" if package in _GATEWAY_PACKAGES else "server"
        message = f"this needs the {extra}'s packages ({error.name} is missing): pip install 'wavetrain[{extra}]'"
        return _report(CommandError(message), 1, is_debugging=is_debugging)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read our output went away (`| head`). Python would complain once more while closing it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        # A full disk, a folder that cannot be written: the system's own words, with the file they are about.
        place = f"{error.filename}: " if error.filename else ""
        return _report(error, 1, is_debugging=is_debugging, message=f"{place}{error.strerror or error}")


def _dispatch(arguments: list[str], environment: Environment) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if arguments else 2
    name, *rest = arguments
    if name in ("-V", "--version"):
        print(f"wavetrain {_version()}")
        return 0
    if name not in _COMMANDS:
        # difflib is slow to import for something that is hardly ever needed.
        from wavetrain_cli.engine_flags import unknown_name

        what = "flag" if name.startswith("-") else "command"
        known = ["--help", "--version"] if what == "flag" else _COMMANDS
        raise CommandError(unknown_name(what, name, known, advice="see wavetrain --help"), exit_code=2)
    command = cast("_Command", importlib.import_module(_COMMANDS[name][0]))
    return command.main(rest, environment)


def _help() -> str:
    rows = [f"  {name:<8} {text}" for name, (_, text) in _COMMANDS.items()]
    return "\n".join(
        [
            "usage: wavetrain COMMAND [ARGUMENTS]",
            "",
            "An LLM server that lives in an NVIDIA Triton Inference Server model repository.",
            "",
            *rows,
            "",
            "  wavetrain COMMAND --help   tells the command's arguments",
            "  wavetrain --version        tells the version",
            "",
            "environment: WAVETRAIN_LOG_LEVEL, WAVETRAIN_CACHE_DIR, WAVETRAIN_KERNELS",
        ]
    )


def _version() -> str:
    try:
        return version("wavetrain")
    except PackageNotFoundError:
        return "from a source tree, not installed"


def _report(error: Exception, exit_code: int, *, is_debugging: bool, message: str | None = None) -> int:
    if is_debugging:
        raise error
    print(f"wavetrain: {message or error}", file=sys.stderr)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
