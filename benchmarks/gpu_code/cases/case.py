"""A kernel to compile, and what it does."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import triton

from benchmarks.gpu_code.sass import Region, Weight

CSRC = Path(__file__).resolve().parents[3] / "csrc"


class Work(NamedTuple):
    """What a program of Triton, or a block of CUDA, does.

    Attributes:
        unit: what its instructions and bytes are counted for.
        units: how many of them.
        warps: that work on them.
        bytes: read from and written to memory for each.
        weights: how often parts of the source run.
        overlaps: whether other blocks on the same multiprocessor can use the memory meanwhile.
    """

    unit: str
    units: float
    warps: int
    bytes: float
    weights: list[Weight]
    overlaps: bool = True


class TritonCase(NamedTuple):
    """
    Attributes:
        types: of the arguments that are given; the others are None.
        options: compile-time arguments of the kernel and of the compiler.
        aligned: scalar arguments that are multiples of 16; pointers always are.
        work: None where nothing is counted.
    """

    name: str
    kernel: triton.JITFunction
    types: dict[str, str]
    options: dict
    aligned: tuple[str, ...]
    work: Work | None


class CudaCase(NamedTuple):
    """
    Attributes:
        source: below csrc.
        symbol: a part of the mangled name.
        work: None where nothing is counted.
    """

    name: str
    source: str
    symbol: str
    work: Work | None


def regions_of(file: str) -> Callable[..., Region]:
    return lambda *headers, rest=False: Region(file, headers, rest)


def constant(file: str, name: str) -> int:
    """Of a source below csrc."""
    (value,) = re.findall(rf"\b{name} = (\d+)[,;]", (CSRC / file).read_text("utf-8"))
    return int(value)
