# SPDX-License-Identifier: Apache-2.0
"""The engine's options as command-line flags: generated from EngineConfig, so that an option exists in one place."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

from wavetrain_cli.errors import CommandError
from wavetrain_engine.config import EngineConfig, engine_options, option_type

# The checkpoint is an argument of its own, never a flag.
_NOT_A_FLAG = frozenset({"model"})


class FlagParser(argparse.ArgumentParser):
    """An argument parser that raises CommandError, and names the nearest flag it knows for one that it does not."""

    def __init__(self, *, prog: str, description: str) -> None:
        # No abbreviations: what works today must not change its meaning when a flag is added.
        super().__init__(prog=prog, description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise CommandError(f"{message}; see {self.prog} --help", exit_code=2)

    def parse(self, arguments: list[str]) -> argparse.Namespace:
        """Parses all arguments.

        Raises:
            CommandError: an unknown flag, a missing or malformed value.
        """
        namespace, unknown = self.parse_known_args(arguments)
        if unknown:
            raise CommandError(self._explain(unknown[0]), exit_code=2)
        return namespace

    def _explain(self, argument: str) -> str:
        if not argument.startswith("-"):
            return f"unexpected argument {argument!r}; see {self.prog} --help"
        name = argument.partition("=")[0]
        known = [flag for action in self._actions for flag in action.option_strings]
        return unknown_name("flag", name, known, advice=f"see {self.prog} --help")


def unknown_name(what: str, name: str, known: Iterable[str], *, advice: str) -> str:
    """The message for a name nobody knows: with the nearest known one, else with the advice."""
    nearest = difflib.get_close_matches(name, list(known), n=1)
    return f"unknown {what} {name}; did you mean {nearest[0]}?" if nearest else f"unknown {what} {name}; {advice}"


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """Adds a flag per engine option. Those not given stay out of the namespace."""
    group = parser.add_argument_group("engine flags")
    for name, option in engine_options().items():
        if name in _NOT_A_FLAG:
            continue
        flag = f"--{name.replace('_', '-')}"
        default = "" if option.default is None else f" (default: {option.default})"
        help_text = str(option.metadata["help"]).replace("%", "%%") + default
        kind = option_type(name)
        if kind is bool:
            action = argparse.BooleanOptionalAction
            group.add_argument(flag, action=action, default=argparse.SUPPRESS, help=help_text)
        else:
            metavar = kind.__name__.upper()
            choices = option.metadata["choices"]
            group.add_argument(
                flag,
                type=kind,
                choices=choices,
                metavar=None if choices else metavar,
                default=argparse.SUPPRESS,
                help=help_text,
            )


def engine_config(arguments: argparse.Namespace, *, model_path: Path | None, base: EngineConfig) -> EngineConfig:
    """The configuration that the flags ask for, over `base`.

    Raises:
        ConfigError: a value is out of range.
    """
    given = {name: value for name, value in vars(arguments).items() if name in engine_options()}
    if model_path is not None:
        given["model"] = str(model_path)
    return EngineConfig.from_flags(given, base)


def has_engine_flags(arguments: argparse.Namespace) -> bool:
    """Whether any engine flag was given."""
    return any(name in engine_options() for name in vars(arguments))
