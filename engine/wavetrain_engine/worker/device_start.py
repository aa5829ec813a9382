# SPDX-License-Identifier: Apache-2.0
"""From a loaded model to a runner on a GPU: what it needs is measured, the KV cache gets the rest."""

from __future__ import annotations

import logging
import time

from wavetrain_engine.config import EngineConfig
from wavetrain_engine.facts import EngineFacts
from wavetrain_engine.generation_config import GenerationConfig
from wavetrain_engine.layers.attention import KVCacheSpec
from wavetrain_engine.models.model import Model
from wavetrain_engine.sampling.state import SamplingState
from wavetrain_engine.worker.cuda_graphs import CudaRecorder, Recorder, collector_at_rest, graph_keys
from wavetrain_engine.worker.device_batch import DeviceBatch
from wavetrain_engine.worker.device_runner import DeviceRunner
from wavetrain_engine.worker.executor import DeviceExecutor
from wavetrain_engine.worker.kv_cache import allocate_kv_caches
from wavetrain_engine.worker.memory import device_memory_needed, measure_working_bytes
from wavetrain_engine.worker.rehearsal import Rehearsal

_LOG = logging.getLogger(__name__)


class DeviceStart:
    """Brings a runner up in the order that memory demands: its tables, the largest step, the KV cache, the graphs.

    Until the size of the KV cache is known the runner has one of a single block, in which every token of a rehearsed
    step lies.

    Raises:
        ConfigError: there is not enough memory; the message says which flag to lower. Of the methods too.
    """

    def __init__(
        self,
        config: EngineConfig,
        model: Model,
        cache_spec: KVCacheSpec,
        generation: GenerationConfig,
        max_model_len: int,
    ) -> None:
        self._config = config
        self._model = model
        self._cache_spec = cache_spec
        self._keys = graph_keys(config.scheduler.max_num_seqs, config.scheduler.max_num_batched_tokens)
        max_num_seqs, block_size = config.scheduler.max_num_seqs, config.cache.block_size
        with device_memory_needed(
            f"the token ids of {max_num_seqs} requests of {max_model_len} tokens",
            "lower --max-num-seqs or --max-model-len",
        ):
            batch = DeviceBatch(
                max_num_seqs=max_num_seqs,
                max_model_len=max_model_len,
                block_size=block_size,
                static_shape=self._keys[0].shape,
                device=model.device,
            )
        self._runner = DeviceRunner(
            model=model,
            kv_caches=allocate_kv_caches(cache_spec, 1, block_size, model.device),
            batch=batch,
            state=SamplingState(model.config.vocab_size, model.device),
            eos_token_ids=generation.eos_token_ids,
        )
        self._rehearsal = Rehearsal(
            self._runner,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
            max_model_len=max_model_len,
            block_size=block_size,
        )

    def measure_working_bytes(self) -> int:
        """Runs the largest step and returns what it holds at a time, beyond what stays."""
        with device_memory_needed(
            f"a step of {self._config.scheduler.max_num_batched_tokens} tokens beside the weights",
            "lower --max-num-batched-tokens or --max-num-seqs",
        ):
            return measure_working_bytes(self._rehearsal.largest_step, self._model.device)

    def finish(self, facts: EngineFacts) -> DeviceExecutor:
        """Allocates the KV cache, runs a step of every kind, and captures those that decode."""
        with device_memory_needed(
            f"{facts.num_blocks} KV-cache blocks",
            "lower --gpu-memory-utilization, or --kv-cache-memory or --num-blocks where they are set",
        ):
            caches = allocate_kv_caches(self._cache_spec, facts.num_blocks, facts.block_size, self._model.device)
        self._runner.use_kv_caches(caches)
        started = time.monotonic()
        with device_memory_needed("a step beside the KV cache", "lower --gpu-memory-utilization"):
            self._rehearsal.every_step()
        _LOG.info("a step of every kind took %.1f s", time.monotonic() - started)
        self._capture(_recorder(self._config, facts))
        return DeviceExecutor(self._runner)

    def _capture(self, record: Recorder | None) -> None:
        if record is None:
            return
        started = time.monotonic()
        memory = device_memory_needed("CUDA graphs", "lower --gpu-memory-utilization, or set --enforce-eager")
        try:
            with memory, collector_at_rest():
                self._runner.capture(self._keys, record)
        except RuntimeError as error:
            # What ended a capture raises first; that it was cut short is raised on top, and says nothing.
            cause = error.__context__ or error
            message = str(cause).partition("\n")[0]
            _LOG.warning("no CUDA graphs, so decoding is slow: a step cannot be captured (%s)", message, exc_info=cause)
        else:
            _LOG.info("%d CUDA graphs captured in %.1f s", len(self._keys), time.monotonic() - started)


def _recorder(config: EngineConfig, facts: EngineFacts) -> Recorder | None:
    """Returns what captures graphs; None: steps run layer by layer, and the log says why."""
    if config.model.enforce_eager:
        _LOG.info("no CUDA graphs: --enforce-eager is set")
        return None
    if facts.kernels != "gpu":
        _LOG.warning("no CUDA graphs, so decoding is slow: the %s kernels read their inputs on the host", facts.kernels)
        return None
    return CudaRecorder()
