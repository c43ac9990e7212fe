"""What running code holds: the peak of the numbers that live at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Peak(TorchDispatchMode):
    """The largest sum, after any operation, of the storages that operations have made and that are still alive.

    What an operation allocates and frees inside itself is not seen, and what was there before counts nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._forget()
        for tensor in _tensors((args, kwargs)):
            self._hold(tensor, 0)  # unless an operation made it, it was there before
        result = function(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            self._hold(tensor, tensor.untyped_storage().nbytes() // tensor.element_size())
        self.numbers = max(self.numbers, sum(size for _, size in self.alive.values()))
        return result

    def _hold(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        self.alive.setdefault(storage._cdata, (StorageWeakRef(storage), size))

    def _forget(self) -> None:
        self.alive = {key: held for key, held in self.alive.items() if not held[0].expired()}


def peak(run: Callable[[], object]) -> int:
    """The peak of one call."""
    with torch.no_grad(), Peak() as counter:
        run()
    return counter.numbers


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]
