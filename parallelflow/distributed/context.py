"""The ranks that hold one sequence between them, in order, and what they say to each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

_MET: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()
"""The names of the groups that have met, in each world that was initialised."""

Transfer = tuple[int, Tensor]
"""A rank of the group, and the contiguous tensor that goes there or comes from there."""


class ContextGroupError(RuntimeError):
    """The ranks of a context group did not come together: one has died, is late, or does something else."""


@dataclass(frozen=True, eq=False)
class Context:
    """A process group whose rank r holds the r-th piece of every sequence."""

    group: dist.ProcessGroup
    rank: int
    size: int

    @staticmethod
    def of(context_group: Any) -> Context:
        """From a ``ProcessGroup`` or a ``DeviceMesh`` of one dimension.

        Raises:
            TypeError, ValueError: for anything else, and where this process is not among the ranks.
        """
        if isinstance(context_group, Context):
            return context_group
        if isinstance(context_group, DeviceMesh):
            if context_group.ndim != 1:
                raise ValueError(
                    f"context_group: got a DeviceMesh of {context_group.ndim} dimensions, expected one: mesh['name']"
                )
            context_group = context_group.get_group()
        if context_group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("context_group: got a group without this process, expected one of its own")
        if not dist.is_available() or not isinstance(context_group, dist.ProcessGroup):
            raise TypeError(
                f"context_group: got {type(context_group).__name__}, expected a ProcessGroup or a DeviceMesh of one "
                "dimension with aggregate='distributed'"
            )
        return Context(context_group, dist.get_rank(context_group), dist.get_world_size(context_group))

    def over_nccl(self, device: torch.device) -> bool:
        """Whether what lies on this device travels over NCCL."""
        return device.type == "cuda" and "nccl" in dist.get_backend_config(self.group)

    def message_device(self, device: torch.device) -> torch.device:
        """Where short messages about data on ``device`` are put: the CPU, where the group reaches it."""
        return torch.device("cpu") if "cpu:" in dist.get_backend_config(self.group) else device

    def meet(self, device: torch.device) -> None:
        """NCCL wants all ranks in a group's first call, before some of them trade. Every rank comes here first."""
        world = dist.GroupMember.WORLD
        if not self.over_nccl(device) or world is None:
            return
        met = _MET.setdefault(world, set())
        if self.group.group_name not in met:
            self.sum(torch.zeros(1, device=device), "the first meeting")
            met.add(self.group.group_name)

    def gather(self, tensor: Tensor, what: str) -> list[Tensor]:
        """Every rank's tensor, all of one shape."""
        found, work = self.start_gather(tensor, what)
        self.wait(work, what)
        return found

    def start_gather(self, tensor: Tensor, what: str) -> tuple[list[Tensor], list[Any]]:
        """``gather`` under way: what will be there once the works have been waited for."""
        everyone = list(tensor.new_empty(self.size, *tensor.shape).unbind(0))
        return everyone, [self._start(what, dist.all_gather, everyone, tensor.contiguous())]

    def start_trade(self, sends: Sequence[Transfer], receives: Sequence[Transfer], what: str) -> list[Any]:
        """Sends and receives under way, all at once; those without numbers do not travel."""
        operations = [(dist.isend, *transfer) for transfer in sends] + [(dist.irecv, *x) for x in receives]
        calls = [
            dist.P2POp(kind, tensor, dist.get_global_rank(self.group, rank), self.group)
            for kind, rank, tensor in operations
            if tensor.numel()
        ]
        if not calls:
            return []
        try:
            return dist.batch_isend_irecv(calls)
        except RuntimeError as error:
            raise self._failed(what, error) from error

    def sum(self, tensor: Tensor, what: str) -> Tensor:
        """The sum over all ranks, on every rank; the tensor is given up."""
        self.wait([self._start(what, dist.all_reduce, tensor)], what)
        return tensor

    def gather_objects(self, value: Any, what: str) -> list[Any]:
        """Every rank's value."""
        everyone: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(everyone, value, group=self.group)
        except RuntimeError as error:
            raise self._failed(what, error) from error
        return everyone

    def wait(self, works: Sequence[Any], what: str) -> None:
        """Until all is there: on a GPU, for what its stream does next."""
        try:
            for work in works:
                work.wait()
        except RuntimeError as error:
            raise self._failed(what, error) from error

    def _start(self, what: str, collective: Any, *arguments: Any) -> Any:
        try:
            return collective(*arguments, group=self.group, async_op=True)
        except RuntimeError as error:
            raise self._failed(what, error) from error

    def _failed(self, what: str, error: RuntimeError) -> ContextGroupError:
        return ContextGroupError(
            f"context_group: rank {self.rank} of {self.size} waited in vain for the others ({what}): one of them "
            f"has died, is behind by more than the group's timeout, or makes other calls than this one. Told: {error}"
        )
