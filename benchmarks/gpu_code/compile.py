"""What the compilers make of the kernels, analysed without a GPU."""

import os
import re
import runpy
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.gpu_code import sass
from benchmarks.gpu_code.cases.case import CudaCase, TritonCase, Work

ROOT = Path(__file__).resolve().parent.parent.parent
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


def run_tool(name: str, *arguments: str) -> str:
    result = subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True)
    return result.stdout


def count(sass: str) -> dict[str, int]:
    return {
        "instructions": len(re.findall(r"^\s+/\*[0-9a-f]{4,5}\*/", sass, re.MULTILINE)),
        "16-byte loads": len(re.findall(r"\bLDG\.[A-Z0-9.]*128\b", sass)),
        "16-byte stores": len(re.findall(r"\bSTG\.[A-Z0-9.]*128\b", sass)),
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


def launch_bounds(disassembly: str) -> dict[str, int]:
    """The most threads of a block for which each kernel is compiled, by symbol."""
    sections = re.split(r"^\t\.section\t\.nv\.info\.([^,]+),.*$", disassembly, flags=re.MULTILINE)
    bounds = {}
    for symbol, text in zip(sections[1::2], sections[2::2], strict=True):
        attribute = re.search(r"EIATTR_MAX_THREADS\n(?:.*\n){5}.*\.word\t0x(\w+)", text)
        bounds[symbol] = int(attribute[1], 16)
    return bounds


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


@cache
def _compiled(source: str, architecture: int) -> tuple[dict, dict, dict, dict]:
    """Resources, launch bounds, machine code and instructions of each kernel of a source, by
    symbol. Compiled as ``setup.py`` does, with line numbers, which change no instruction; a warning
    is an error."""
    flags = runpy.run_path(os.fspath(ROOT / "setup.py"))["NVCC_FLAGS"].split()
    with tempfile.TemporaryDirectory() as folder:
        cubin = os.path.join(folder, "kernels.cubin")
        command = ["nvcc", *flags, '-DNAR_CUDA_ARCHS=""', "-lineinfo", f"-arch=sm_{architecture}"]
        command += ["-Werror", "all-warnings", "-Xcompiler=-Werror"]
        command += ["-cubin", "-o", cubin, f"csrc/{source}"]
        subprocess.run(command, cwd=ROOT, check=True)
        reports = run_tool("cuobjdump", "-res-usage", cubin).split("Function ")[1:]
        disassembly = run_tool("nvdisasm", "-c", "-gi", cubin)
        bounds = launch_bounds(run_tool("nvdisasm", cubin))
    texts = re.split(r"^//-+ \.text\.(\S+) -+$", disassembly, flags=re.MULTILINE)
    return (
        {report.partition(":")[0]: resources(report) for report in reports},
        bounds,
        dict(zip(texts[1::2], texts[2::2], strict=True)),
        sass.functions(disassembly),
    )


def cuda_row(case: CudaCase, architecture: int) -> dict:
    used, bounds, texts, instructions = _compiled(case.source, architecture)
    (symbol,) = (symbol for symbol in instructions if case.symbol in symbol)
    return {
        "kernel": f"CUDA: {case.name}",
        "sm": architecture,
        "threads": bounds[symbol],
        **used[symbol],
        **count(texts[symbol]),
        "torn reads": 0,  # look-back by one warp, one word per lane
        **expected(case.work, instructions[symbol]),
    }
