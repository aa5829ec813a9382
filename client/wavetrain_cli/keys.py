# SPDX-License-Identifier: Apache-2.0
"""`wavetrain keys`: makes API keys, and keeps the file of their hashes."""

from __future__ import annotations

import argparse
import getpass
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from wavetrain_cli.engine_flags import FlagParser, unknown_name
from wavetrain_cli.errors import CommandError
from wavetrain_engine.environment import Environment

if TYPE_CHECKING:
    from wavetrain_gateway.key_entry import KeyEntry, KeyTable

# Flags of `create` that are settings of the entry, by the entry's names.
_SETTINGS = ("tier", "models", "requests_per_minute", "tokens_per_minute", "max_streams", "cache_salt", "expires")
_BLOCK = re.compile(r"^(?=\[)", re.MULTILINE)


def main(arguments: list[str], environment: Environment) -> int:
    """Runs the subcommand. Raises CommandError for what a person can mend."""
    del environment
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_HELP, end="")
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in _COMMANDS:
        raise CommandError(
            unknown_name("command", f"keys {name}", [f"keys {known}" for known in _COMMANDS], advice=_ADVICE),
            exit_code=2,
        )
    description, add_arguments, run = _COMMANDS[name]
    parser = FlagParser(prog=f"wavetrain keys {name}", description=description)
    add_arguments(parser)
    return run(parser.parse(rest))


def _add_create(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="what people call the key")
    parser.add_argument("--append", type=Path, metavar="FILE", help="add the entry to this TOML file")
    parser.add_argument("--tier", help="premium, default, batch, or one of the file's own")
    parser.add_argument(
        "--model", dest="models", action="append", metavar="NAME", help="allow this model; may be repeated"
    )
    parser.add_argument("--requests-per-minute", type=int, metavar="N")
    parser.add_argument("--tokens-per-minute", type=int, metavar="N", help="of prompts and outputs together")
    parser.add_argument("--max-streams", type=int, metavar="N", help="sequences that run at once")
    parser.add_argument("--cache-salt", metavar="TEXT", help="keys of one salt share the prefix cache")
    parser.add_argument("--expires", metavar="DATE", help="2027-01-31, or with a time: 2027-01-31T12:00:00Z")


def _add_list(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("--json", action="store_true", help="print it as JSON")


def _add_revoke(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("file", type=Path, metavar="FILE")


def _create(given: argparse.Namespace) -> int:
    from wavetrain_gateway.keys import hash_key, new_key

    key = new_key()
    settings = {name: value for name in _SETTINGS if (value := getattr(given, name)) is not None}
    block = _as_toml({"name": given.name, "sha256": hash_key(key), **settings})
    if given.append is None:
        # A tier of the file's own cannot be known here.
        _parse(block if given.tier is None else f"[tier.{json.dumps(given.tier)}]\n{block}", "the key")
        print(f"{key}\n\n# The key is shown only now. Its entry for the key file:\n{block}", end="")
        return 0
    if given.append.suffix == ".json":
        raise CommandError("entries are added to TOML files only; print it without --append, and edit the file")
    old = given.append.read_text(encoding="utf-8") if given.append.exists() else ""
    text = f"{old.rstrip()}\n\n{block}" if old.strip() else block
    _parse(text, given.append.name)
    _write(given.append, text)
    print(key)
    return 0


def _hash(given: argparse.Namespace) -> int:  # noqa: ARG001 - it has no arguments, so that no key is one
    from wavetrain_gateway.keys import hash_key

    # Everybody on a machine can read the arguments of its processes.
    key = getpass.getpass("key: ") if sys.stdin.isatty() else sys.stdin.read()
    if not key.strip():
        raise CommandError("no key was given; type it, or pipe it in")
    print(hash_key(key.strip()))
    return 0


def _list(given: argparse.Namespace) -> int:
    table = _read(given.file)
    rows = [_row(entry, table) for entry in table.keys]
    if given.json:
        print(json.dumps(rows, indent=2))
        return 0
    columns = ["name", "id", "state", "tier", "models", "requests/min", "tokens/min", "streams", "expires"]
    from rich.console import Console
    from rich.table import Table

    shown = Table(*columns)
    for row in rows:
        shown.add_row(*(_cell(row[column]) for column in columns))
    Console().print(shown)
    return 0


def _revoke(given: argparse.Namespace) -> int:
    table = _read(given.file)
    if given.name not in [entry.name for entry in table.keys]:
        names = ", ".join(entry.name for entry in table.keys)
        raise CommandError(f"{given.file.name}: there is no key {given.name!r}; its keys are {names}")
    if len(table.keys) == 1:
        raise CommandError(
            f"{given.file.name}: {given.name!r} is the only key, and a gateway keeps its old keys when it finds none; "
            "add another first, or set is_enabled = false"
        )
    text = given.file.read_text(encoding="utf-8")
    blocks = _BLOCK.split(text)
    name = re.compile(rf"^\s*name\s*=\s*(['\"]){re.escape(given.name)}\1", re.MULTILINE)
    kept = "".join(block for block in blocks if not (block.startswith("[[key]]") and name.search(block)))
    wanted = [entry for entry in table.keys if entry.name != given.name]
    if given.file.suffix == ".json" or _parse(kept, given.file.name).keys != wanted:
        raise CommandError(
            f"{given.file.name}: the entry of {given.name!r} is not written as usual; take it out by hand"
        )
    _write(given.file, kept)
    return 0


def _read(path: Path) -> KeyTable:
    return _parse(path.read_text(encoding="utf-8"), path.name)


def _parse(text: str, name: str) -> KeyTable:
    from wavetrain_gateway.keys import parse_keys
    from wavetrain_gateway.toml_file import FileError

    try:
        return parse_keys(text.encode(), name)
    except FileError as error:
        raise CommandError(str(error)) from None


def _write(path: Path, text: str) -> None:
    """Puts the text in the file's place at once: a gateway that watches it never sees a half."""
    mode = path.stat().st_mode & 0o777 if path.exists() else 0o600
    path = path.resolve()
    new = path.with_name(f".{path.name}.new")
    try:
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def _as_toml(entry: dict[str, Any]) -> str:
    lines = ["[[key]]"]
    for name, value in entry.items():
        # Lists of strings, strings and integers are the same in JSON and TOML.
        lines.append(f"{name} = {json.dumps(value, ensure_ascii=False)}")
    return "\n".join(lines) + "\n"


def _row(entry: KeyEntry, table: KeyTable) -> dict[str, Any]:
    from datetime import datetime, timezone

    limits = entry.limits(table.tier(entry.tier))
    state = "valid" if entry.is_valid_at(datetime.now(timezone.utc)) else "expired" if entry.is_enabled else "disabled"
    return {
        "name": entry.name,
        "id": entry.id,
        "state": state,
        "tier": entry.tier,
        "models": sorted(entry.models) if entry.models is not None else None,
        "requests/min": limits.requests_per_minute,
        "tokens/min": limits.tokens_per_minute,
        "streams": limits.max_streams,
        "expires": entry.expires.isoformat() if entry.expires is not None else None,
    }


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return ", ".join(cast("list[str]", value)) if isinstance(value, list) else str(value)


_ADVICE = "see wavetrain keys --help"
_COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int]]] = {
    "create": ("Makes a key, and prints it with its entry for the key file.", _add_create, _create),
    "hash": ("Reads a key from the terminal or a pipe, and prints its hash.", lambda _: None, _hash),
    "list": ("Shows what a key file says.", _add_list, _list),
    "revoke": ("Takes a key out of a key file; running gateways follow by themselves.", _add_revoke, _revoke),
}
_HELP = (
    "usage: wavetrain keys COMMAND [ARGUMENTS]\n\n"
    "API keys of the gateway. A key is shown once and stored nowhere: its file holds hashes.\n\n"
    + "".join(f"  {name:<8} {description}\n" for name, (description, _, _) in _COMMANDS.items())
)
