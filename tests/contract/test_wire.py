# SPDX-License-Identifier: Apache-2.0
"""The contract between clients and engine is config.pbtxt; here it is held against all that must agree with it.

contracts/*.json are the tensors of the two backends we stand in for, as their own repositories had them.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from fakes import pb_utils
from wavetrain_engine.errors import ErrorCode
from wavetrain_engine.sampling_params import SamplingParams
from wavetrain_engine.serving.contracts import (
    DETOKENIZER_SPAN,
    DETOKENIZER_TAIL_IDS,
    DETOKENIZER_TOKEN_IDS,
    ENGINE,
    ENSEMBLE,
    LLM,
    NEVER_MAPPED_OUTPUT,
    Contract,
)
from wavetrain_engine.serving.error_codes import triton_error
from wavetrain_engine.serving.row_inputs import RowOptions

ROOT = Path(__file__).parents[2]
REPOSITORY = ROOT / "model_repository"
MODELS = ("tokenizer", "engine", "detokenizer", "ensemble", "llm")
LEGACY = json.loads((Path(__file__).parent / "contracts/inflight_batcher_llm.json").read_text(encoding="utf-8"))
VLLM = json.loads((Path(__file__).parent / "contracts/vllm_backend.json").read_text(encoding="utf-8"))["vllm_model"]

Tensors = dict[str, tuple[str, list[int], bool]]


def read_config(model: str) -> Any:
    text = (REPOSITORY / model / "config.pbtxt").read_text(encoding="utf-8")
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def declared(tensors: Any) -> Tensors:
    """Name to (dtype, dims, optional) of a config.pbtxt's inputs or outputs."""
    return {
        item.name: (
            model_config_pb2.DataType.Name(item.data_type).removeprefix("TYPE_"),
            list(item.dims),
            bool(getattr(item, "optional", False)),
        )
        for item in tensors
    }


def contract(tensors: list[dict[str, Any]]) -> Tensors:
    return {item["name"]: (item["dtype"], item["dims"], item.get("optional", False)) for item in tensors}


@pytest.mark.parametrize(
    ("model", "original", "own_inputs", "own_outputs"),
    [
        ("ensemble", "ensemble", {"min_length"}, set()),
        (
            "engine",
            "tensorrt_llm",
            {"min_length", "stop_words"},
            {DETOKENIZER_TAIL_IDS, DETOKENIZER_TOKEN_IDS, DETOKENIZER_SPAN},
        ),
    ],
)
def test_legacy_models_declare_the_legacy_contract(
    model: str, original: str, own_inputs: set[str], own_outputs: set[str]
) -> None:
    config = read_config(model)
    for ours, theirs, own in [
        (declared(config.input), contract(LEGACY[original]["inputs"]), own_inputs),
        (declared(config.output), contract(LEGACY[original]["outputs"]), own_outputs),
    ]:
        assert {name: item for name, item in ours.items() if name not in own} == theirs
        assert ours.keys() - theirs.keys() == own
    assert all(declared(config.input)[name][2] for name in own_inputs)
    assert config.max_batch_size == 64


def test_llm_declares_both_contracts_and_vllm_decides() -> None:
    config = read_config("llm")
    inputs = contract(LEGACY["ensemble"]["inputs"]) | contract(VLLM["inputs"])
    expected = {name: (dtype, dims, name != "text_input") for name, (dtype, dims, _) in inputs.items()}
    expected |= {"min_length": ("INT32", [1], True), "stop": ("BOOL", [1], True)}
    expected |= {"input_ids": ("INT32", [-1], True)}
    expected |= {name: ("STRING", [1], True) for name in ("messages", "template_variables")}
    assert declared(config.input) == expected
    own = {"prompt_logprobs": ("STRING", [1], False), "num_cached_tokens": ("INT32", [1], False)}
    assert declared(config.output) == contract(LEGACY["ensemble"]["outputs"]) | contract(VLLM["outputs"]) | own
    assert config.max_batch_size == 0
    # The names of both with another type: vLLM's, as its clients send tensors without a batch dimension too.
    legacy, vllm = contract(LEGACY["ensemble"]["outputs"]), contract(VLLM["outputs"])
    different = {name for name in legacy.keys() & vllm.keys() if legacy[name] != vllm[name]}
    assert different == {"num_input_tokens", "num_output_tokens"}


@pytest.mark.parametrize(("model", "table"), [("engine", ENGINE), ("ensemble", ENSEMBLE), ("llm", LLM)])
def test_every_input_has_exactly_one_meaning(model: str, table: Contract) -> None:
    columns = [set(table.sampling), set(table.switches), set(table.refused), set(table.special)]
    assert sum(map(len, columns)) == len(table.inputs)
    assert table.inputs == declared(read_config(model).input).keys()
    assert set(table.sampling.values()) <= set(SamplingParams.__struct_fields__)
    assert set(table.switches.values()) <= set(RowOptions.__dataclass_fields__)
    assert set(table.required) <= table.inputs


def test_ensemble_s_steps_fit_together() -> None:
    config = read_config("ensemble")
    known = set(declared(config.input))
    used: set[str] = set()
    for step in config.ensemble_scheduling.step:
        model = read_config(step.model_name)
        inputs, outputs = declared(model.input), declared(model.output)
        assert step.input_map.keys() <= inputs.keys()
        assert step.output_map.keys() <= outputs.keys()
        assert set(step.input_map.values()) <= known
        assert {name for name, item in inputs.items() if not item[2]} <= step.input_map.keys()
        assert NEVER_MAPPED_OUTPUT not in step.output_map
        known |= set(step.output_map.values())
        used |= set(step.input_map.values())
    assert set(declared(config.input)) <= used, "an input that reaches no step is silently ignored"
    assert set(declared(config.output)) <= known


@pytest.mark.parametrize("model", MODELS)
def test_configs_carry_shapes_and_the_engine_s_file_only(model: str) -> None:
    config = read_config(model)
    assert config.name == model
    if model != "ensemble":
        assert list(config.parameters) == ["engine_config"]
        path = (REPOSITORY / model / config.parameters["engine_config"].string_value).resolve()
        assert path == REPOSITORY / "engine" / "1" / "engine.toml"
    assert config.model_transaction_policy.decoupled == (model in {"engine", "llm"})


@pytest.mark.parametrize("model", [name for name in MODELS if name != "ensemble"])
def test_model_files_have_no_logic(model: str) -> None:
    text = (REPOSITORY / model / "1" / "model.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 50
    kinds = {type(node) for node in ast.parse(text).body}
    assert kinds <= {ast.Expr, ast.ImportFrom, ast.Assign}


def test_every_error_has_its_word_and_a_triton_code() -> None:
    for code in ErrorCode:
        error = triton_error(code, "what was wrong\nand a second line")
        assert error.message() == f"{code.value}: what was wrong and a second line"
        assert error.code() in range(8)
    assert len(triton_error(ErrorCode.INVALID, "x" * 5000).message()) < 600
    assert triton_error(ErrorCode.INVALID, "").code() == pb_utils.TritonError.INVALID_ARG
