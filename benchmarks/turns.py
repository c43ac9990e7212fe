"""Processes that prepare side by side and are timed one after another, with nothing else on the card.

A worker prints ``ready`` when its first calls are behind it, awaits a line, and then prints its rows, as JSON in one
line. What libraries print goes to the worker's log.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from benchmarks import report


class Job(NamedTuple):
    """``name``: what its log is called and how it is reported. ``environment`` is added to this process's."""

    name: str
    command: list[str]
    environment: dict[str, str]


def work(rows: Callable[[Callable[[], None]], Iterable[report.Row]]) -> None:
    """In a worker: prints what ``rows`` gives; it is given what to call between the first calls and the timing."""
    parent = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def wait() -> None:
        print("ready", file=parent, flush=True)
        sys.stdin.readline()

    print(json.dumps(list(rows(wait))), file=parent, flush=True)


def start(job: Job, folder: Path) -> subprocess.Popen[str]:
    log = (folder / f"{job.name}.log").open("w")
    return subprocess.Popen(
        job.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, bufsize=1,
        env={**os.environ, **job.environment}, cwd=report.ROOT,
    )  # fmt: skip


def line_of(process: subprocess.Popen[str], until: float) -> str:
    """The next line of a process, or nothing where it ends or takes longer."""
    assert process.stdout is not None
    waiting = max(until - time.monotonic(), 0)
    return process.stdout.readline().strip() if select.select([process.stdout], [], [], waiting)[0] else ""


def run(jobs: list[Job], patience: float, folder: Path) -> list[report.Row]:
    """The rows of all that were ready within ``patience`` seconds; each is then given a minute for its rows."""
    until = time.monotonic() + patience
    processes = [(job, start(job, folder)) for job in jobs]
    ready = [(*each, line_of(each[1], until) == "ready") for each in processes]
    for _, process, answered in ready:
        if not answered:
            process.kill()
    rows = []
    for job, process, answered in ready:
        found: list[report.Row] = []
        if answered and process.stdin is not None:
            process.stdin.write("\n")
            process.stdin.flush()
            found = json.loads(line_of(process, time.monotonic() + 60) or "[]")
        process.kill()
        process.wait()
        if not found:
            log = (folder / f"{job.name}.log").read_text().strip().splitlines()
            print(f"no row: {job.name}: {log[-1] if log else 'too slow'}", flush=True)
        for row in found:
            print(json.dumps(row), flush=True)
        rows += found
    return rows
