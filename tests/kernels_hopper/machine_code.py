"""Machine code for Hopper, and a fault of ptxas 12.8 (the one in Triton 3.6) that shows there.

Where descriptors of two matrix products are computed from one address, ptxas may drop the copy to the second pair of
uniform registers and add to whatever they hold from before: an illegal access, or a wrong product without a word.
"""

import re
import subprocess
from pathlib import Path

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Za-z0-9_.]+) ?([^;]*);")
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
    for place, name, operands in INSTRUCTION.findall(code):
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
