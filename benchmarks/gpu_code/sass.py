"""How many instructions a kernel issues, from its machine code alone.

Every instruction of a cubin with line information belongs to a chain of source lines, that of the
statement and those of the calls into which it was inlined. By these it runs once a warp, times the
weights of all regions of the sources that they lie in, such as the expected trips of a loop, or 0
for what runs rarely. Copies of unrolled loops count one by one.

Compilers move instructions: out of a loop, or past a branch that becomes a predicate. But those of
a basic block all run equally often, so all count as most of them do: the median; or, where the
block is a loop of its own, as the jump back does. And what lies outside the machine code's loop has
no share in its trips.

Refused is what would make a count wrong without a sign: a loop of the machine code that no weight
is for, weights that overlap without one lying in the other, or that weigh both a function and the
line that calls it, and a weight for no instruction.
"""

import math
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

Line = tuple[str, int]  # file, number

_SECTION = re.compile(r'\s*\.section\s+\.text\.([^,]+),"')
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?) ;?$")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_JUMPS = re.compile(r"(BRA|EXIT|RET)\b")  # without a predicate
_ENDS_BLOCK = re.compile(r"(@!?U?P\S+\s+)?(BRA|BRX|EXIT|RET)\b")
_TARGET = re.compile(r"BRA\b.*`\((\.L_x_\d+)\)")
_STATEMENT = re.compile(r"\s*(\} )?(else )?(if|for|while|do|else|switch)\b")
_LOOP = re.compile(r"\s*(for|while|do)\b")


class Instruction(NamedTuple):
    text: str
    lines: tuple[Line, ...]  # the statement's, then those of the calls, innermost first
    block: int = 0  # number of its basic block
    back_to: int | None = None  # the block that it jumps back to

    @property
    def opcode(self) -> str:
        return re.sub(r"^@!?U?P\S+\s+", "", self.text).split()[0].partition(".")[0]


class Region(NamedTuple):
    """Lines of a source: the innermost of ``headers``, each looked for within the one before, and
    what it is the header of.

    A header is a part of a line, and its lines go on while they are indented further: one rule for
    Python and for formatted C++. ``rest``: the lines behind those instead, to the end of the block
    that they are in, such as what runs unless an `if` has returned.
    """

    file: str  # how its path ends
    headers: tuple[str, ...]
    rest: bool = False

    def lines(self, path: str) -> range:
        """With the header; from 1 on."""
        text = _source(path)
        found = range(len(text))
        for header in self.headers:
            starts = [i for i in found if header in text[i]]
            if not starts:
                raise ValueError(f"no line of {path} within {self.headers} holds {header!r}")
            around, found = found, range(starts[0], _end(text, starts[0]))
        if self.rest:
            found = range(found.stop, _end_of_block(text, found.start, around.stop))
        return range(found.start + 1, found.stop + 1)

    def header(self, path: str) -> range:
        """The lines of the condition if it is a statement with one, else none."""
        text = _source(path)
        lines = self.lines(path)
        if self.rest or not _STATEMENT.match(text[lines.start - 1]):
            return range(lines.start, lines.start)
        open_ = 0
        for number in lines:
            line = re.sub(r"(//|#).*", "", text[number - 1])
            open_ += sum(line.count(c) for c in "([") - sum(line.count(c) for c in ")]")
            if open_ <= 0:
                break
        return range(lines.start, number + 1)

    def is_loop(self, path: str) -> bool:
        return not self.rest and bool(_LOOP.match(_source(path)[self.lines(path).start - 1]))

    def is_function(self, path: str) -> bool:
        """Whether it is a definition."""
        lines = self.lines(path)
        return not self.rest and len(lines) > 1 and not self.header(path)


@cache
def _source(path: str) -> list[str]:
    return Path(path).read_text("utf-8").splitlines()


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _end(text: list[str], start: int) -> int:
    for i in range(start + 1, len(text)):
        rest = text[i].lstrip()
        if rest and _indent(text[i]) <= _indent(text[start]) and not rest.startswith((")", "#")):
            return i + (rest.startswith("}") and _indent(text[i]) == _indent(text[start]))
    return len(text)


def _end_of_block(text: list[str], start: int, stop: int) -> int:
    for i in range(start + 1, stop):
        rest = text[i].lstrip()
        if rest and _indent(text[i]) < _indent(text[start]) and not rest.startswith("#"):
            return i
    return stop


class Weight(NamedTuple):
    """How often lines of ``region`` run each time that the lines around it do; if ``within`` is
    given, only where they are inlined there.

    A condition runs at least once. On a line that is a condition and what it decides on, what is
    inlined is the latter.

    Attributes:
        is_optional: the kernel may have no such instructions.
        outside: how often those run that are not in the machine code's loop, where there is one:
            by default once, since they were moved out of it, unless the loop never runs; another
            number if they are copies for its first or last turns.
    """

    factor: float
    region: Region
    within: Region | None = None
    is_optional: bool = False
    outside: float | None = None


def functions(disassembly: str) -> dict[str, list[Instruction]]:
    """The instructions of each kernel in the output of ``nvdisasm -c -gi``.

    Left out is what only diverged warps run (from the targets of BRA.DIV on), since ours are
    together, and subroutines of the compiler: division of large numbers, floats near the limits.
    """
    found: dict[str, list[Instruction]] = {}
    diverged = set(re.findall(r"BRA\.DIV [^`]*`\((\.L_x_\d+)\)", disassembly))
    current: list[Instruction] = []
    lines: list[Line] = []
    blocks: dict[str, int] = {}  # by label
    block = 0
    is_new = is_skipped = False
    for text in disassembly.splitlines():
        if ".section" in text and (section := _SECTION.match(text)):
            current = found.setdefault(section[1], [])
            lines, is_skipped = [], False
        elif text.startswith("$__internal"):
            is_skipped = True
        elif 'File "' in text and (frame := _FRAME.search(text)):
            # Where that is inlined is on the next line.
            lines = [] if is_new else lines
            lines.append((frame[1], int(frame[2])))
            is_new = False
        elif label := _LABEL.match(text):
            is_skipped |= label[1] in diverged
            block += 1
            blocks[label[1]] = block
        elif instruction := _INSTRUCTION.match(text):
            is_new = True
            what = instruction[1]
            if not is_skipped and not what.startswith("NOP"):
                target = _TARGET.search(what)
                back_to = blocks.get(target[1]) if target else None  # known if it lies before
                is_padding = back_to == block and current[-1].block != block
                if not is_padding:
                    current.append(Instruction(what, tuple(lines), block, back_to))
            if is_skipped and _JUMPS.match(what):
                is_skipped = False
            block += bool(_ENDS_BLOCK.match(what))
    return found


def issued(instructions: Sequence[Instruction], weights: list[Weight]) -> list[float]:
    """How often each warp is expected to issue each instruction."""
    frames = _frames(instructions, weights)
    loops = _loops(instructions, frames)
    of_block: dict[int, list[float]] = {}
    result = {}
    for instruction in instructions:
        weight = _weight_of(instruction, frames[instruction.lines], loops)
        of_block.setdefault(instruction.block, []).append(weight)
        if instruction.back_to == instruction.block:  # a loop of one block
            result[instruction.block] = weight
    for block, found in of_block.items():
        result.setdefault(block, sorted(found)[len(found) // 2])
    return [result[instruction.block] for instruction in instructions]


# The weights that are for a chain of lines, and for which of them each is.
_Frames = dict[tuple[Line, ...], list[tuple[Weight, int]]]


def _frames(instructions: Sequence[Instruction], weights: list[Weight]) -> _Frames:
    """Looked up once for all instructions of a chain, which are a hundred times as many."""
    return {
        lines: [(w, frame) for w in weights if (frame := _frame_of(lines, w)) is not None]
        for lines in dict.fromkeys(instruction.lines for instruction in instructions)
    }


# The blocks of the machine code's loops, by the weight that is for them and the calls by which they
# are where they are.
_Loops = dict[tuple[Weight, tuple[Line, ...]], list[range]]


def _loops(instructions: Sequence[Instruction], frames: _Frames) -> _Loops:
    loops: _Loops = {}
    for instruction in instructions:
        if instruction.back_to is None:
            continue
        at = _line_of_loop(instruction.lines)
        for weight, frame in frames[instruction.lines]:
            if at is not None and _is_for_loop(weight, *at):
                blocks = range(instruction.back_to, instruction.block + 1)
                loops.setdefault((weight, instruction.lines[frame + 1 :]), []).append(blocks)
    return loops


def _weight_of(instruction: Instruction, weights: list[tuple[Weight, int]], loops: _Loops) -> float:
    """By its lines alone."""
    return math.prod(_factor(instruction, weight, frame, loops) for weight, frame in weights)


def _factor(instruction: Instruction, weight: Weight, frame: int, loops: _Loops) -> float:
    blocks = loops.get((weight, instruction.lines[frame + 1 :]))
    if blocks and not any(instruction.block in some for some in blocks):
        return float(weight.factor > 0) if weight.outside is None else weight.outside
    if instruction.back_to is not None:  # once a turn
        return weight.factor
    path, number = instruction.lines[frame]
    header, all_lines = _header_of(weight.region, path), _lines_of(weight.region, path)
    is_condition = number in header and (len(header) < len(all_lines) or frame == 0)
    return max(weight.factor, 1.0) if is_condition else weight.factor


def _frame_of(lines: tuple[Line, ...], weight: Weight) -> int | None:
    """The innermost line that the weight is for."""
    if weight.within is not None and _frame_in(lines, weight.within) is None:
        return None
    return _frame_in(lines, weight.region)


@cache
def _frame_in(lines: tuple[Line, ...], some: Region) -> int | None:
    """The innermost line that lies in the region."""
    for i, (path, number) in enumerate(lines):
        if path.endswith(f"/{some.file}") and number in _lines_of(some, path):
            return i
    return None


@cache
def _lines_of(some: Region, path: str) -> range:
    return some.lines(path)


@cache
def _header_of(some: Region, path: str) -> range:
    return some.header(path)


class WeightError(ValueError):
    pass


def check(instructions: Sequence[Instruction], weights: list[Weight]) -> None:
    """Refuses weights that count something twice, or nothing, and loops without one."""
    used = set()
    frames = _frames(instructions, weights)
    for lines, found in frames.items():
        used.update(weights.index(w) for w, _ in found)
        counted = [w for w, _ in found if w.factor not in (0, 1)]
        for i, a in enumerate(counted):
            for b in counted[:i]:
                _check_pair(lines, a, b)
    for instruction in instructions:
        found_here = [w for w, _ in frames[instruction.lines]]
        if instruction.back_to is not None and all(w.factor for w in found_here):
            _check_loop(instruction.lines, found_here)
    for i, weight in enumerate(weights):
        if i not in used and not weight.is_optional:
            raise WeightError(f"no instruction lies in {weight.region} within {weight.within}")


def _check_pair(lines: tuple[Line, ...], a: Weight, b: Weight) -> None:
    inner, outer = sorted((a, b), key=lambda w: _frame_of(lines, w))
    frame, call = _frame_of(lines, inner), _frame_of(lines, outer)
    at, called_at = (_lines_of(w.region, lines[f][0]) for w, f in ((inner, frame), (outer, call)))
    if frame == call:
        is_nested = at != called_at and (_holds(at, called_at) or _holds(called_at, at))
        if not is_nested:
            raise WeightError(f"{a.region} and {b.region} overlap at {lines[frame]}")
    elif call == frame + 1 and len(called_at) == 1 and inner.region.is_function(lines[frame][0]):
        raise WeightError(f"{inner.region} and the line that calls it, {outer.region}")


def _check_loop(lines: tuple[Line, ...], found: list[Weight]) -> None:
    """``lines``: of a jump back."""
    at = _line_of_loop(lines)
    if at is not None and not any(_is_for_loop(weight, *at) for weight in found):
        path, number = at
        text = _source(path)[number - 1].strip()
        raise WeightError(f"no weight is for the loop at {path}:{number}: {text}")


def _line_of_loop(lines: tuple[Line, ...]) -> Line | None:
    """Of a jump back: the loop's condition; None where it is out of code behind the end."""
    for path, number in lines:
        if path.startswith("/") and not ("/cuda" in path and "/include/" in path):
            text = _source(path)[number - 1]
            is_loop = _LOOP.match(text) or text.strip().startswith("} while")
            return (path, number) if is_loop else None
        # Else an intrinsic of the condition.
    return None


def _is_for_loop(weight: Weight, path: str, number: int) -> bool:
    """Whether a weight is for the loop whose condition is here."""
    region = weight.region
    if not path.endswith(f"/{region.file}") or not region.is_loop(path):
        return False
    return number in _header_of(region, path) or number == _lines_of(region, path).stop - 1


def _holds(outer: range, inner: range) -> bool:
    return outer.start <= inner.start and inner.stop <= outer.stop
