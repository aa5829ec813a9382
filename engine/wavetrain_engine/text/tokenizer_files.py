# SPDX-License-Identifier: Apache-2.0
"""Reads a checkpoint's tokenizer files into a `tokenizers` backend, as transformers' fast tokenizers do.

tokenizer.json is the tokenizer. The files beside it name tokens: tokenizer_config.json (named special
tokens, `added_tokens_decoder`, whether BOS and EOS are added) and, from older writers,
special_tokens_map.json and added_tokens.json. The class named in the config is not loaded: no code of
a checkpoint ever runs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend
from tokenizers.processors import TemplateProcessing

from wavetrain_engine.errors import CheckpointError
from wavetrain_engine.gguf.gguf_file import GgufFile
from wavetrain_engine.gguf.tokenizer import GgufTokenizer
from wavetrain_engine.model_location import ModelLocation

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_TOKEN_LISTS = ("additional_special_tokens", "extra_special_tokens")
_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerFiles:
    """A loaded backend, and what the files beside it say.

    Attributes:
        named_tokens: `bos_token` and so on, to the token's text.
        chat_template: Jinja source, or None.
        cleans_up: `clean_up_tokenization_spaces` is set, and the model is one whose text survives it
            (transformers ignores it for BPE).
    """

    backend: Backend
    named_tokens: dict[str, str]
    cleans_up: bool

    @classmethod
    def read(cls, model_dir: Path) -> TokenizerFiles:
        """Reads the files of a checkpoint directory, or the tokenizer inside a GGUF file.

        Raises:
            CheckpointError: tokenizer.json is missing, or a file is broken.
        """
        gguf = ModelLocation.find(model_dir).gguf
        if gguf is not None:
            tokenizer = GgufTokenizer.read(GgufFile.open(gguf).metadata)
            return cls._complete(tokenizer.backend, tokenizer.config, {})
        config = read_json(model_dir / "tokenizer_config.json")
        backend = _read_backend(model_dir / "tokenizer.json")
        added = _declared_tokens(config)
        if not added:
            config = config | read_json(model_dir / "special_tokens_map.json")
            added = _legacy_added_tokens(read_json(model_dir / "added_tokens.json"), config)
        return cls._complete(backend, config, added)

    @classmethod
    def _complete(cls, backend: Backend, config: dict[str, Any], added: dict[int, AddedToken]) -> TokenizerFiles:
        """Does to a backend what `config`, in the words of tokenizer_config.json, says."""
        named = {name: _token(config[name], name) for name in _NAMED_TOKENS if config.get(name)}
        _add_tokens(backend, added, [*named.values(), *_listed_tokens(config)])
        texts = {name: token.content for name, token in named.items()}
        if cast("Any", backend).post_processor is None:  # else tokenizer.json says what is added
            _set_post_processor(backend, texts, config)
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = bool(config.get("split_special_tokens", False))
        is_bpe = type(backend.model).__name__ == "BPE"
        return cls(
            backend=backend,
            named_tokens=texts,
            cleans_up=bool(config.get("clean_up_tokenization_spaces", False)) and not is_bpe,
        )


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object of a file; empty where there is no such file.

    Raises:
        CheckpointError: the file cannot be read or does not hold a JSON object.
    """
    if not path.is_file():
        return {}
    try:
        values: object = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name} is not valid JSON; download it again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path.name} must hold a JSON object, got {type(values).__name__}")
    return cast("dict[str, Any]", values)


def _read_backend(path: Path) -> Backend:
    if not path.is_file():
        raise CheckpointError(
            "the checkpoint has no tokenizer.json; save one with transformers' tokenizer.save_pretrained, "
            "or serve token ids only with --skip-tokenizer-init"
        )
    try:
        return Backend.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(f"tokenizer.json cannot be read ({error}); download it again") from error


def _token(value: Any, where: str, *, is_special: bool = True) -> AddedToken:
    if isinstance(value, str):
        return AddedToken(value, special=is_special, normalized=not is_special)
    if isinstance(value, dict):
        fields = cast("dict[str, Any]", value)
        content = fields.get("content")
        flags = {name: bool(fields[name]) for name in _TOKEN_FLAGS if name in fields}
        if isinstance(content, str):
            return AddedToken(content, special=bool(fields.get("special", is_special)), **flags)
    raise CheckpointError(f"tokenizer_config.json: {where} must be a token's text or an object with its content")


def _declared_tokens(config: dict[str, Any]) -> dict[int, AddedToken]:
    declared: Any = config.get("added_tokens_decoder") or {}
    if not isinstance(declared, dict):
        raise CheckpointError("tokenizer_config.json: added_tokens_decoder must be an object of id to token")
    tokens: dict[int, AddedToken] = {}
    for key, value in cast("dict[Any, Any]", declared).items():
        if not str(key).isdecimal():
            raise CheckpointError(f"tokenizer_config.json: added_tokens_decoder's key {str(key)[:32]!r} is no token id")
        tokens[int(key)] = _token(value, "added_tokens_decoder", is_special=False)
    return tokens


def _legacy_added_tokens(added: dict[str, Any], config: dict[str, Any]) -> dict[int, AddedToken]:
    special = {_token(config[name], name).content for name in _NAMED_TOKENS if config.get(name)}
    special.update(token.content for token in _listed_tokens(config))
    tokens: dict[int, AddedToken] = {}
    for text, token_id in added.items():
        if not isinstance(token_id, int):
            raise CheckpointError("added_tokens.json must be an object of token to id")
        tokens[token_id] = _token(text, "added_tokens.json", is_special=text in special)
    return tokens


def _listed_tokens(config: dict[str, Any]) -> list[AddedToken]:
    tokens: list[AddedToken] = []
    for name in _TOKEN_LISTS:
        listed: Any = config.get(name) or []
        if isinstance(listed, dict):  # name to token: special tokens of one model
            listed = list(cast("dict[str, Any]", listed).values())
        if not isinstance(listed, list):
            raise CheckpointError(f"tokenizer_config.json: {name} must be a list of tokens")
        tokens += [_token(value, name) for value in cast("list[Any]", listed)]
    return tokens


def _add_tokens(backend: Backend, added: dict[int, AddedToken], special: list[AddedToken]) -> None:
    known = {token_id: token.content for token_id, token in backend.get_added_tokens_decoder().items()}
    known_texts = set(known.values())
    # tokenizer.json wins where both speak of an id.
    for token_id, token in sorted(added.items(), key=lambda item: item[0]):
        if token_id in known or token.content in known_texts:
            continue
        cast("Any", backend).add_tokens([token])
        if backend.token_to_id(token.content) != token_id:
            raise CheckpointError(
                f"tokenizer_config.json gives {token.content!r} the id {token_id}, tokenizer.json the id "
                f"{backend.token_to_id(token.content)}; the two files do not belong together"
            )
    declared = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    for token in special:
        present = declared.get(token.content)
        if present is None or not present.special:
            cast("Any", backend).add_special_tokens([token])


def _set_post_processor(backend: Backend, texts: dict[str, str], config: dict[str, Any]) -> None:
    bos = texts.get("bos_token") if config.get("add_bos_token") else None
    eos = texts.get("eos_token") if config.get("add_eos_token") else None
    first = [part for part in (bos and f"{bos}:0", "$A:0", eos and f"{eos}:0") if part]
    second = [part for part in (bos and f"{bos}:1", "$B:1", eos and f"{eos}:1") if part]
    tokens = [(text, backend.token_to_id(text)) for text in (bos, eos) if text]
    processor = TemplateProcessing(single=first, pair=first + second, special_tokens=tokens)
    cast("Any", backend).post_processor = processor
