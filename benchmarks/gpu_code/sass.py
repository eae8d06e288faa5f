"""How many instructions a kernel issues, from its machine code alone.

Every instruction of a cubin with line information belongs to a chain of source lines, that of the
statement and those of the calls into which it was inlined. It counts as often as these lines are
expected to run: once a warp, times the weights of all regions of the sources that they lie in, such
as the expected trips of a loop, or 0 for what runs rarely. Copies of unrolled loops count one by
one. What this cannot see is an instruction that the compiler moved into another region.
"""

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple

Line = tuple[str, int]  # file, number

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?) ;?$")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_JUMPS = re.compile(r"(BRA|EXIT|RET)\b")  # without a predicate


class Instruction(NamedTuple):
    text: str
    lines: tuple[Line, ...]  # the statement's, then those of the calls, innermost first

    @property
    def opcode(self) -> str:
        return re.sub(r"^@!?U?P\S+\s+", "", self.text).split()[0].partition(".")[0]


class Region(NamedTuple):
    """Lines of a source: of the innermost of ``headers``, each looked for within the one before.

    A header is a part of a line, and the region goes on while lines are indented further: one rule
    for Python and for formatted C++.
    """

    file: str  # how its path ends
    headers: tuple[str, ...]

    def lines(self, path: str) -> range:
        text = _source(path)
        found = range(len(text))
        for header in self.headers:
            starts = [i for i in found if header in text[i]]
            if not starts:
                raise ValueError(f"no line of {path} within {self.headers} holds {header!r}")
            found = range(starts[0], _end(text, starts[0]))
        return range(found.start + 1, found.stop + 1)  # lines count from 1


@cache
def _source(path: str) -> list[str]:
    return Path(path).read_text("utf-8").splitlines()


def _end(text: list[str], start: int) -> int:
    indent = len(text[start]) - len(text[start].lstrip())
    for i in range(start + 1, len(text)):
        rest = text[i].lstrip()
        if rest and len(text[i]) - len(rest) <= indent and not rest.startswith((")", "#")):
            return i + rest.startswith("}")
    return len(text)


class Weight(NamedTuple):
    """How often lines of ``region`` run each time that the lines around it do; if ``within`` is
    given, only where they are inlined there."""

    factor: float
    region: Region
    within: Region | None = None


def functions(disassembly: str) -> dict[str, list[Instruction]]:
    """The instructions of each kernel in the output of ``nvdisasm -c -gi``.

    Left out is what only diverged warps run (from the targets of BRA.DIV on), since ours are
    together, and subroutines of the compiler: division of large numbers, floats near the limits.
    """
    found: dict[str, list[Instruction]] = {}
    diverged = set(re.findall(r"BRA\.DIV [^`]*`\((\.L_x_\d+)\)", disassembly))
    current: list[Instruction] = []
    lines: list[Line] = []
    is_new = is_skipped = False
    for text in disassembly.splitlines():
        if section := re.match(r'^\s*\.section\s+\.text\.([^,]+),"', text):
            current = found.setdefault(section[1], [])
            lines, is_skipped = [], False
        elif text.startswith("$__internal"):
            is_skipped = True
        elif frame := _FRAME.search(text):  # where that is inlined is on the next line
            lines = [] if is_new else lines
            lines.append((frame[1], int(frame[2])))
            is_new = False
        elif label := _LABEL.match(text):
            is_skipped |= label[1] in diverged
        elif instruction := _INSTRUCTION.match(text):
            is_new = True
            if not is_skipped and not instruction[1].startswith("NOP"):
                current.append(Instruction(instruction[1], tuple(lines)))
            if is_skipped and _JUMPS.match(instruction[1]):
                is_skipped = False
    return found


def issued(instructions: Iterable[Instruction], weights: list[Weight]) -> float:
    """Expected number of instructions that each warp issues."""
    return sum(weight_of(instruction, weights) for instruction in instructions)


def weight_of(instruction: Instruction, weights: list[Weight]) -> float:
    result = 1.0
    for factor, inner, within in weights:
        if _lies_in(instruction.lines, inner) and (
            within is None or _lies_in(instruction.lines, within)
        ):
            result *= factor
    return result


@cache
def _lines_of(some: Region, path: str) -> range:
    return some.lines(path)


@cache
def _lies_in(lines: tuple[Line, ...], some: Region) -> bool:
    return any(
        path.endswith(f"/{some.file}") and number in _lines_of(some, path) for path, number in lines
    )
