# SPDX-License-Identifier: Apache-2.0
"""Where every weight comes from: a shape and a dtype first, memory later.

Parameters are born on the meta device, so that a model can be built, and compared with the tensors of a
checkpoint, before anything is allocated. `allocate_parameters` then gives each its memory, uninitialised:
the loader writes every element exactly once. A weight that kernels want in another layout gets none: the loader lends
it some, packs it as soon as it is complete and lends the memory to the next, so that no second copy of a large model
ever exists.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from wavetrain_kernels import ops


def empty_parameter(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    """Returns a parameter without memory, of this shape."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)


def allocate_parameters(model: nn.Module, device: torch.device) -> None:
    """Replaces every parameter of `model` but the weights to be packed by uninitialised memory on `device`.

    No two modules of ours hold the same parameter: tied embeddings are one module used twice.
    """
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(module, PackedModule) and name == "weight":
                continue
            memory = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            setattr(module, name, nn.Parameter(memory, requires_grad=False))


class PackedModule(nn.Module):
    """A module whose `weight` is there while it is loaded, and `packed` afterwards."""

    is_gated: ClassVar[bool] = False
    weight: nn.Parameter
    packed: ops.PackedWeight

    def pack(self) -> Tensor:
        """Puts the loaded weight into the layout of the kernels and lets go of it.

        Returns:
            Where it is now, which may be the memory it was loaded to.
        """
        self.packed = ops.pack_weight(self.weight.data, is_gated=self.is_gated)
        del self.weight
        return self.packed.data
