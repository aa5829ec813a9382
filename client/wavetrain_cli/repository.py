# SPDX-License-Identifier: Apache-2.0
"""Model repositories: the one that comes with Wavetrain, and copies of it bound to another checkpoint.

A bound repository is the packaged one without the demo checkpoints, plus an engine.toml that names the checkpoint by
its absolute path. It is written beside its place and moved there whole, so a reader never sees half of one.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from wavetrain_cli.errors import CommandError
from wavetrain_engine.config import EngineConfig
from wavetrain_engine.errors import CheckpointError
from wavetrain_engine.model_location import ModelLocation

ENGINE_TOML = Path("engine", "1", "engine.toml")
_ENGINE_PBTXT = Path("engine", "config.pbtxt")
_HEADER = "# Written by `wavetrain repo build`; keys and defaults: EngineConfig in wavetrain_engine.config.\n\n"


def packaged_repository() -> Path:
    """The model repository with the demo model: the checkout's, or the one inside the installed wheel.

    Raises:
        CommandError: neither is there, so the installation is broken.
    """
    here = Path(__file__).resolve().parent
    for candidate in (here.parents[1] / "model_repository", here / "model_repository"):
        if (candidate / _ENGINE_PBTXT).is_file():
            return candidate
    raise CommandError("the packaged model repository is missing; install wavetrain again")


def resolve_model_path(named: str) -> Path:
    """The absolute path of a checkpoint directory or a GGUF file.

    Raises:
        CommandError: there is none.
    """
    path = Path(named).expanduser().absolute()
    try:
        return ModelLocation.find(path).path
    except CheckpointError as error:
        raise CommandError(f"{path}: {error}") from error


def build_repository(config: EngineConfig, out: Path, *, force: bool = False) -> None:
    """Writes a repository bound to `config`, whose `model.model` is an absolute path, to `out`.

    An empty or missing `out` is filled. A model repository of ours is replaced if `force`.

    Raises:
        CommandError: `out` holds something else, or a repository and not `force`, or cannot be written.
    """
    source = packaged_repository()
    _check_target(out, source, force=force)
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        _copy_models(source, temporary)
        (temporary / ENGINE_TOML).write_text(_HEADER + config.to_toml(), encoding="utf-8")
        if out.exists():
            shutil.rmtree(out)
        temporary.rename(out)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CommandError(f"cannot write the model repository {out}: {error.strerror}") from error


def _check_target(out: Path, source: Path, *, force: bool) -> None:
    if out.resolve() == source:
        raise CommandError("that is the packaged model repository itself; choose another --out")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise CommandError(f"{out} is not a directory; choose another --out")
    if not out.exists() or not any(out.iterdir()):
        return
    if not ((out / _ENGINE_PBTXT).is_file() and (out / ENGINE_TOML).is_file()):
        raise CommandError(f"{out} holds other files and is no model repository of ours; choose another --out")
    if not force:
        raise CommandError(f"{out} is a model repository already; --force replaces it")


def _copy_models(source: Path, target: Path) -> None:
    """Copies config.pbtxt and the version folders' files; checkpoints, which are folders in there, stay behind."""
    for pbtxt in sorted(source.glob("*/config.pbtxt")):
        model = target / pbtxt.parent.name
        model.mkdir(parents=True)
        shutil.copyfile(pbtxt, model / pbtxt.name)
        for version in sorted(item for item in pbtxt.parent.iterdir() if item.name.isdigit()):
            (model / version.name).mkdir()
            for file in sorted(item for item in version.iterdir() if _is_copied(item)):
                shutil.copyfile(file, model / version.name / file.name)


def _is_copied(file: Path) -> bool:
    return file.is_file() and not file.name.startswith(".") and file.name != ENGINE_TOML.name
