"""Find uniform registers that a kernel's machine code reads and nothing has written, without a GPU.

ptxas 12.8 has made such code: the descriptor of an operand in shared memory started from a register that held whatever
the program before had left in it (tests/test_triton.py has the lines). A GPU then reads anywhere in its memory.
"""

import re
import subprocess
import tempfile
from pathlib import Path

import triton

_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s+(.*?)\s*;")
_PREDICATE = re.compile(r"!?U?P[0-9T]")
_REGISTER = re.compile(r"(\w+\[)?UR(\d+)(\.64)?")
_WRITERS = frozenset({"R2UR", "S2UR", "CS2UR", "VOTEU", "REDUX", "CREDUX", "LDCU"})
"""Instructions with a uniform register as result whose names do not begin with U."""


def disassemble(cubin: bytes) -> str:
    """Ask nvdisasm, which comes with Triton."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        tool = triton.knobs.nvidia.nvdisasm.path
        return subprocess.run([tool, "-c", path], capture_output=True, text=True, check=True).stdout


def unwritten_reads(code: str) -> list[str]:
    """Return the instructions that read a uniform register which none above them writes.

    They are taken from top to bottom, as if there were no jumps: a register that only a later iteration of a loop has
    written counts as unwritten, one written on another branch as written.

    Args:
        code: what ``disassemble`` returns.
    """
    written: set[int] = set()
    found = []
    for name, operands in _INSTRUCTION.findall(code):
        operands = operands.split(", ")
        result = _result(name, operands)
        sources = [operand for index, operand in enumerate(operands) if index != result]
        if any(not _read(source, name, operands) <= written for source in sources):
            found.append(f"{name} {', '.join(operands)}")
        if result is not None:
            first = int(operands[result].removeprefix("UR"))
            written.update(range(first, first + _width(name)))
    return found


def _result(name: str, operands: list[str]) -> int | None:
    """Return which operand is the uniform register that an instruction writes, if it writes one.

    Predicates may stand before it: those that are written with it, of which a comparison has nothing else.
    """
    base = name.split(".")[0]
    if base.endswith(("SETP", "PLOP3")) or not (base in _WRITERS or base.startswith("U")):
        return None
    index = next((i for i, operand in enumerate(operands) if not _PREDICATE.fullmatch(operand)), None)
    return index if index is not None and re.fullmatch(r"UR\d+", operands[index]) else None


def _width(name: str) -> int:
    """Return how many registers a result has."""
    bits = re.search(r"\.(64|128|256)\b", name)
    return int(bits[1]) // 32 if bits else 2 if ".WIDE" in name else 1


def _read(source: str, name: str, operands: list[str]) -> set[int]:
    """Return the uniform registers of an operand.

    A descriptor, ``desc[]`` of memory or ``gdesc[]`` of a product's operand in shared memory, has two. That of a
    warp group's product (HGMMA) has two for each of its operands, the left one's first; where the left one is in
    registers its two are not read.
    """
    registers: set[int] = set()
    for descriptor, number, double in _REGISTER.findall(source):
        first, count = int(number), 2 if descriptor in ("desc[", "gdesc[") or double else 1
        if descriptor == "gdesc[" and "GMMA" in name:
            first, count = (first + 2, 2) if re.match(r"R\d", operands[1]) else (first, 4)
        registers.update(range(first, first + count))
    return registers
