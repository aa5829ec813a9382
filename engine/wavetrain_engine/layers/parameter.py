# SPDX-License-Identifier: Apache-2.0
"""Where every weight comes from: a shape and a dtype first, memory later.

Parameters are born on the meta device, so that a model can be built, and compared with the tensors of a
checkpoint, before anything is allocated. `allocate_parameters` then gives each its memory, uninitialised:
the loader writes every element exactly once, and no second copy of a large model ever exists.
"""

from __future__ import annotations

import torch
from torch import nn


def empty_parameter(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    """Returns a parameter without memory, of this shape."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)


def allocate_parameters(model: nn.Module, device: torch.device) -> None:
    """Replaces every parameter of `model` by uninitialised memory on `device`.

    No two modules of ours hold the same parameter: tied embeddings are one module used twice.
    """
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            memory = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            setattr(module, name, nn.Parameter(memory, requires_grad=False))
