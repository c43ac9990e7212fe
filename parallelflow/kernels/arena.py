"""One piece of memory for all the arrays that a pass makes for itself."""

from math import prod

import torch
from torch import Tensor

ALIGNMENT = 256  # bytes


class Arena:
    """Arrays one after another in a workspace; without one they have shapes only, and ``size`` tells what it takes."""

    def __init__(self, workspace: Tensor | None = None) -> None:
        self.workspace, self.size = workspace, 0

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """The next array."""
        begin, size = self.size, prod(shape) * dtype.itemsize
        self.size += size + -size % ALIGNMENT
        if self.workspace is None:
            return torch.empty(shape, dtype=dtype, device="meta")
        return self.workspace[begin : begin + size].view(dtype).view(shape)
