"""Text to tokens and back: bytes, or the tokens of a tokenizer file."""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from parallelflow.training.checkpoint import digest


class Tokens(Protocol):
    """A vocabulary. ``name`` tells one from another: checkpoints have it."""

    name: str
    size: int

    def encode(self, text: str) -> list[int]:
        """The tokens of a text."""
        ...

    def decoder(self) -> Callable[[int], str]:
        """Takes a token after another and gives the text that each completes."""
        ...


class Bytes(Tokens):
    """Every byte is a token."""

    name = "bytes"
    size = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", errors="surrogateescape"))

    def decoder(self) -> Callable[[int], str]:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return lambda token: decoder.decode(bytes([token]))


class Tokenizer(Tokens):
    """A tokenizer file of the library ``tokenizers`` (``tokenizer.json``).

    Raises:
        ValueError: where the file is none.
    """

    def __init__(self, file: Path) -> None:
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
            self.name = digest(file)
        except Exception as error:  # the library raises bare exceptions
            raise ValueError(f"tokenizer: {file} cannot be read as a tokenizer file: {error}") from None
        self.size = self._tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decoder(self) -> Callable[[int], str]:
        seen: list[int] = []
        said = ""

        def decode(token: int) -> str:
            nonlocal said
            seen.append(token)
            text = self._tokenizer.decode(seen)
            if text.endswith("\ufffd"):  # a character whose other bytes are still to come
                return ""
            new, said = text[len(said) :], text
            return new

        return decode


def open_tokens(tokenizer: Path | str | None) -> Tokens:
    """Bytes, or the tokenizer of that file."""
    return Bytes() if tokenizer is None else Tokenizer(Path(tokenizer))


def encoded(file: Path, tokenizer: Tokenizer, folder: Path) -> Path:
    """The file's tokens, int32, in a file of ``folder`` that is made once: block by block, so that any size will do.

    Raises:
        ValueError: for a file that is not UTF-8 text.
    """
    status = file.stat()
    key = f"{file.resolve()} {status.st_size} {status.st_mtime_ns} {tokenizer.name}"
    made = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.tokens"
    if made.exists():
        return made
    import array

    folder.mkdir(parents=True, exist_ok=True)
    writing = made.with_suffix(".writing")
    try:
        with file.open(encoding="utf-8", newline="") as lines, writing.open("wb") as out:
            while block := lines.read(2**20) + lines.readline():
                array.array("i", tokenizer.encode(block)).tofile(out)
    except UnicodeDecodeError as error:
        writing.unlink()
        raise ValueError(
            f"data: {file} is not UTF-8 text ({error}), expected it with a tokenizer; bytes take any"
        ) from None
    writing.replace(made)
    return made
