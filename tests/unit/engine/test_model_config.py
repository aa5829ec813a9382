# SPDX-License-Identifier: Apache-2.0
"""config.json: what is read, in both spellings, and what is refused in which words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wavetrain_engine.errors import CheckpointError, ConfigError, UnsupportedModelError, WavetrainError
from wavetrain_engine.models.model_config import ModelConfig
from wavetrain_engine.models.moe_config import MoeConfig

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
}

QWEN3_MOE: dict[str, Any] = {"architectures": ["Qwen3MoeForCausalLM"]}


def config(**changes: Any) -> ModelConfig:
    return ModelConfig.from_mapping({**LLAMA, **changes})


def family(architecture: str, **changes: Any) -> ModelConfig:
    return config(architectures=[architecture], **changes)


def test_the_shape_is_read() -> None:
    read = config(torch_dtype="bfloat16")
    assert (read.vocab_size, read.hidden_size, read.intermediate_size) == (512, 64, 96)
    assert (read.num_layers, read.num_heads, read.num_kv_heads, read.head_dim) == (4, 4, 2, 16)
    assert (read.rms_norm_eps, read.dtype, read.max_model_len) == (1e-5, "bfloat16", 1024)


def test_both_spellings_of_dtype_are_read_and_the_newer_wins() -> None:
    assert config(dtype="float16", torch_dtype="bfloat16").dtype == "float16"
    assert config(dtype="torch.bfloat16").dtype == "bfloat16"
    assert config().dtype == "float32"


def test_null_is_as_good_as_missing() -> None:
    read = config(num_key_value_heads=None, head_dim=None, rope_scaling=None, quantization_config=None)
    assert (read.num_kv_heads, read.head_dim) == (4, 16)


def test_model_type_names_the_architecture_where_the_list_is_missing() -> None:
    values = {key: value for key, value in LLAMA.items() if key != "architectures"}
    assert ModelConfig.from_mapping(values).architecture == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"rope_theta": 5e5}, {"rope_type": "default", "rope_theta": 5e5}),
        (
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5},
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 256},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256, "rope_theta": 10000.0},
        ),
    ],
)
def test_old_and_new_spelling_of_rope_say_the_same(old: dict[str, Any], new: dict[str, Any]) -> None:
    assert config(**old).rope == config(rope_parameters=new).rope


def test_a_theta_inside_rope_parameters_wins() -> None:
    assert config(rope_theta=1e6, rope_parameters={"rope_theta": 5e5}).rope.theta == 5e5


def test_scaled_positions_lengthen_the_model_as_in_vllm() -> None:
    assert config(rope_scaling={"type": "linear", "factor": 4.0}).max_model_len == 4096
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    assert config(rope_scaling=yarn).max_model_len == 4096
    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128}
    assert config(rope_scaling={"rope_type": "llama3", **llama3}).max_model_len == 1024


def test_dynamic_scaling_has_to_be_asked_for() -> None:
    read = config(rope_scaling={"type": "dynamic", "factor": 2.0})
    assert (read.max_model_len, read.max_model_len_limit) == (1024, 2048)


def test_biases_by_family() -> None:
    def biases(read: ModelConfig) -> tuple[bool, bool, bool]:
        return read.attention_bias, read.attention_output_bias, read.mlp_bias

    assert biases(config()) == (False, False, False)
    assert biases(config(attention_bias=True, mlp_bias=True)) == (True, True, True)
    assert biases(family("Qwen2ForCausalLM")) == (True, False, False)
    assert biases(family("Qwen3ForCausalLM", attention_bias=True)) == (True, True, False)
    assert biases(family("MistralForCausalLM")) == (False, False, False)


@pytest.mark.parametrize(
    ("architecture", "changes", "windows"),
    [
        ("LlamaForCausalLM", {"sliding_window": 8}, (None, None, None, None)),
        ("MistralForCausalLM", {"sliding_window": 8}, (8, 8, 8, 8)),
        ("MistralForCausalLM", {"sliding_window": None}, (None, None, None, None)),
        ("MistralForCausalLM", {}, (4096, 4096, 4096, 4096)),
        ("MixtralForCausalLM", {"sliding_window": 8}, (8, 8, 8, 8)),
        ("MixtralForCausalLM", {}, (None, None, None, None)),
        ("Qwen3MoeForCausalLM", {"sliding_window": 8}, (None, None, None, None)),
        ("Qwen3MoeForCausalLM", {"sliding_window": 8, "use_sliding_window": True}, (8, 8, 8, 8)),
        ("Qwen2ForCausalLM", {"sliding_window": 8}, (None, None, None, None)),
        (
            "Qwen2ForCausalLM",
            {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 3},
            (None, None, None, 8),
        ),
        (
            "Qwen3ForCausalLM",
            {
                "sliding_window": 8,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention"],
            },
            (8, None, None, 8),
        ),
        ("Gemma2ForCausalLM", {"sliding_window": 8}, (8, None, 8, None)),
        ("Gemma2ForCausalLM", {"sliding_window": 8, "layer_types": ["full_attention"] * 4}, (None,) * 4),
    ],
)
def test_sliding_windows(architecture: str, changes: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    assert family(architecture, **changes).sliding_windows == windows


def test_gemma2_has_its_own_defaults() -> None:
    read = family("Gemma2ForCausalLM", num_key_value_heads=None)
    assert read.tie_word_embeddings
    assert (read.attention_soft_cap, read.logit_soft_cap, read.query_pre_attn_scalar) == (50.0, 30.0, 256.0)
    assert (read.num_kv_heads, read.head_dim, read.hidden_act) == (4, 256, "gelu_pytorch_tanh")
    uncapped = family("Gemma2ForCausalLM", attn_logit_softcapping=None, final_logit_softcapping=None)
    assert (uncapped.attention_soft_cap, uncapped.logit_soft_cap) == (None, None)


def test_families_without_experts_have_none() -> None:
    assert config(num_local_experts=8, num_experts_per_tok=2).moe is None
    assert family("Qwen3ForCausalLM", num_experts=8).moe is None


def test_mixtrals_experts() -> None:
    read = family("MixtralForCausalLM", num_local_experts=6, num_experts_per_tok=3)
    assert read.moe == MoeConfig(
        num_experts=6, num_experts_per_tok=3, intermediate_size=96, is_renormalized=True, layers=(True,) * 4
    )


def test_mixtral_has_its_own_defaults() -> None:
    read = family("MixtralForCausalLM", rms_norm_eps=None, num_key_value_heads=None, num_attention_heads=16)
    assert (read.rms_norm_eps, read.rope.theta, read.num_kv_heads) == (1e-5, 1e6, 8)
    assert read.moe is not None
    assert (read.moe.num_experts, read.moe.num_experts_per_tok) == (8, 2)
    assert not family("MixtralForCausalLM", attention_bias=True).attention_bias


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({}, (True, True, True, True)),
        ({"decoder_sparse_step": 2}, (False, True, False, True)),
        ({"decoder_sparse_step": 5}, (False, False, False, False)),
        ({"mlp_only_layers": [0, 3]}, (False, True, True, False)),
        ({"mlp_only_layers": [1], "decoder_sparse_step": 2}, (False, False, False, True)),
    ],
)
def test_qwen3s_experts(changes: dict[str, Any], layers: tuple[bool, ...]) -> None:
    read = family("Qwen3MoeForCausalLM", num_experts=16, moe_intermediate_size=24, **changes).moe
    assert read == MoeConfig(
        num_experts=16, num_experts_per_tok=8, intermediate_size=24, is_renormalized=False, layers=layers
    )


def test_qwen3_moe_has_its_own_defaults() -> None:
    read = family("Qwen3MoeForCausalLM", norm_topk_prob=True, num_key_value_heads=None)
    assert (read.num_kv_heads, read.head_dim, read.intermediate_size) == (4, 16, 96)
    assert read.moe == MoeConfig(
        num_experts=128, num_experts_per_tok=8, intermediate_size=768, is_renormalized=True, layers=(True,) * 4
    )


@pytest.mark.parametrize("architecture", ["MixtralForCausalLM", "Qwen3MoeForCausalLM"])
def test_the_number_of_experts_has_two_names(architecture: str) -> None:
    for names in ({"num_experts": 9}, {"num_local_experts": 9}, {"num_experts": 9, "num_local_experts": 9}):
        read = family(architecture, **names).moe
        assert read is not None
        assert read.num_experts == 9


REFUSED: list[tuple[dict[str, Any], type[WavetrainError], str]] = [
    # Architectures and features
    ({"architectures": ["LlamaForCausalLN"]}, UnsupportedModelError, "supported are .*nearest is LlamaForCausalLM"),
    (
        {"architectures": ["GPT2LMHeadModel"]},
        UnsupportedModelError,
        "'GPT2LMHeadModel' is not supported; supported are",
    ),
    (
        {"architectures": ["MyModel"], "auto_map": {"AutoModel": "code.MyModel"}},
        UnsupportedModelError,
        "auto_map.* never run",
    ),
    ({"architectures": [], "model_type": "qwen4"}, UnsupportedModelError, "nearest is qwen"),
    ({"architectures": None, "model_type": None}, ConfigError, "architectures is missing"),
    ({"architectures": "LlamaForCausalLM"}, ConfigError, "architectures must be a list of strings"),
    ({"quantization_config": {"quant_method": "hqq"}}, UnsupportedModelError, "'hqq' is not supported; supported are"),
    ({"quantization_config": "gptq"}, ConfigError, "quantization_config must be an object"),
    ({"hidden_act": "relu"}, UnsupportedModelError, "hidden_act 'relu'.*only 'silu'"),
    ({"is_encoder_decoder": True}, UnsupportedModelError, "is_encoder_decoder"),
    ({"torch_dtype": "float8_e4m3fn"}, UnsupportedModelError, "dtype 'float8_e4m3fn'"),
    ({"partial_rotary_factor": 0.5}, UnsupportedModelError, "partial_rotary_factor"),
    ({"rope_scaling": {"type": "longrope", "factor": 2}}, UnsupportedModelError, "rope type 'longrope'"),
    ({"rope_scaling": {"type": "yarm", "factor": 2}}, UnsupportedModelError, "did you mean yarn"),
    (
        {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "layer_types": ["chunked_attention"] * 4},
        UnsupportedModelError,
        "layer_types 'chunked_attention'",
    ),
    (
        {"architectures": ["MistralForCausalLM"], "layer_types": ["sliding_attention", "full_attention"] * 2},
        UnsupportedModelError,
        "several kinds",
    ),
    (
        {"architectures": ["MixtralForCausalLM"], "sliding_window": 8, "layer_types": ["full_attention"] * 4},
        UnsupportedModelError,
        "several kinds is not supported for mixtral",
    ),
    # Experts
    ({**QWEN3_MOE, "num_experts": 0}, ConfigError, "num_experts must be an integer from 1 to 512"),
    ({**QWEN3_MOE, "num_experts": 10**6}, ConfigError, "num_experts must be an integer from 1 to 512"),
    ({**QWEN3_MOE, "num_experts": 4}, ConfigError, r"num_experts_per_tok \(8\) is more than the 4 experts"),
    ({**QWEN3_MOE, "num_experts": 9, "num_local_experts": 8}, ConfigError, "two names of one thing, but differ"),
    ({**QWEN3_MOE, "num_experts_per_tok": 0}, ConfigError, "num_experts_per_tok must be an integer from 1"),
    ({**QWEN3_MOE, "moe_intermediate_size": 0}, ConfigError, "moe_intermediate_size must be an integer from 1"),
    ({**QWEN3_MOE, "decoder_sparse_step": 0}, ConfigError, "decoder_sparse_step must be an integer from 1"),
    ({**QWEN3_MOE, "norm_topk_prob": 1}, ConfigError, "norm_topk_prob must be true or false"),
    ({**QWEN3_MOE, "mlp_only_layers": [0, True]}, ConfigError, "mlp_only_layers must be a list of integers"),
    ({**QWEN3_MOE, "mlp_only_layers": 3}, ConfigError, "mlp_only_layers must be a list of integers"),
    # Types
    ({"hidden_size": "64"}, ConfigError, "hidden_size must be an integer, got '64'"),
    ({"hidden_size": 64.0}, ConfigError, "hidden_size must be an integer"),
    ({"hidden_size": True}, ConfigError, "hidden_size must be an integer"),
    ({"tie_word_embeddings": 1}, ConfigError, "tie_word_embeddings must be true or false"),
    ({"rms_norm_eps": "small"}, ConfigError, "rms_norm_eps must be a number"),
    ({"rope_scaling": [1]}, ConfigError, "rope_scaling must be an object"),
    ({"torch_dtype": 16}, ConfigError, "torch_dtype must be a string"),
    # Values
    ({"hidden_size": None}, ConfigError, "hidden_size is missing"),
    ({"hidden_size": 0}, ConfigError, "hidden_size must be an integer from 1"),
    ({"vocab_size": -1}, ConfigError, "vocab_size must be an integer from 1"),
    ({"num_hidden_layers": 10**9}, ConfigError, "num_hidden_layers must be an integer from 1 to 1024"),
    ({"vocab_size": 10**4000}, ConfigError, "vocab_size .* about 4001 digits"),
    ({"max_position_embeddings": 10**9}, ConfigError, "max_position_embeddings"),
    ({"num_attention_heads": 5}, ConfigError, r"num_attention_heads \(5\) must be a multiple"),
    ({"hidden_size": 66, "num_key_value_heads": 4}, ConfigError, r"hidden_size \(66\) must be a multiple"),
    ({"head_dim": 15}, ConfigError, "head_dim must be even"),
    ({"rms_norm_eps": float("nan")}, ConfigError, "rms_norm_eps"),
    ({"rms_norm_eps": 0}, ConfigError, "rms_norm_eps"),
    ({"rope_theta": float("inf")}, ConfigError, "rope_theta"),
    ({"rope_theta": 1}, ConfigError, "rope_theta"),
    ({"rope_scaling": {"type": "linear"}}, ConfigError, "rope_scaling: factor is missing"),
    ({"rope_scaling": {"type": "linear", "factor": 0.5}}, ConfigError, "at least 1"),
    ({"rope_scaling": {"type": "llama3", "factor": 8}}, ConfigError, "low_freq_factor is missing"),
    (
        {"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}},
        ConfigError,
        "high_freq_factor must be above",
    ),
    (
        {"architectures": ["Gemma2ForCausalLM"], "layer_types": ["full_attention"]},
        ConfigError,
        "layer_types has 1 entries for 4 layers",
    ),
    (
        {"architectures": ["Gemma2ForCausalLM"], "sliding_window": None},
        ConfigError,
        "no sliding_window is set",
    ),
    ({"architectures": ["Gemma2ForCausalLM"], "final_logit_softcapping": 0}, ConfigError, "final_logit_softcapping"),
]


@pytest.mark.parametrize(("changes", "error", "message"), REFUSED, ids=[case[2] for case in REFUSED])
def test_refused_with_its_own_message(changes: dict[str, Any], error: type[WavetrainError], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        config(**changes)
    assert type(caught.value) is error


@given(
    st.sampled_from(
        [*LLAMA, "head_dim", "rope_theta", "rope_scaling", "sliding_window", "layer_types", "dtype", "num_experts"]
    ),
    st.sampled_from(
        ["LlamaForCausalLM", "MistralForCausalLM", "Qwen3ForCausalLM", "Gemma2ForCausalLM", "Qwen3MoeForCausalLM"]
    ),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["type", "factor"]), inner),
        max_leaves=6,
    ),
)
def test_any_value_is_read_or_refused(key: str, architecture: str, value: Any) -> None:
    try:
        read = ModelConfig.from_mapping({**LLAMA, "architectures": [architecture], key: value})
    except (ConfigError, CheckpointError):
        return
    assert read.num_heads % read.num_kv_heads == 0


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint directory 'nothing'") as caught:
        ModelConfig.load(tmp_path / "nothing")
    assert str(tmp_path) not in str(caught.value)


def test_missing_config_json(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        ModelConfig.load(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", r"config\.json is not valid JSON"),
        (b"\xff\xfe", r"config\.json is not valid JSON"),
        (b"[" * 200_000, r"config\.json is not valid JSON"),
        (b'{"vocab_size": ' + b"9" * 5000 + b"}", r"config\.json is not valid JSON"),
        (b"[]", "must hold a JSON object"),
        (b" " * 2**21, "larger than"),
    ],
)
def test_broken_config_json(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        ModelConfig.load(tmp_path)


def test_unknown_keys_do_not_matter(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "_name_or_path": "x", "auto_map": {"A": "b.C"}}))
    assert ModelConfig.load(tmp_path) == config()
