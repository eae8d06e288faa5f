"""What the compilers make of the kernels, analysed without a GPU."""

import os
import re
import runpy
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.gpu_code import sass
from benchmarks.gpu_code.cases.case import CudaCase, TritonCase, Work
from benchmarks.gpu_code.cubin import Cubin

ROOT = Path(__file__).resolve().parent.parent.parent
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


def run_tool(name: str, *arguments: str | Path) -> str:
    result = subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True)
    return result.stdout


def count(sass: str) -> dict[str, int]:
    # Megabytes of text, searched 50 times as fast for what begins with letters, and not with \b.
    return {
        "instructions": len(re.findall(r"^\s+/\*[0-9a-f]{4,5}\*/", sass, re.MULTILINE)),
        "16-byte loads": len(re.findall(r"LDG(?<!\wLDG)\.[A-Z0-9.]*128\b", sass)),
        "16-byte stores": len(re.findall(r"STG(?<!\wSTG)\.[A-Z0-9.]*128\b", sass)),
    }


def resources(report: str) -> dict[str, int]:
    """Resource usage of one function in the output of `cuobjdump -res-usage`."""
    fields = dict(re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", report))
    return {
        "registers": int(fields["REG"]),
        "shared": int(fields["SHARED"]),
        "spill": int(fields["STACK"]) + int(fields["LOCAL"]),
    }


def torn_reads(ttgir: str) -> int:
    """Number of volatile loads in TTGIR whose elements are each loaded by several threads."""
    layouts = dict(re.findall(r"^(#\w+) = #ttg.blocked<(.*)>$", ttgir, re.MULTILINE))
    torn = 0
    for load in re.findall(r"tt.load .*isVolatile.*", ttgir):
        length, layout = re.search(r"tensor<(\d+)x!tt.ptr<i64>, (#\w+)>", load).groups()
        one_each = 1
        for factor in re.findall(
            r"(?:sizePerThread|threadsPerWarp|warpsPerCTA) = \[(\d+)\]", layouts[layout]
        ):
            one_each *= int(factor)
        torn += one_each > int(length)
    return torn


def expected(work: Work | None, instructions: list[sass.Instruction]) -> dict:
    """What a unit of work costs."""
    if work is None:
        return {
            "unit": "",
            "per unit": "",
            "spilled per unit": "",
            "bytes per unit": "",
            "overlaps": "",
        }
    sass.check(instructions, work.weights)
    lanes = 32 * work.warps / work.units
    issued = sass.issued(instructions, work.weights)
    spilled = [n for i, n in zip(instructions, issued, strict=True) if i.opcode in ("LDL", "STL")]
    return {
        "unit": work.unit,
        "per unit": round(lanes * sum(issued), 1),
        "spilled per unit": round(lanes * sum(spilled), 2),
        "bytes per unit": work.bytes,
        "overlaps": work.overlaps,
    }


def triton_row(case: TritonCase, architecture: int) -> dict:
    arguments = case.kernel.arg_names
    constants = {a: case.options.get(a) for a in arguments if a not in case.types}
    divisible = [a for a in arguments if case.types.get(a, "")[:1] == "*" or a in case.aligned]
    source = ASTSource(
        case.kernel,
        signature={a: case.types.get(a, "constexpr") for a in arguments},
        constexprs={(arguments.index(a),): value for a, value in constants.items()},
        attrs={(arguments.index(a),): [["tt.divisibility", 16]] for a in divisible},
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", architecture, 32),
        options={k: v for k, v in case.options.items() if k not in arguments},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        report = run_tool("cuobjdump", "-res-usage", file.name)
        disassembly = run_tool("nvdisasm", "-c", "-gi", file.name)
    (instructions,) = sass.functions(disassembly).values()
    # Triton 3.6 does not tell where functions were inlined, without which nothing can be counted.
    knows_calls = any(len(instruction.lines) > 1 for instruction in instructions)
    return {
        "kernel": f"Triton: {case.name}",
        "sm": architecture,
        "threads": 32 * case.options["num_warps"],
        **resources(report.partition("Function")[2]),
        "shared": compiled.metadata.shared,
        **count(disassembly),
        "torn reads": torn_reads(compiled.asm["ttgir"]),
        **expected(case.work if knows_calls else None, instructions),
    }


class Machine(NamedTuple):
    """Of one kernel."""

    resources: dict[str, int]
    threads: int  # the most of a block
    text: str
    instructions: list[sass.Instruction]


@cache
def _compiled(source: str, architecture: int, parts: tuple[str, ...]) -> dict[str, Machine]:
    """The kernels of a source whose symbols have one of ``parts``, by symbol.

    All is compiled, and only these are disassembled, which takes as long."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernels.cubin")
        path.write_bytes(_built(source, architecture) or _compile(source, architecture))
        cubin = Cubin(path.read_bytes())
        symbols = [s for s in cubin.indices if any(part in s for part in parts)]
        indices = ",".join(str(cubin.indices[symbol]) for symbol in symbols)
        reports = run_tool("cuobjdump", "-res-usage", path).split("Function ")[1:]
        disassembly = run_tool("nvdisasm", "-c", "-gi", "-fun", indices, path)
    used = {report.partition(":")[0]: resources(report) for report in reports}
    texts = re.split(r"^//-+ \.text\.(\S+) -+$", disassembly, flags=re.MULTILINE)
    text_of = dict(zip(texts[1::2], texts[2::2], strict=True))
    instructions = sass.functions(disassembly)
    return {s: Machine(used[s], cubin.max_threads[s], text_of[s], instructions[s]) for s in symbols}


def _built(source: str, architecture: int) -> bytes | None:
    """The cubin in the extension, if that is up to date, for this architecture and with line
    numbers, as `make test` builds it: to compile again would take half a minute."""
    build = Path("build", sys.implementation.cache_tag, "nar_kernels._cuda")
    target = build / Path("csrc", source).with_suffix(".o")
    ninja = [sys.executable, "-m", "ninja", "-f", build / "build.ninja", "-n", target]
    result = subprocess.run(ninja, cwd=ROOT, capture_output=True, text=True)
    if "no work to do" not in result.stdout:
        return None
    with tempfile.TemporaryDirectory() as folder:
        command = [TOOLS / "cuobjdump", "-xelf", f"sm_{architecture}.cubin", ROOT / target]
        subprocess.run(command, cwd=folder, capture_output=True)
        for path in Path(folder).iterdir():
            content = path.read_bytes()
            return content if Cubin(content).has_lines else None
    return None


def _compile(source: str, architecture: int) -> bytes:
    """As ``setup.py`` does, with line numbers, which change no instruction; a warning is an
    error."""
    flags = runpy.run_path(os.fspath(ROOT / "setup.py"))["NVCC_FLAGS"].split()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernels.cubin")
        command = ["nvcc", *flags, '-DNAR_CUDA_ARCHS=""', "-lineinfo", f"-arch=sm_{architecture}"]
        command += ["-Werror", "all-warnings", "-Xcompiler=-Werror"]
        command += ["-cubin", "-o", os.fspath(path), f"csrc/{source}"]
        subprocess.run(command, cwd=ROOT, check=True)
        return path.read_bytes()


def cuda_row(case: CudaCase, architecture: int, cases: list[CudaCase]) -> dict:
    """``cases``: all that will be asked for, which are disassembled together."""
    parts = tuple(sorted({other.symbol for other in cases if other.source == case.source}))
    kernels = _compiled(case.source, architecture, parts)
    (kernel,) = (kernels[symbol] for symbol in kernels if case.symbol in symbol)
    return {
        "kernel": f"CUDA: {case.name}",
        "sm": architecture,
        "threads": kernel.threads,
        **kernel.resources,
        **count(kernel.text),
        "torn reads": 0,  # look-back by one warp, one word per lane
        **expected(case.work, kernel.instructions),
    }
