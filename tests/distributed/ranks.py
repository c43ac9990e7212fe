"""Real processes, joined once by gloo, that run one function after another: starting them is what takes time."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = 60.0  # seconds until a rank that waits gives up
SIZES = (1, 2, 3, 4, 7)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Ranks:
    """``size`` processes of one group, and in it the groups of the *last* n ranks, so that a rank's number in its group
    is not its number in the world."""

    def __init__(self, size: int, groups: tuple[int, ...], timeout: float = TIMEOUT) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "parallelflow"])
        port = free_port()
        self.size = size
        self.pipes, self.processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            arguments = (rank, size, groups, port, timeout, theirs)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """``function(group, *arguments)`` on the ranks of the group of this size; their results, or the first error."""
        answers = self.answers(size, function, *arguments)
        for rank, (result, error) in enumerate(answers):
            assert error is None, f"rank {rank} of {size}: {error}"
            del result
        return [result for result, _ in answers]

    def answers(
        self, size: int, function: Callable[..., Any], *arguments: Any, but: int | None = None
    ) -> list[tuple[Any, str | None]]:
        """Each rank's result and error; nobody waits for the rank ``but``."""
        pipes = self.pipes[self.size - size :]
        for pipe in pipes:
            pipe.send_bytes(pickle.dumps((size, function, arguments)))
        found = []
        for rank, pipe in enumerate(pipes):
            if rank == but:
                continue
            assert pipe.poll(2 * TIMEOUT), f"rank {rank} of {size} does not answer"
            try:
                found.append(pickle.loads(pipe.recv_bytes()))
            except EOFError:
                found.append((None, "the process has died"))
        return found

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


def _serve(rank: int, size: int, groups: tuple[int, ...], port: int, timeout: float, pipe: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    patience = datetime.timedelta(seconds=timeout)
    dist.init_process_group("gloo", rank=rank, world_size=size, timeout=patience)
    made = {n: dist.new_group(range(size - n, size), timeout=patience) for n in groups}
    while True:
        try:
            count, function, arguments = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            answer = (function(made[count], *arguments), None)
        except Exception as error:
            answer = (f"{type(error).__name__}: {error}", traceback.format_exc())
        pipe.send_bytes(pickle.dumps(answer))
