# SPDX-License-Identifier: Apache-2.0
"""Text to learn from, and other text to measure on, as windows of token ids.

Without a file of one's own it is the source of Python's standard library, which every machine has. A file of it is held
out by its content, one in forty, so that every machine with the same library makes the same split; the demo model was
not trained on those either. Of one's own file the last fifth is held out.
"""

from __future__ import annotations

import hashlib
import os
import tokenize
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from wavetrain_engine.errors import CheckpointError, ConfigError, RequestError
from wavetrain_engine.quantizer.recipe import Recipe
from wavetrain_engine.text.tokenizer import Tokenizer

# W = windows, S = tokens of a window.

_EXCLUDED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "encodings"}
_HELD_OUT_ONE_IN = 40
_OWN_HELD_OUT_SHARE = 5
_MIN_FILE_CHARS = 2**10
_MAX_FILE_BYTES = 2**26
_PIECE_CHARS = 2**16


@dataclass(frozen=True, slots=True, eq=False)
class TextWindows:
    """Windows [W, S] of int64: to calibrate with, and to measure on. Each begins as the model's texts do."""

    calibration: Tensor
    held_out: Tensor

    @classmethod
    def make(cls, tokenizer: Tokenizer, recipe: Recipe, file: Path | None) -> TextWindows:
        """Tokenizes as much as the recipe wants.

        Raises:
            ConfigError: the file cannot be read, is no text, or is too short for one window of each kind.
        """
        num_windows = recipe.num_windows if recipe.needs_text or recipe.num_report_windows else 0
        if file is None:
            learnt, held_out = _library_texts()
        else:
            text = read_text_file(file)
            cut = len(text) - len(text) // _OWN_HELD_OUT_SHARE
            learnt, held_out = _pieces(text[:cut]), _pieces(text[cut:])
        windows = cls(
            _windows(tokenizer, learnt, num_windows, recipe.window_tokens),
            _windows(tokenizer, held_out, recipe.num_report_windows, recipe.window_tokens),
        )
        for tokens, wanted, part in (
            (windows.calibration, num_windows, "to calibrate with"),
            (windows.held_out, recipe.num_report_windows, "held out to measure on"),
        ):
            if wanted and not tokens.shape[0]:
                raise ConfigError(
                    f"the calibration text is too short: the part {part} has less than one window of "
                    f"{recipe.window_tokens} tokens; give a longer --calibration file or lower --window-tokens"
                )
        return windows

    def digest(self) -> str:
        """Returns a hash of all tokens."""
        digest = hashlib.sha256()
        for tokens in (self.calibration, self.held_out):
            digest.update(repr(tuple(tokens.shape)).encode())
            digest.update(tokens.numpy().tobytes())
        return digest.hexdigest()


def read_text_file(path: Path) -> str:
    """Returns a person's text.

    Raises:
        ConfigError: there is no such file, it is empty, very large, or no UTF-8 text.
    """
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise ConfigError(
                f"--calibration {path.name}: larger than {_MAX_FILE_BYTES >> 20} MiB; a part of it will do"
            )
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--calibration {path.name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--calibration {path.name}: not UTF-8 text; convert it first") from error
    if not text.strip():
        raise ConfigError(f"--calibration {path.name}: the file is empty; give some text of the kind that is served")
    return text


def _library_texts() -> tuple[list[str], list[str]]:
    """Returns Python's own source files of both parts, in an order that is the same everywhere and mixes kinds."""
    root = Path(os.__file__).parent
    parts: tuple[dict[bytes, str], dict[bytes, str]] = ({}, {})
    for path in root.rglob("*.py"):
        if _EXCLUDED_FOLDERS & set(path.relative_to(root).parts) or path.name.startswith("_sysconfigdata"):
            continue
        try:
            with tokenize.open(path) as file:
                text = file.read()
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue
        if len(text) >= _MIN_FILE_CHARS:
            digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
            is_held_out = int.from_bytes(digest[:4], "big") % _HELD_OUT_ONE_IN == 0
            parts[is_held_out][digest] = text
    learnt, held_out = ([part[digest] for digest in sorted(part)] for part in parts)
    return learnt, held_out


def _pieces(text: str) -> list[str]:
    return [text[start : start + _PIECE_CHARS] for start in range(0, len(text), _PIECE_CHARS)]


def _windows(tokenizer: Tokenizer, texts: Iterable[str], num_windows: int, length: int) -> Tensor:
    """Returns up to `num_windows` windows of one text each; what is left of a text begins the next."""
    found: list[list[int]] = []
    if num_windows:
        start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        tokens: list[int] = []
        for text in texts:
            try:
                tokens += tokenizer.encode(text, add_special_tokens=False)
            except RequestError as error:
                raise ConfigError(f"the calibration text cannot be tokenized: {error}") from error
            step = length - len(start)
            while len(tokens) >= step and len(found) < num_windows:
                found.append(start + tokens[:step])
                tokens = tokens[step:]
            if len(found) == num_windows:
                break
    return torch.tensor(found, dtype=torch.int64).view(-1, length)


def check_tokens(windows: TextWindows, vocab_size: int) -> None:
    """Checks that a model knows all tokens.

    Raises:
        CheckpointError: the tokenizer makes ids that the model has no embeddings for.
    """
    largest = max(
        (int(tokens.max()) for tokens in (windows.calibration, windows.held_out) if tokens.numel()), default=0
    )
    if largest >= vocab_size:
        raise CheckpointError(
            f"tokenizer.json makes token {largest}, but config.json's vocab_size is {vocab_size}: they do not belong "
            "together"
        )
