"""What is measured is on disk, figure by figure: a run that is killed loses the one that it was measuring."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from parallelflow.cli.machine import machine
from parallelflow.cli.reproduce.parts import PARTS, Figures


class Store:
    """The figures of one part in ``folder``.

    ``<part>.unfinished`` has a line for the run (quick or not, and on what machine) and then a line for each figure;
    when the last one is there, ``<part>.json`` takes their place. Figures of another machine count as not measured.
    """

    def __init__(self, folder: Path, part: str, *, quick: bool) -> None:
        self.part = PARTS[part]
        self.finished, self.unfinished = folder / f"{part}.json", folder / f"{part}.unfinished"
        self.run = {"quick": quick, "machine": machine()}
        self.settings = self.part.settings(quick)

    def complete(self) -> bool:
        """Whether the part has been measured, this way and on this machine."""
        if not self.finished.exists():
            return False
        held = read(self.finished)
        rows = held["rows"]
        same = {key: held[key] for key in self.run} == self.run and len(rows) == len(self.settings)
        return same and all(map(self._is_of, rows, self.settings))

    def forget(self) -> None:
        """Everything is measured again."""
        self.finished.unlink(missing_ok=True)
        self.unfinished.unlink(missing_ok=True)

    def measure(self) -> Iterator[Figures]:
        """Every figure of the part: those of an interrupted run first, then one by one as they are measured."""
        kept = self._kept()
        lines = [{"seconds": seconds, "row": row} for seconds, row in kept]
        _write(self.unfinished, [self.run, *lines])  # whatever else is in there, half a line or another run, goes
        yield from (row for _, row in kept)
        seconds = sum(spent for spent, _ in kept)
        rows = [row for _, row in kept]
        with self.unfinished.open("a", encoding="utf-8") as file:
            for setting in self.settings[len(kept) :]:
                start = time.perf_counter()
                row = setting | self.part.measure(**setting)
                spent = time.perf_counter() - start
                file.write(json.dumps({"seconds": spent, "row": row}) + "\n")
                file.flush()
                seconds, rows = seconds + spent, [*rows, row]
                yield row
        _write(self.finished, [self.run | {"seconds": seconds, "rows": rows}], indent=1)
        self.unfinished.unlink()

    def _kept(self) -> list[tuple[float, Figures]]:
        """What an interrupted run of the same kind left: the figures of the first settings."""
        if not self.unfinished.exists():
            return []
        lines = []
        for line in self.unfinished.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:
                break  # the line at which it was killed
        if not lines or lines[0] != self.run:
            return []
        kept = []
        for setting, line in zip(self.settings, lines[1:], strict=False):
            if not self._is_of(line["row"], setting):
                break
            kept.append((line["seconds"], line["row"]))
        return kept

    def _is_of(self, row: Figures, setting: Figures) -> bool:
        """Whether a figure is of this setting, and has all that is measured of it now."""
        return row.items() >= setting.items() and row.keys() == {*setting, *self.part.finds}


def _write(file: Path, lines: list[dict[str, Any]], indent: int | None = None) -> None:
    """All lines or, when it is killed here, the file as it was."""
    new = file.with_suffix(".new")
    new.write_text("".join(json.dumps(line, indent=indent) + "\n" for line in lines), encoding="utf-8")
    new.replace(file)


def read(file: Path) -> dict[str, Any]:
    """A finished part: ``quick``, ``machine``, ``seconds``, ``rows``."""
    return json.loads(file.read_text(encoding="utf-8"))
