"""No kernel reads a register that nothing has written, or one with something else: what ptxas 12.8 once made of
products of 32 channels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from machine_code import crossed_descriptors, reads_of_unwritten

CASES = ["32,32,1,1,1,bf16,0", "32,32,1,2,0,fp16,1", "64,64,1,1,1,bf16,0", "128,64,1,1,1,bf16,1"]

ROWS = ["kda,128,bf16,1", "gla,64,fp16,1", "rwkv7,64,bf16,0", "product2,128,bf16,0"]

FAULTY = """
        /*07e0*/                   UMOV UR11, 0x80000020 ;
        /*07f0*/                   UIADD3 UR12, UP1, UR12, 0x2, URZ ;
        /*0800*/              @!UP0 UIADD3 UR16, UP0, UR11, 0x2, URZ ;
        /*0810*/                   ULDC.64 UR4, c[0x0][0x210] ;
        /*0820*/                   UIADD3.64 UR6, UR4, 0x3e, URZ ;
        /*0830*/                   HGMMA.64x32x16.F32.BF16 R72, gdesc[UR4].tnspA.tnspB, R72 ;
        /*0840*/                   HGMMA.64x64x16.F32.BF16 R24, R128, gdesc[UR14], R24 ;
        /*0850*/                   HGMMA.64x64x16.F32.BF16 R24, R128, gdesc[UR15], R24 ;
        /*0860*/                   LDG.E.128 R8, desc[UR30][R50.64+0x2000] ;
"""


def test_reads_of_unwritten_registers_are_found():
    places = [line.split()[0] for line in reads_of_unwritten(FAULTY)]
    assert places == ["07f0", "0840", "0850", "0860"]


CROSSED = """
        /*0100*/                   ULDC UR18, c[0x0][0x2d8] ;
        /*0110*/                   USHF.R.U32.HI UR16, URZ, 0x4, UR60 ;
        /*0120*/                   UMOV UR4, UR16 ;
        /*0130*/                   UMOV UR5, 0x40000040 ;
        /*0140*/                   UMOV UR6, UR16 ;
        /*0150*/                   UMOV UR7, 0x80000020 ;
        /*0160*/                   HGMMA.64x32x16.F32.BF16 R72, gdesc[UR4].tnspB, R72 ;
        /*0170*/                   UIADD3 UR8, UP0, UR16, 0x2, URZ ;
        /*0180*/                   UIADD3.X UR9, URZ, 0x40000040, URZ, UP0, !UPT ;
        /*0190*/                   UIADD3 UR10, UP1, UR18, 0x40, URZ ;
        /*01a0*/                   UIADD3.X UR11, UR18, -0x7fffffe0, URZ, UP1, !UPT ;
        /*01b0*/                   HGMMA.64x32x16.F32.BF16 R72, gdesc[UR8].tnspB, R72 ;
        /*01c0*/                   UIADD3.64 UR12, UR8, 0x2, URZ ;
        /*01d0*/                   UIADD3.64 UR14, UR6, 0x40, URZ ;
        /*01e0*/                   HGMMA.64x32x16.F32.BF16 R72, gdesc[UR12].tnspB, R72, gsb0 ;
"""


def test_descriptors_that_were_added_to_something_else_are_found():
    assert [line.split()[0] for line in crossed_descriptors(CROSSED)] == ["01b0"]


def compiled(program, case):
    """A line for each kernel: its name, and what it reads that nothing has written."""
    folder = Path(__file__).parent
    found = subprocess.run([sys.executable, folder / program, case], cwd=folder.parents[1],
                           env={**os.environ, "PYTHONPATH": str(folder.parents[1])},
                           capture_output=True, text=True, check=False)  # fmt: skip
    assert found.returncode == 0, found.stderr
    return found.stdout.splitlines()


@pytest.mark.parametrize("case", CASES)
def test_portable_kernels(case):
    kernels = compiled("portable_launches.py", case)
    assert len(kernels) > 4
    assert [line for line in kernels if "|" in line] == []


@pytest.mark.parametrize("case", ROWS)
def test_portable_kernels_of_rows(case):
    kernels = compiled("portable_rows_launches.py", case)
    names = {line.split(" | ")[0] for line in kernels}
    assert {"gram_kernel", "scan_kernel", "pairs_kernel", "pull_kernel"} <= names
    assert ("compose_kernel" in names) == case.endswith("1")
    assert ("pull_strong_kernel" in names) == (not case.startswith("product"))
    assert [line for line in kernels if "|" in line] == []
