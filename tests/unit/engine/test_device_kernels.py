# SPDX-License-Identifier: Apache-2.0
"""The engine on the GPU's kernels: on a GPU in test_gpu_engine.py, here a few steps under Triton's interpreter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fakes.device_core import FakeRecorder, device_on_cpu
from fakes.real_core import RealCore
from fakes.tiny_checkpoints import make_tiny_checkpoint
from wavetrain_engine.worker import device_start
from wavetrain_engine.worker.cuda_graphs import GraphKey
from wavetrain_engine.worker.rehearsal import Rehearsal
from wavetrain_kernels.ops import dispatch

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="no interpreter where there is a GPU"),
    # Triton's own, in its interpreter.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
]

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17], [20, 21, 22]]
ASKED: list[dict[str, Any]] = [{}, {"temperature": 0.8, "seed": 3, "top_p": 0.9, "repetition_penalty": 1.2}]


def serve(core: RealCore) -> list[list[int]]:
    for index, prompt in enumerate(PROMPTS):
        core.add(f"r{index}", prompt, max_tokens=3, **ASKED[index])
    core.run()
    core.close()
    return [core.tokens(f"r{index}") for index in range(len(PROMPTS))]


def test_padded_rows_do_nothing_to_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows in a graph for four, on kernels that read their inputs from where a graph has them."""
    from wavetrain_kernels.gpu.kernels import GPU

    directory = make_tiny_checkpoint(tmp_path, with_tokenizer=False, head_dim=64)
    flags: dict[str, Any] = {"max_model_len": 96, "max_num_seqs": 4, "max_num_batched_tokens": 16}
    monkeypatch.setenv("WAVETRAIN_KERNELS", "reference")
    expected = serve(RealCore(directory, **flags))
    device_on_cpu(monkeypatch, with_graphs=False)
    recorder = FakeRecorder()
    monkeypatch.setattr(recorder, "check", False)
    monkeypatch.setenv("WAVETRAIN_KERNELS", "gpu")
    monkeypatch.setitem(dispatch._AVAILABLE["cpu"], "gpu", lambda _cache_dir: GPU)
    monkeypatch.setattr(device_start, "_recorder", lambda _config, _facts: recorder)
    monkeypatch.setattr(device_start, "graph_keys", lambda *_sizes: [GraphKey(4, 1)])
    # Under the interpreter, running every kind of step would take minutes.
    monkeypatch.setattr(Rehearsal, "every_step", lambda _self: None)
    monkeypatch.setattr(Rehearsal, "largest_step", lambda _self: None)
    assert serve(RealCore(directory, **flags)) == expected
    assert recorder.num_replays > 0
