# SPDX-License-Identifier: Apache-2.0
"""What vLLM is started with on a CPU, offline and in vllm_backend, to be at its best."""

from __future__ import annotations

import ctypes.util
import os
import sys
from pathlib import Path

KV_CACHE_GIB = 2


def variables() -> dict[str, str]:
    """Variables to set where they are not set.

    Left to itself vLLM keeps one core for its scheduler and computes on the others, on two cores with half of them.
    """
    return {
        "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def preloads(prefix: Path) -> list[str]:
    """The libraries that vLLM, installed under `prefix`, wants preloaded, as its documentation says, if they are there.

    Intel's OpenMP comes with its environment; tcmalloc is Debian's libtcmalloc-minimal4.
    """
    openmp, tcmalloc = prefix / "lib" / "libiomp5.so", ctypes.util.find_library("tcmalloc_minimal")
    if tcmalloc is None:
        sys.stderr.write("without tcmalloc vLLM is slower; on Debian: apt-get install libtcmalloc-minimal4\n")
    return [*([tcmalloc] if tcmalloc else []), *([str(openmp)] if openmp.exists() else [])]
