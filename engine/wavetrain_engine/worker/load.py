# SPDX-License-Identifier: Apache-2.0
"""From a configuration to a running executor: the one entry point of the worker side."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

import torch

from wavetrain_engine.config import EngineConfig
from wavetrain_engine.environment import Environment
from wavetrain_engine.errors import ConfigError
from wavetrain_engine.facts import EngineFacts
from wavetrain_engine.generation_config import GenerationConfig
from wavetrain_engine.layers.attention import KVCacheSpec
from wavetrain_engine.model_location import ModelLocation
from wavetrain_engine.models.model import Model
from wavetrain_engine.models.model_config import ModelConfig
from wavetrain_engine.models.registry import create_model, resolve_dtype
from wavetrain_engine.plan import Executor
from wavetrain_engine.sampling.state import SamplingState
from wavetrain_engine.version import VERSION
from wavetrain_engine.weights.loader import Progress as WeightProgress
from wavetrain_engine.weights.loader import load_weights
from wavetrain_engine.weights.random_weights import draw_weights
from wavetrain_engine.worker.cpu_threads import set_cpu_threads
from wavetrain_engine.worker.device_start import DeviceStart
from wavetrain_engine.worker.executor import LocalExecutor
from wavetrain_engine.worker.input_batch import InputBatch
from wavetrain_engine.worker.kv_cache import allocate_kv_caches, kv_cache_spec
from wavetrain_engine.worker.memory import num_kv_blocks
from wavetrain_engine.worker.model_runner import ModelRunner
from wavetrain_engine.worker.step_program import record_step
from wavetrain_kernels.errors import UnsupportedDevice
from wavetrain_kernels.kernel_set import KernelSet
from wavetrain_kernels.ops import choose_kernels

_LOG = logging.getLogger(__name__)

# GPUs of compute capability 8, Ampere, were the first with bfloat16.
_FIRST_BFLOAT16_GENERATION = 8

Progress = Callable[[str, int, int], None]
"""Called with (phase, done, total); phase `weights` counts bytes."""


def load_executor(
    config: EngineConfig, *, environment: Environment, progress: Progress | None = None
) -> tuple[Executor, EngineFacts]:
    """Loads the checkpoint that `config` names and makes it ready to execute plans.

    Args:
        environment: says which kernels to use, and where those that are compiled here are kept.

    Raises:
        ConfigError: a flag does not fit the model or the machine.
        CheckpointError: the checkpoint is missing, broken or not supported.
    """
    started = time.monotonic()
    cpu_threads = set_cpu_threads(config.model.cpu_threads)
    report = progress or (lambda _phase, _done, _total: None)
    model_dir = _model_dir(config)
    model_config = ModelConfig.load(model_dir)
    generation = GenerationConfig.load(model_dir)
    device = _device(config)
    dtype = _dtype(config, model_config, device)
    kernels = _choose_kernels(environment, device)
    has_int8_inputs = _has_int8_inputs(config, device, dtype, kernels)
    max_model_len = model_config.max_model_len if config.model.max_model_len is None else config.model.max_model_len
    model = create_model(model_config, dtype, device, max_model_len=max_model_len)
    cache_spec = kv_cache_spec(model, config.cache.kv_cache_dtype)
    weight_bytes = _load_weights(config, model, has_int8_inputs, lambda done, total: report("weights", done, total))
    start = DeviceStart(config, model, cache_spec, generation, max_model_len) if _is_device_resident(device) else None
    bytes_per_block = cache_spec.bytes_per_block(config.cache.block_size)
    num_blocks = num_kv_blocks(
        config.cache,
        bytes_per_block,
        -(-max_model_len // config.cache.block_size) * config.scheduler.max_num_seqs,
        device,
        working_bytes=0 if start is None else start.measure_working_bytes(),
    )
    max_model_len = _fit_model_len(config, max_model_len, num_blocks)
    facts = EngineFacts(
        architecture=model_config.architecture,
        dtype=str(dtype).removeprefix("torch."),
        device=str(device),
        cpu_threads=cpu_threads,
        kernels=kernels.name,
        vocab_size=model_config.vocab_size,
        max_model_len=max_model_len,
        block_size=config.cache.block_size,
        num_blocks=num_blocks,
        kv_cache_dtype=cache_spec.dtype_name,
        kv_cache_bytes=num_blocks * bytes_per_block,
        weight_bytes=weight_bytes,
        max_num_seqs=config.scheduler.max_num_seqs,
        max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
        generation=generation,
        load_s=time.monotonic() - started,
        version=VERSION,
    )
    executor = _host_executor(config, model, cache_spec, facts) if start is None else start.finish(facts)
    _log_facts(facts)
    return executor, facts


def _is_device_resident(device: torch.device) -> bool:
    """Whether what steps need stays on the device; tests say so of the CPU."""
    return device.type != "cpu"


def _load_weights(config: EngineConfig, model: Model, has_int8_inputs: bool, progress: WeightProgress) -> int:
    """Returns their bytes."""
    if config.model.load_format == "dummy":
        _LOG.warning("the weights are random: --load-format dummy is for measuring")
        return draw_weights(model, progress=progress)
    return load_weights(
        model, Path(config.model.model), model.config, has_int8_inputs=has_int8_inputs, progress=progress
    )


def _host_executor(config: EngineConfig, model: Model, cache_spec: KVCacheSpec, facts: EngineFacts) -> Executor:
    kv_caches = allocate_kv_caches(cache_spec, facts.num_blocks, facts.block_size, model.device)
    program = record_step(
        model,
        kv_caches,
        capacity=facts.max_num_batched_tokens,
        max_model_len=facts.max_model_len,
        device=model.device,
    )
    runner = ModelRunner(
        model=model,
        kv_caches=kv_caches,
        batch=_input_batch(config, facts.max_model_len),
        state=SamplingState(facts.vocab_size, model.device),
        eos_token_ids=facts.generation.eos_token_ids,
        program=program,
    )
    return LocalExecutor(runner, is_async=config.scheduler.plans_ahead(facts.device))


def _model_dir(config: EngineConfig) -> Path:
    if not config.model.model:
        raise ConfigError("no model is set; give a checkpoint directory or a GGUF file")
    return ModelLocation.find(config.model.model).path


def _device(config: EngineConfig) -> torch.device:
    if config.model.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: no usable NVIDIA GPU was found; `wavetrain doctor` says why")
    if config.model.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(config.model.device)


def _dtype(config: EngineConfig, model_config: ModelConfig, device: torch.device) -> torch.dtype:
    """Returns the dtype of weights and activations: what was asked for, or the nearest that the GPU has."""
    dtype = resolve_dtype(model_config, config.model.dtype)
    if device.type != "cuda" or dtype is not torch.bfloat16:
        return dtype
    major, minor = torch.cuda.get_device_capability(device)
    if major >= _FIRST_BFLOAT16_GENERATION:
        return dtype
    lack = f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}, and bfloat16 needs 8.0"
    if config.model.dtype != "auto":
        raise ConfigError(f"--dtype bfloat16: {lack}; use --dtype float16, or leave it to auto")
    _LOG.warning("%s: the model is served in float16", lack)
    return torch.float16


def _has_int8_inputs(config: EngineConfig, device: torch.device, dtype: torch.dtype, kernels: KernelSet) -> bool:
    """Whether inputs of weights in integers are rounded to int8 where the checkpoint does not say so."""
    wanted = config.model.activation_dtype
    if wanted == "int8" and device.type != "cpu":
        raise ConfigError(f"--activation-dtype int8: inputs are rounded so on CPUs only, and the device is {device}")
    return wanted == "int8" or (wanted == "auto" and kernels.is_faster_in_int8 and dtype is torch.bfloat16)


def _choose_kernels(environment: Environment, device: torch.device) -> KernelSet:
    """Returns the set that answers; before the weights are loaded, whose layout may be up to it."""
    try:
        return choose_kernels(environment.kernels, device, environment.kernel_cache_dir)
    except UnsupportedDevice as error:
        raise ConfigError(f"WAVETRAIN_KERNELS={environment.kernels}: {error}") from error


def _fit_model_len(config: EngineConfig, max_model_len: int, num_blocks: int) -> int:
    """A request of max_model_len must fit alone; without the flag, the length gives way to the memory."""
    room = num_blocks * config.cache.block_size
    if max_model_len <= room:
        return max_model_len
    if config.model.max_model_len is not None:
        raise ConfigError(
            f"--max-model-len {max_model_len} needs {-(-max_model_len // config.cache.block_size)} KV-cache blocks, "
            f"but there are {num_blocks}; lower it to {room} or raise {_pool_flag(config)}"
        )
    if room < 2:
        raise ConfigError(
            f"the KV cache holds {room} token, too few for a prompt and an output; raise --num-blocks or --block-size"
        )
    _LOG.warning("max_model_len lowered from %d to %d tokens, what the KV cache holds", max_model_len, room)
    return room


def _pool_flag(config: EngineConfig) -> str:
    return "--kv-cache-memory" if config.cache.num_blocks is None else "--num-blocks"


def _input_batch(config: EngineConfig, max_model_len: int) -> InputBatch:
    max_num_seqs = config.scheduler.max_num_seqs
    try:
        return InputBatch(max_num_seqs=max_num_seqs, max_model_len=max_model_len, block_size=config.cache.block_size)
    except MemoryError as error:
        raise ConfigError(
            f"not enough memory for the token ids of {max_num_seqs} requests of {max_model_len} tokens; lower "
            "--max-num-seqs or --max-model-len"
        ) from error


def _log_facts(facts: EngineFacts) -> None:
    _LOG.info(
        "%s, %s on %s, %d CPU threads, %s kernels, weights %.1f MiB, loaded in %.1f s",
        facts.architecture,
        facts.dtype,
        facts.device,
        facts.cpu_threads,
        facts.kernels,
        facts.weight_bytes / 2**20,
        facts.load_s,
    )
    _LOG.info(
        "KV cache: %s, %d blocks of %d tokens (%.1f MiB): %d tokens, %.1f requests of %d tokens at once",
        facts.kv_cache_dtype,
        facts.num_blocks,
        facts.block_size,
        facts.kv_cache_bytes / 2**20,
        facts.num_blocks * facts.block_size,
        facts.max_concurrency,
        facts.max_model_len,
    )
