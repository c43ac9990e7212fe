"""The tokens of files, read where they lie: nothing is loaded whole."""

from __future__ import annotations

import bisect
import itertools
import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from parallelflow.checks import expect_kind
from parallelflow.training.recipe import Recipe
from parallelflow.training.tokens import Bytes, Tokenizer, Tokens, encoded

EVALUATION = 2**62  # a stream of random numbers that no step has


class Text(NamedTuple):
    """Files of tokens of ``width`` bytes, one behind another; ``ends``: where each ends, in tokens."""

    files: tuple[Path, ...]
    ends: tuple[int, ...]
    width: int
    tokens: Tokens

    @property
    def total(self) -> int:
        """How many tokens there are."""
        return self.ends[-1]

    def read(self, start: int, count: int) -> Tensor:
        """Tokens ``start`` to ``start + count``: ``[count]``, int64. Raises a ValueError where a file has shrunk."""
        parts, index = [], bisect.bisect_right(self.ends, start)
        while count:
            first = self.ends[index - 1] if index else 0
            taken = min(count, self.ends[index] - start)
            with self.files[index].open("rb") as stream:
                stream.seek((start - first) * self.width)
                parts.append(stream.read(taken * self.width))
            if len(parts[-1]) < taken * self.width:
                raise ValueError(f"data: {self.files[index]} has become shorter while it was read")
            start, count, index = start + taken, count - taken, index + 1
        kind = torch.uint8 if self.width == 1 else torch.int32
        return torch.frombuffer(bytearray(b"".join(parts)), dtype=kind).long()

    def batch(self, recipe: Recipe, stream: int, held_out: bool = False) -> Tensor:
        """Random windows ``[batch, length + 1]``, int64. They depend on the seed and on ``stream`` alone, so that a
        training that goes on sees what it would have seen."""
        cut = int(self.total * (1 - recipe.held_out))
        first, last = (cut, self.total) if held_out else (0, cut)
        generator = torch.Generator().manual_seed((recipe.seed * 0x9E3779B97F4A7C15 + stream) % 2**63)
        starts = torch.randint(first, last - recipe.length, (recipe.batch,), generator=generator, device="cpu")
        return torch.stack([self.read(start, recipe.length + 1) for start in starts.tolist()])


def open_text(data: Path | str, tokens: Tokens, recipe: Recipe, cache: Path | str) -> Text:
    """The text of a file, or of all files below a folder in the order of their names, hidden ones left out.

    Args:
        data: a file or a folder.
        tokens: ``Bytes()`` or a ``Tokenizer``.
        recipe: whose sequences the text is to hold.
        cache: the folder for the tokens of a tokenizer; bytes are read where they are.

    Raises:
        TypeError: for other than tokens and a recipe.
        ValueError: where there is nothing, or too little for one training and one held-out sequence.
    """
    expect_kind("tokens", tokens, (Bytes, Tokenizer), "Bytes() or a Tokenizer")
    expect_kind("recipe", recipe, Recipe, "a Recipe")
    data, cache = Path(data), Path(cache)
    if not data.exists():
        raise ValueError(f"data: got {data}, which does not exist")
    files = [data]
    if data.is_dir():
        below = ((path, path.relative_to(data).parts) for path in sorted(data.rglob("*")))
        files = [path for path, parts in below if path.is_file() and not any(part[0] == "." for part in parts)]
    for file in files:
        if not file.is_file() or not os.access(file, os.R_OK):
            raise ValueError(f"data: got {file}, expected a file that can be read, or a folder of them")
    width = 1 if isinstance(tokens, Bytes) else 4
    if isinstance(tokens, Tokenizer):
        files = [encoded(file, tokens, cache) for file in files]
    sizes = [file.stat().st_size // width for file in files]
    ends = tuple(itertools.accumulate(sizes))
    total = ends[-1] if ends else 0
    held_out = total - int(total * (1 - recipe.held_out))
    if min(held_out, total - held_out) <= recipe.length:
        what = "is empty" if total == 0 else f"has {total:,} tokens, of which {held_out:,} are held out"
        raise ValueError(f"data: {data} {what}, expected more than length = {recipe.length} in both parts")
    return Text(tuple(files), ends, width, tokens)
