# SPDX-License-Identifier: Apache-2.0
"""A GGUF file as the model: the tokens and texts of the checkpoint it was made from, wherever it is served."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fakes.gguf_files import decode, write_gguf
from fakes.tiny_checkpoints import TinyCheckpoints
from fakes.triton_server import REPOSITORY, make_repository, start_server
from wavetrain_engine import LLM, SamplingParams
from wavetrain_engine.errors import CheckpointError, ConfigError, UnsupportedModelError
from wavetrain_engine.text.tokenizer import Tokenizer

DEMO_MODEL = REPOSITORY / "engine" / "1" / "demo"
PROMPTS = [[5, 9, 300, 17, 44, 12], [3, 4], list(range(40, 100))]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
FAMILIES = (
    "llama", "llama-bias", "llama-rope-llama3", "llama-rope-linear", "llama-rope-yarn", "mistral", "mixtral", "qwen2",
    "qwen3", "qwen3-moe", "gemma2",
)  # fmt: skip
# Whole blocks of 256 in every row.
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoints:
    return TinyCheckpoints(tmp_path_factory.mktemp("checkpoints"))


def greedy_tokens(model: Path) -> list[list[int]]:
    with LLM(str(model), dtype="float32", num_blocks=64, max_model_len=256) as llm:
        return [list(output.outputs[0].token_ids) for output in llm.generate(PROMPTS, GREEDY)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokens_are_the_checkpoints(checkpoints: TinyCheckpoints, tmp_path: Path, family: str) -> None:
    directory = checkpoints.get(family)
    assert greedy_tokens(write_gguf(directory, tmp_path / "x.gguf")) == greedy_tokens(directory)


@pytest.mark.parametrize(("kind", "dtype"), [("F16", torch.float16), ("BF16", torch.bfloat16)])
def test_half_precision(checkpoints: TinyCheckpoints, tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    directory = checkpoints.get("llama", dtype=dtype)
    path = write_gguf(directory, tmp_path / "x.gguf", kind=kind)
    assert greedy_tokens(path) == greedy_tokens(directory)
    with LLM(str(path), num_blocks=64, max_model_len=256) as llm:
        assert llm.facts.dtype == str(dtype).removeprefix("torch.")


def logprobs_of(model: Path) -> list[list[float]]:
    """Of every prompt token but the first, by our engine."""
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    with LLM(str(model), dtype="float32", num_blocks=64, max_model_len=256) as llm:
        outputs = llm.generate(PROMPTS, params)
    found: list[list[float]] = []
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        assert output.prompt_logprobs is not None
        entries = zip(output.prompt_logprobs[1:], prompt[1:], strict=True)
        found.append([logprobs[token].logprob for logprobs, token in entries])
    return found


@torch.inference_mode()
def their_logprobs(directory: Path) -> list[list[float]]:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    found: list[list[float]] = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        scores = torch.log_softmax(model(ids).logits[0].float(), dim=-1)
        found.append(scores[:-1].gather(1, ids[0, 1:, None])[:, 0].tolist())
    return found


def write_dequantized(checkpoint: Path, out: Path, kind: str, kinds: Mapping[str, str]) -> Path:
    """Copies a Llama's checkpoint, its matrices as they are once they were quantized, by the gguf package's numbers."""
    shutil.copytree(checkpoint, out)
    tensors = load_file(checkpoint / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.dim() == 2:
            wanted = kinds.get(name.split(".")[-2], kind)
            tensors[name] = torch.from_numpy(np.array(decode(tensor.float().numpy(), wanted)))
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


@pytest.mark.parametrize(
    ("kind", "kinds"),
    [
        ("Q8_0", {}),
        ("Q4_0", {}),
        ("Q5_1", {}),
        ("Q4_K", {"attn_v": "Q6_K", "ffn_down": "Q6_K", "token_embd": "Q6_K"}),  # as llama.cpp's Q4_K_M
        ("Q4_1", {"output": "Q6_K"}),
    ],
)
def test_quantized_weights(checkpoints: TinyCheckpoints, tmp_path: Path, kind: str, kinds: dict[str, str]) -> None:
    directory = checkpoints.get("llama", **WIDE)
    path = write_gguf(directory, tmp_path / "x.gguf", kind=kind, kinds=kinds)
    names = {"attn_v": "v_proj", "ffn_down": "down_proj", "token_embd": "embed_tokens", "output": "lm_head"}
    theirs = write_dequantized(directory, tmp_path / "x", kind, {names[name]: kinds[name] for name in kinds})
    expected, found = their_logprobs(theirs), logprobs_of(path)
    for ours, others in zip(found, expected, strict=True):
        assert ours == pytest.approx(others, abs=2e-3)
    # The weights are not those before they were rounded, or this would prove nothing.
    original = their_logprobs(directory)
    assert max(abs(a - b) for a, b in zip(original[2], expected[2], strict=True)) > 0.02


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model as a file of a usual mix: 4 bits, and 8 where rows are no whole blocks of 256."""
    path = tmp_path_factory.mktemp("demo") / "demo.gguf"
    return write_gguf(DEMO_MODEL, path, kind="Q4_K", kinds={"ffn_down": "Q8_0", "token_embd": "Q8_0"})


def test_the_demo_models_tokenizer(demo: Path) -> None:
    ours, original = Tokenizer.load(demo), Tokenizer.load(DEMO_MODEL)
    texts = [Path(__file__).read_text(encoding="utf-8"), "Grüße, 日本語 😀 don't\n\n  x", "<|bos|>def f(x):<|eos|>"]
    for text in texts:
        assert ours.encode(text) == original.encode(text)
        assert ours.decode(ours.encode(text)) == original.decode(original.encode(text))


def test_the_demo_model_in_float32(tmp_path: Path) -> None:
    path = write_gguf(DEMO_MODEL, tmp_path / "demo.gguf", kind="BF16")
    texts: list[str] = []
    for model in (path, DEMO_MODEL):
        with LLM(str(model), dtype="float32", num_blocks=64, max_model_len=256) as llm:
            outputs = llm.generate("def fibonacci(", SamplingParams(temperature=0, max_tokens=40))
            texts.append(outputs[0].outputs[0].text)
    assert texts[0] == texts[1] != ""


def test_the_command_completes_with_a_file(demo: Path) -> None:
    command = [sys.executable, "-m", "wavetrain_cli.main", "run", "--model", str(demo), "--temperature", "0"]
    options = ["--max-tokens", "8", "--num-blocks", "64", "--dtype", "float32", "import "]
    done = subprocess.run([*command, *options], capture_output=True, encoding="utf-8", check=False)
    assert (done.returncode, done.stdout.strip() != "") == (0, True), done.stderr


@pytest.mark.server
def test_a_file_is_served(demo: Path, tmp_path: Path) -> None:
    repository = make_repository(tmp_path / "repository", demo, num_blocks=64, dtype="float32")
    body = {"text_input": "def fibonacci(", "max_tokens": 8, "temperature": 0.0}
    with start_server(repository, tmp_path) as server:
        request = urllib.request.Request(f"{server.http_url}/v2/models/llm/generate", json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=60) as response:
            answer = json.load(response)
    with LLM(str(demo), dtype="float32", num_blocks=64) as llm:
        text = llm.generate(body["text_input"], SamplingParams(temperature=0, max_tokens=8))[0].outputs[0].text
    assert answer["text_output"].endswith(text)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"general__architecture": "falcon"}, UnsupportedModelError, "falcon is not supported; supported are llama, q"),
        ({"general__type": "adapter"}, UnsupportedModelError, "its general.type is adapter"),
        ({"llama__block_count": None}, CheckpointError, "lacks the metadata llama.block_count"),
        ({"llama__block_count": 0}, ConfigError, "num_hidden_layers must be an integer from 1"),
        ({"llama__block_count": 3}, CheckpointError, "lacks 9 of the 30 tensors"),
        ({"llama__block_count": 1}, CheckpointError, "9 tensors that"),
        ({"llama__attention__head_count": 0}, ConfigError, "num_attention_heads must be an integer from 1"),
        ({"llama__attention__head_count": [4, 2]}, UnsupportedModelError, "differs between layers"),
        ({"llama__attention__head_count_kv": 3}, ConfigError, "must be a multiple of num_key_value_heads"),
        ({"llama__rope__dimension_count": 8}, UnsupportedModelError, "rope.dimension_count 8 differs from the 16"),
        ({"llama__rope__scaling__type": "longrope"}, UnsupportedModelError, "longrope is not supported"),
        ({"llama__logit_scale": 2.0}, UnsupportedModelError, "llama.logit_scale is not supported"),
        ({"llama__feed_forward_length": 97}, CheckpointError, "do not have the shape"),
        ({"general__sampling__top_p": 7.0}, CheckpointError, "its sampling defaults: top_p must be"),
    ],
)
def test_what_is_not_served_is_refused(
    checkpoints: TinyCheckpoints, tmp_path: Path, values: dict[str, Any], error: type[Exception], message: str
) -> None:
    path = write_gguf(checkpoints.get("llama"), tmp_path / "x.gguf", **values)
    with pytest.raises(error, match=message.replace(".", r"\.")):
        LLM(str(path), num_blocks=64)
