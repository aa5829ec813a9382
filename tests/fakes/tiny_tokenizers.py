# SPDX-License-Identifier: Apache-2.0
"""Small tokenizers of every kind we serve, written as checkpoint files: what tokenizer tests stand on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer

SAMPLE_TEXTS = [
    "def __init__(self, name):\n    self.name = name\n",
    "The quick brown fox doesn't jump over the lazy dog. It's 'fine', isn't it ? Yes !",
    "Grüße aus Köln, naïve café, ¿qué tal?",
    "日本語のテキスト、中文文本。",
    "emoji 😀 🏳️‍🌈 family 👨‍👩‍👧‍👦 done",
    "    indented\n\n\ttabs and  double  spaces\n",
]

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def write_tokenizer(directory: Path, backend: Tokenizer, **config: Any) -> Path:
    """Writes tokenizer.json and tokenizer_config.json; returns the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    values = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(values), encoding="utf-8")
    return directory


def byte_level(directory: Path, *, vocab_size: int = 320, **config: Any) -> Path:
    """GPT-2's kind: byte-level BPE with BOS in front. Ids 0 and 1 are <s> and </s>, special."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>", "<|user|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SAMPLE_TEXTS, trainer)
    backend.add_tokens([AddedToken("<tool>", special=False), AddedToken("hé llo", special=False)])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    values = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHAT_TEMPLATE} | config
    return write_tokenizer(directory, backend, **values)


_SENTENCEPIECE_DECODERS: dict[str, Any] = {
    "strip": lambda: decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    ),
    "gemma": lambda: decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
    "metaspace": lambda: decoders.Metaspace(),
    "metaspace_never": lambda: decoders.Metaspace(prepend_scheme="never"),
    "bytes_then_metaspace": lambda: decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]),
    "metaspace_then_bytes": lambda: decoders.Sequence([decoders.Metaspace(), decoders.ByteFallback(), decoders.Fuse()]),
}
SENTENCEPIECE_KINDS = sorted(_SENTENCEPIECE_DECODERS)


def sentencepiece(directory: Path, kind: str = "strip", **config: Any) -> Path:
    """Llama 2's kind: BPE over "▁"-marked words with byte fallback. Ids 0, 1, 2 are <unk>, <s>, </s>."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    chars = sorted({char for text in SAMPLE_TEXTS[:3] for char in text.replace(" ", "▁") if char not in "\n\t"})
    words = ["▁the", "▁qu", "lo", "▁▁", "▁▁▁", "ame", "self"]
    merges: list[tuple[str, str]] = []
    vocab = {token: index for index, token in enumerate(dict.fromkeys([*tokens, *chars]))}
    for word in words:
        left = word[0]
        for char in word[1:]:
            merges.append((left, char))
            left += char
            vocab.setdefault(left, len(vocab))
    backend = Tokenizer(
        models.BPE(
            vocab=vocab, merges=list(dict.fromkeys(merges)), unk_token="<unk>", byte_fallback=True, fuse_unk=True
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = _SENTENCEPIECE_DECODERS[kind]()
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.add_tokens([AddedToken("▁<tool>", special=False, normalized=False)])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    values = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True} | config
    return write_tokenizer(directory, backend, **values)


def word_level(directory: Path, *, decoder: Any = None, **config: Any) -> Path:
    """Whole words and signs, joined by spaces: no decoder we know, and where clean-up still happens."""
    words = ["<unk>", "</s>", *"abnt.,!?'", "'m", "n't", "'s", "'ve", "'re", "ca", "x", "##ing", "é", "s"]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(" "), "removed")
    if decoder is not None:
        backend.decoder = decoder
    backend.add_special_tokens(["</s>"])
    return write_tokenizer(directory, backend, eos_token="</s>", unk_token="<unk>", **config)
