"""Machine code for Hopper, and a fault of ptxas 12.8 (the one in Triton 3.6) that shows there.

Where descriptors of two matrix products are computed from one address, ptxas may drop the copy to the second pair of
uniform registers and add to whatever they hold from before: an illegal access, or a wrong product without a word.
Seen where one place in shared memory is the left operand of a product and later the right one of another. What the
registers hold from before may have been written by anyone: so the words of the descriptors are followed, too.
"""

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,5})\*/\s+(@!?U?P\w+ )?([A-Z][A-Za-z0-9_.]+) ?([^;]*);")
DESCRIPTOR = re.compile(r"^(R\d+, R\d+, )?(?:R\d+, )?gdesc\[UR(\d+)\]")


def disassemble(binary: Path) -> str:
    """The machine code of a cubin."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, "-sass", binary], capture_output=True, text=True, check=True).stdout


def reads_of_unwritten(code: str) -> list[str]:
    """The instructions that read a uniform register before any instruction, in the order of the code, writes it."""
    written: set[int] = set()
    found = []
    for place, _, name, operands in INSTRUCTION.findall(code):
        uniform = name.startswith("U") or name.split(".")[0] in ("R2UR", "S2UR", "CS2UR", "LDCU")
        target = re.match(r"UR(\d+)\b", operands) if uniform else None
        sources = operands[target.end() :] if target else operands
        read = {int(number) for number in re.findall(r"\bUR(\d+)\b", sources)}
        descriptor = DESCRIPTOR.match(operands)
        if descriptor:  # two descriptors of 64 bits; the first is not read where the left operand is in registers
            first = int(descriptor[2])
            read = set(range(first + 2, first + 4) if descriptor[1] else range(first, first + 4))
        if read - written:
            found.append(f"{place} {name} {operands}".strip())
            written |= read
        if target:
            words = 4 if ".128" in name else 2 if ".64" in name or "WIDE" in name else 1
            written |= set(range(int(target[1]), int(target[1]) + words))
    return found


class Word(NamedTuple):
    """A register's value, a number added to what is unknown (0: nothing unknown)."""

    unknown: int
    number: int


class Registers:
    """What is known of registers, following the instructions in the order of the code: copies and sums."""

    def __init__(self) -> None:
        self.words: dict[str, Word] = {}
        self.unknowns = 0

    def fresh(self) -> Word:
        self.unknowns += 1
        return Word(self.unknowns, 0)

    def read(self, operand: str) -> Word:
        operand = operand.removesuffix(".reuse")
        number = re.fullmatch(r"(-?)(0x[0-9a-f]+)", operand)
        if number:
            return Word(0, int(number[1] + number[2], 16) % 2**32)
        if operand in ("RZ", "URZ"):
            return Word(0, 0)
        if re.fullmatch(r"U?R\d+", operand):
            return self.words.setdefault(operand, self.fresh())
        return self.fresh()

    def pair(self, operand: str) -> tuple[Word, Word]:
        """Both words of 64 bits."""
        register = re.fullmatch(r"(-?)(U?R)(\d+)", operand)
        if not register:
            return self.read(operand), Word(0, 0)
        words = tuple(self.read(f"{register[2]}{int(register[3]) + place}") for place in (0, 1))
        if not register[1]:
            return words
        if any(word.unknown for word in words):
            return self.fresh(), self.fresh()
        value = -(words[0].number + words[1].number * 2**32)
        return Word(0, value % 2**32), Word(0, (value >> 32) % 2**32)

    def sum(self, words: list[Word]) -> Word:
        unknown = [word.unknown for word in words if word.unknown]
        return self.fresh() if len(unknown) > 1 else Word(sum(unknown), sum(word.number for word in words) % 2**32)

    def follow(self, name: str, operands: str, predicated: bool) -> None:
        target, *sources = (operand.strip() for operand in operands.split(","))
        register = re.fullmatch(r"(U?R)(\d+)", target)
        operation = name.split(".")[0]
        if not register or operation in ("ST", "STG", "STS", "STL", "RED"):
            return
        kind, first = register[1], int(register[2])
        sources = [source for source in sources if not re.fullmatch(r"!?U?P[\dT]", source)]
        if name == "UIADD3.64":
            low, high = zip(*map(self.pair, sources), strict=True)
            self.words[target], self.words[f"{kind}{first + 1}"] = self.sum(low), self.sum(high)
        elif (
            operation in ("MOV", "UMOV", "R2UR", "IADD3", "UIADD3", "VIADD")
            and not predicated
            and (not re.search(r"~|-U?R", operands))
        ):
            self.words[target] = self.sum([self.read(source) for source in sources])
        else:
            words = 4 if ".128" in name else 2 if ".64" in name or "WIDE" in name else 1
            for place in range(words):
                self.words[f"{kind}{first + place}"] = self.fresh()


def crossed_descriptors(code: str) -> list[str]:
    """The matrix products with a descriptor whose upper word, which says how the operand lies and is known while
    compiling, was added to what its lower word was added to."""
    registers, found = Registers(), []
    for place, predicate, name, operands in INSTRUCTION.findall(code):
        descriptor = DESCRIPTOR.match(operands)
        if not descriptor:
            registers.follow(name, operands, bool(predicate))
            continue
        first = int(descriptor[2])
        for low in (first + 2,) if descriptor[1] else (first, first + 2):
            lower, high = (registers.read(f"UR{low + word}") for word in (0, 1))
            if high.number and high.unknown and high.unknown == lower.unknown:
                found.append(f"{place} {name} {operands}".strip())
    return found
