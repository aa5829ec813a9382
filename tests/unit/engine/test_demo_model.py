# SPDX-License-Identifier: Apache-2.0
"""The committed demo checkpoint: an ordinary Hugging Face directory, small enough to commit, good enough to show."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

MODELS = Path(__file__).resolve().parents[3] / "model_repository" / "engine" / "1"
DEMO, DRAFT = MODELS / "demo", MODELS / "demo-draft"
MAX_BYTES = 12 * 2**20
TEXTS = [
    "def __init__(self, name=None):\n        self.name = name\n",
    "",
    " leading and trailing \t\r\n\n ",
    "naïve façade: 😀👩‍👩‍👧 漢字かな العربية \x00\x7f \u2028",
    "<|user|> is a token, <|nobody|> is not",
]


def read_json(folder, name):
    return json.loads((folder / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(DEMO / "tokenizer.json"))


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()


def complete(model, tokenizer, prompt, **how):
    inputs = torch.tensor([tokenizer.encode(prompt).ids])
    # Long enough for the docstring that the model likes to begin with.
    output = model.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=160, **how)
    return tokenizer.decode_batch(output.tolist())


def test_both_checkpoints_fit_into_12_mib():
    assert sum(path.stat().st_size for folder in (DEMO, DRAFT) for path in folder.rglob("*")) <= MAX_BYTES


@pytest.mark.parametrize("folder", [DEMO, DRAFT], ids=["demo", "draft"])
def test_folder_holds_the_ordinary_files_and_no_other(folder):
    names = {path.name for path in folder.iterdir()}
    expected = {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    assert names == expected | {"tokenizer.json", "tokenizer_config.json"}


@pytest.mark.parametrize("folder", [DEMO, DRAFT], ids=["demo", "draft"])
def test_weights_have_the_shapes_that_the_config_says(folder):
    config = read_json(folder, "config.json")
    hidden, head_dim, mlp = config["hidden_size"], config["head_dim"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    expected = {"model.embed_tokens.weight": [config["vocab_size"], hidden], "model.norm.weight": [hidden]}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        expected |= {
            f"{layer}input_layernorm.weight": [hidden],
            f"{layer}post_attention_layernorm.weight": [hidden],
            f"{layer}self_attn.q_proj.weight": [heads * head_dim, hidden],
            f"{layer}self_attn.k_proj.weight": [kv_heads * head_dim, hidden],
            f"{layer}self_attn.v_proj.weight": [kv_heads * head_dim, hidden],
            f"{layer}self_attn.o_proj.weight": [hidden, heads * head_dim],
            f"{layer}mlp.gate_proj.weight": [mlp, hidden],
            f"{layer}mlp.up_proj.weight": [mlp, hidden],
            f"{layer}mlp.down_proj.weight": [hidden, mlp],
        }
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  not a dict: it has no __iter__
        assert {name: weight.get_shape() for name, weight in found.items()} == expected
        assert {weight.get_dtype() for weight in found.values()} == {"BF16"}


@pytest.mark.parametrize("folder", [DEMO, DRAFT], ids=["demo", "draft"])
def test_config_is_a_grouped_query_llama_with_tied_embeddings(folder, tokenizer):
    config = read_json(folder, "config.json")
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["tie_word_embeddings"] is True
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["vocab_size"] == tokenizer.get_vocab_size()
    assert tokenizer.id_to_token(config["bos_token_id"]) == "<|bos|>"
    assert tokenizer.id_to_token(config["eos_token_id"]) == "<|eos|>"


def test_a_turn_and_a_document_both_end_a_generation(tokenizer):
    ends = read_json(DEMO, "generation_config.json")["eos_token_id"]
    assert [tokenizer.id_to_token(i) for i in ends] == ["<|eos|>", "<|end|>"]


def test_draft_shares_the_tokenizer():
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (DEMO / name).read_bytes() == (DRAFT / name).read_bytes()


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_loses_nothing(tokenizer, text):
    ids = tokenizer.encode(text).ids
    assert ids[0] == tokenizer.token_to_id("<|bos|>")
    assert tokenizer.decode(ids[1:], skip_special_tokens=False) == text


@pytest.mark.parametrize("text", TEXTS)
def test_transformers_reads_the_same_tokenizer(tokenizer, text):
    assert AutoTokenizer.from_pretrained(DEMO)(text).input_ids == tokenizer.encode(text).ids


def test_chat_template_renders_what_the_model_was_trained_on():
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi 😀"}]
    rendered = AutoTokenizer.from_pretrained(DEMO).apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    assert rendered == "<|bos|><|system|>\ns<|end|>\n<|user|>\nhi 😀<|end|>\n<|assistant|>\n"


def test_greedy_completion_of_init_looks_like_python(model, tokenizer):
    (text,) = complete(model, tokenizer, "def __init__(self", do_sample=False, temperature=None, top_p=None)
    signature, _, body = text.partition("):\n")
    assert signature.startswith("def __init__(self")
    assert "self." in body


def test_sampled_completions_of_init_close_the_signature_and_indent_a_body(model, tokenizer):
    torch.manual_seed(0)
    texts = complete(model, tokenizer, "def __init__(self", num_return_sequences=16)
    looks_right = [re.match(r"def __init__\(self(, [^)]*)?\):\n    \S", text) is not None for text in texts]
    assert sum(looks_right) > len(texts) / 2, texts  # of 40, 34 did
    assert any("self." in text for text in texts)


def test_held_out_perplexity_beats_the_bigram_baseline():
    card = (DEMO / "README.md").read_text(encoding="utf-8")
    row = re.search(r"perplexity per token \| ([\d.]+) \| ([\d.]+) \|", card)
    assert row is not None
    perplexity, bigram = map(float, row.groups())
    assert 1 < perplexity < bigram / 2
