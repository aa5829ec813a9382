# SPDX-License-Identifier: Apache-2.0
"""`wavetrain repo build`: a model repository bound to a checkpoint, for a plain tritonserver."""

from __future__ import annotations

from pathlib import Path

from wavetrain_cli.checkpoint_check import check_checkpoint
from wavetrain_cli.engine_flags import FlagParser, add_engine_flags, engine_config, unknown_name
from wavetrain_cli.errors import CommandError
from wavetrain_cli.repository import build_repository, resolve_model_path
from wavetrain_engine.config import EngineConfig
from wavetrain_engine.environment import Environment

_USAGE = "usage: wavetrain repo build MODEL --out DIR [--force] [engine flags]; see wavetrain repo build --help"


def main(arguments: list[str], environment: Environment) -> int:
    """Runs the subcommand."""
    del environment
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE)
        return 0 if arguments else 2
    if arguments[0] != "build":
        raise CommandError(
            unknown_name("subcommand", f"repo {arguments[0]}", ["repo build"], advice=_USAGE), exit_code=2
        )
    parser = FlagParser(
        prog="wavetrain repo build",
        description="Writes a Triton model repository that serves the checkpoint in MODEL; that stays where it is.",
    )
    parser.add_argument(
        "model_path", metavar="MODEL", help="checkpoint directory (Hugging Face layout, safetensors), or a GGUF file"
    )
    parser.add_argument("--out", metavar="DIR", required=True, help="where the repository is written")
    parser.add_argument("--force", action="store_true", help="replace a repository that is already there")
    add_engine_flags(parser)
    given = parser.parse(arguments[1:])

    model_path, out = resolve_model_path(given.model_path), Path(given.out).expanduser().absolute()
    config = engine_config(given, model_path=model_path, base=EngineConfig())
    check_checkpoint(config)
    build_repository(config, out, force=given.force)
    print(f"{out}: serves {model_path}; start it with: tritonserver --model-repository={out}")
    return 0
