# SPDX-License-Identifier: Apache-2.0
"""Before anything imports Triton: without a GPU its kernels are interpreted, here and in the processes tests start."""

from __future__ import annotations

import os

import torch

# Triton reads it when it is first imported, which any test module may do; so it is set here, above all of them.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
