"""What running code costs: its arithmetic, and how long its chains of dependent operations are.

Everything is read off the operations that are executed, one by one; nothing is taken from a formula.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PRODUCTS = ("mm", "bmm")
SUMS = ("add", "sub", "rsub")
ELEMENTWISE_PRODUCTS = ("mul",)
FUSED = ("addcmul",)
FRESH = ("new_zeros", "zeros_like", "ones_like", "empty_like", "new_empty", "full_like", "new_ones")
MOVES = (
    *FRESH,
    *("view", "_unsafe_view", "reshape", "expand", "transpose", "permute", "t", "slice", "select", "unsqueeze"),
    *("squeeze", "diagonal", "flip", "cat", "stack", "clone", "copy", "index", "fill", "constant_pad_nd", "arange"),
    *("as_strided", "_to_copy", "zeros", "empty", "split", "detach", "alias", "unbind", "eye", "ones", "zero"),
)
"""Operations that compute nothing."""


@dataclass(frozen=True)
class Counts:
    """Of one run.

    ``operations``: multiplications and additions. The lengths of the longest chain of operations that wait for each
    other: ``stages`` counts every product and every sum of tensors once, ``serial`` a product of inner dimension m as
    the m additions that it is when each sum is taken term by term.
    """

    operations: int
    stages: int
    serial: int


class _Chain:
    """The longest chains that end in a tensor's memory, by its storage: parts of one tensor are not told apart."""

    def __init__(self) -> None:
        self.lengths: dict[int, tuple[int, int]] = {}
        self.kept: list[Tensor] = []  # a storage that lives is not given to another tensor

    def of(self, tensors: list[Tensor]) -> tuple[int, int]:
        found = [self.lengths.get(_storage(x), (0, 0)) for x in tensors]
        return max((x[0] for x in found), default=0), max((x[1] for x in found), default=0)

    def end(self, tensor: Tensor, lengths: tuple[int, int]) -> None:
        old = self.lengths.get(_storage(tensor), (0, 0))
        self.lengths[_storage(tensor)] = max(old[0], lengths[0]), max(old[1], lengths[1])
        self.kept.append(tensor)


class Counter(TorchDispatchMode):
    """Counts while it is entered. An operation that it does not know raises: nothing goes uncounted."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.chain = _Chain()
        self.longest = (0, 0)

    def counts(self) -> Counts:
        return Counts(self.operations, *self.longest)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function._schema.name.split("::")[1].rstrip("_")
        name = name.removesuffix("_copy") if name.endswith("_copy") and name != "_to_copy" else name
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        stages, serial = self._cost(name, inputs, outputs)
        before = (0, 0) if name in FRESH else self.chain.of(inputs)
        after = before[0] + stages, before[1] + serial
        for output in outputs:
            self.chain.end(output, after)
        self.longest = max(self.longest[0], after[0]), max(self.longest[1], after[1])
        return result

    def _cost(self, name: str, inputs: list[Tensor], outputs: list[Tensor]) -> tuple[int, int]:
        """Adds the operation's arithmetic, returns what it adds to a chain."""
        if name in PRODUCTS:
            inner = inputs[0].shape[-1]
            self.operations += 2 * inner * outputs[0].numel()
            return (1, inner) if outputs[0].numel() and inner else (0, 0)
        if name in FUSED:
            self.operations += 2 * outputs[0].numel()
            return (1, 1)
        if name in SUMS + ELEMENTWISE_PRODUCTS:
            if not outputs[0].is_floating_point():
                return (0, 0)  # arithmetic on indices
            self.operations += outputs[0].numel()
            return (1, 1)
        if name not in MOVES:
            raise NotImplementedError(f"counting: got the operation {name}, of which no cost is known")
        return (0, 0)


def count(run: Callable[[], object]) -> Counts:
    """The counts of one call."""
    with torch.no_grad(), Counter() as counter:
        run()
    return counter.counts()


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
