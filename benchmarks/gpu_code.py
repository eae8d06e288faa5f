"""Static analysis of the compiled GPU kernels: registers, spills, instructions. Needs no GPU.

Triton kernels are compiled here for each architecture; CUDA kernels are read from the built
extension. `spill` is bytes of local memory per thread; `16-byte loads` and `stores` are vectorised
instructions (16 bytes per lane); `torn reads` are volatile loads of values that other programs
write, in a layout where several threads load the same element and may see different values.

    python benchmarks/gpu_code.py [--architectures 90] [--json FILE]
"""

import argparse
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"  # before importing Triton: compile, do not interpret

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nar_kernels.ops.arguments import ChooseArgs, CorruptArgs
from nar_kernels.ops.kernels import choose, corrupt, nll, unmask

ARCHITECTURES = [80, 90, 100]
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"

POINTERS = {
    "starts": "*i64",
    "sample_ids": "*i64",
    "step": "*i64",
    "maskable": "*i1",
    "never_mask": "*i1",
    "ratio_table": "*i32",
    "weight_table": "*fp32",
    "seed_tensor": "*i64",
    "input_ids": "*i64",
    "labels": "*i64",
    "masked_indices": "*i1",
    "times": "*fp32",
    "loss_weight": "*fp32",
    "num_masked": "*i64",
    "num_maskable": "*i64",
    "rows": "*i64",
    "record": "*i64",
}
SCALARS = {
    "seed": "i64",
    "num_corpus_tokens": "i64",
    "first_sample": "i64",
    "num_windows": "i64",
    "phase": "i64",
    "stride": "i64",
    "seq_len": "i32",
    "num_tokens": "i32",
    "mask_id": "i32",
    "global_batch": "i64",
    "keep_share": "i64",
    "random_share": "i64",
    "coin_share": "i64",
}

# Name, type of the ids, optional pointers that are given, and differences from STEP: a step of a
# loader with exact draws.
CORRUPT_CASES: list[tuple[str, str, tuple[str, ...], dict]] = [
    ("step, exact", "*u16", (), {}),
    ("step, exact, BERT", "*u16", (), {"keep_share": 1}),
    ("step, bernoulli", "*u16", (), {"exact": False}),
    ("step, exact, L 4096", "*u16", (), {"seq_len": 4096}),
    ("step, exact, L 65536, BERT", "*u16", (), {"seq_len": 65536, "keep_share": 1}),
    ("windows, exact", "*u16", ("starts", "sample_ids"), {"num_windows": 0}),
    ("batch, exact", "*i64", (), {"num_windows": 0}),
    ("batch, exact, L 256", "*i64", (), {"num_windows": 0, "seq_len": 256}),
    ("batch, exact, maskable", "*i64", ("maskable", "never_mask"), {"num_windows": 0}),
]
OPTIONAL = {"starts", "sample_ids", "step", "maskable", "never_mask", "seed_tensor"}
# Name, types of the logits and of optional pointers, V, whether with gradient.
NLL_CASES: list[tuple[str, dict[str, str], int, bool]] = [
    ("bf16, V 50258", {"logits": "*bf16", "weight": "*fp32"}, 50258, True),
    ("fp32, V 50258, bias", {"logits": "*fp32", "weight": "*fp32", "bias": "*fp32"}, 50258, True),
    ("bf16, V 257", {"logits": "*bf16", "weight": "*fp32"}, 257, True),
    ("bf16, V 50258, no gradient", {"logits": "*bf16"}, 50258, False),
]
NLL_TYPES = {"nll": "*fp32", "labels": "*i64", "vocabulary": "i32", "stride": "i32", "width": "i32"}
# Name, types of the logits and of optional pointers, V, k, confidence, and the scalar arguments
# that are multiples of 16.
UNMASK_CASES: list[tuple[str, dict[str, str], int, int, str, tuple[str, ...]]] = [
    ("bf16, V 50304", {"logits": "*bf16"}, 50304, 50304, "probability", ("stride", "vocabulary")),
    ("bf16, V 50304, k", {"logits": "*bf16"}, 50304, 50, "probability", ("stride", "vocabulary")),
    (
        "fp32, V 50304, k, given, entropy",
        {"logits": "*fp32", "given": "*i64", "others": "*i64", "confidence": "*fp32"},
        *(50304, 50, "entropy", ("stride", "vocabulary")),
    ),
    ("bf16, V 50258 at any address, k", {"logits": "*bf16"}, 50258, 50, "probability", ()),
]
UNMASK_TYPES = {
    "tokens": "*i64",
    "log_prob": "*fp32",
    "noise_slots": "*i64",
    "vocabulary": "i32",
    "stride": "i32",
    "forbidden0": "i32",
    "forbidden1": "i32",
    "num_others": "i32",
    "fallback": "i32",
    "seed": "i64",
    "top_k": "i32",
    "inverse_temperature": "fp32",
}
# Name, types of optional pointers, L, and differences from no noise and the highest first.
CHOOSE_CASES: list[tuple[str, dict[str, str], int, dict]] = [
    ("random, L 1024", {}, 1024, {}),
    ("confidence, L 1024", {"score": "*fp32"}, 1024, {}),
    ("noise, L 1024", {"score": "*fp32"}, 1024, {"noise_scale": 1.0}),
    ("critic, L 65536", {"score": "*fp32"}, 65536, {"noise_scale": 1.0, "lowest_first": True}),
]
CHOOSE_TYPES = {
    **dict.fromkeys(("kept", "left", "rows", "bounds", "left_bounds"), "*i64"),
    **dict.fromkeys(("seed", "first_slot", "slot_stride"), "i64"),
    **{"keys": "*i32", "length": "i32", "noise_scale": "fp32"},
}
CHOICE = ChooseArgs(**dict.fromkeys(ChooseArgs._fields))._replace(
    by_position=False, lowest_first=False, noise_scale=0.0
)
STEP = CorruptArgs(**dict.fromkeys(CorruptArgs._fields))._replace(
    seq_len=1024, num_windows=1, shuffle=True, exact=True, stratified=True
)


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


def triton_row(
    name: str,
    kernel: triton.JITFunction,
    types: dict[str, str],
    options: dict,
    architecture: int,
    aligned: tuple[str, ...],
) -> dict:
    """Compiles one kernel for one architecture and analyses it.

    Args:
        types: types of the arguments that are given; the others are None.
        options: compile-time arguments of the kernel and of the compiler.
        aligned: scalar arguments that are multiples of 16; pointers always are.
    """
    arguments = kernel.arg_names
    constants = {a: options.get(a) for a in arguments if a not in types}
    divisible = [a for a in arguments if types.get(a, "").startswith("*") or a in aligned]
    source = ASTSource(
        kernel,
        signature={a: types.get(a, "constexpr") for a in arguments},
        constexprs={(arguments.index(a),): value for a, value in constants.items()},
        attrs={(arguments.index(a),): [["tt.divisibility", 16]] for a in divisible},
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", architecture, 32),
        options={k: v for k, v in options.items() if k not in arguments},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        report = run_tool("cuobjdump", "-res-usage", file.name)
        sass = run_tool("nvdisasm", "-c", file.name)
    return {
        "kernel": f"Triton: {name}",
        "sm": architecture,
        "threads": 32 * options["num_warps"],
        **resources(report.partition("Function")[2]),
        "shared": compiled.metadata.shared,
        **count(sass),
        "torn reads": torn_reads(compiled.asm["ttgir"]),
    }


def triton_rows(architectures: list[int]) -> list[dict]:
    rows = []
    for name, ids, given, changes in CORRUPT_CASES:
        types = {"tokens": ids} | POINTERS | SCALARS
        types = {k: v for k, v in types.items() if k not in OPTIONAL - {*given}}
        options = corrupt.launch_options(STEP._replace(**changes))
        for sm in architectures:
            kernel = corrupt.corrupt_kernel
            rows.append(triton_row(f"corrupt, {name}", kernel, types, options, sm, ("seq_len",)))
    for name, given, vocabulary, gradient in NLL_CASES:
        options = nll.launch_options(vocabulary, gradient)
        for sm in architectures:
            types = NLL_TYPES | given
            rows.append(
                triton_row(f"nll, {name}", nll.nll_kernel, types, options, sm, ("stride", "width"))
            )
    for name, given, vocabulary, top_k, confidence, aligned in UNMASK_CASES:
        options = unmask.launch_options(vocabulary, top_k, confidence)
        for sm in architectures:
            types = UNMASK_TYPES | given
            kernel = unmask.unmask_kernel
            rows.append(triton_row(f"unmask, {name}", kernel, types, options, sm, aligned))
    for name, given, length, changes in CHOOSE_CASES:
        options = choose.launch_options(CHOICE._replace(length=length, **changes))
        for sm in architectures:
            types = CHOOSE_TYPES | given
            kernel = choose.choose_kernel
            rows.append(triton_row(f"choose, {name}", kernel, types, options, sm, ()))
    return rows


def cuda_rows(library: Path, architectures: list[int]) -> list[dict]:
    """Every kernel of an extension module, for the architectures that it was built for."""
    rows = []
    for architecture in architectures:
        # One at a time: tools of an older Triton fail on architectures that they do not know.
        of_library = f"-arch=sm_{architecture}", str(library)
        listing = run_tool("cuobjdump", "-sass", *of_library)
        sass = {
            function.split(maxsplit=1)[0]: function for function in listing.split("Function : ")[1:]
        }
        for function in run_tool("cuobjdump", "-res-usage", *of_library).split("Function ")[1:]:
            symbol = function.partition(":")[0]
            held = re.search(r"corrupt_kernelILi(\d)E", symbol)[1]
            shape = f"{held} tiles a warp" if held != "0" else "long rows"
            rows.append(
                {
                    "kernel": f"CUDA: corrupt, {shape}",
                    "sm": architecture,
                    "threads": "",
                    **resources(function),
                    **count(sass[symbol]),
                    "torn reads": 0,  # look-back by one warp, one word per lane
                }
            )
    return sorted(rows, key=lambda row: (row["kernel"], row["sm"]))


def built_extension() -> Path | None:
    return next(iter(Path(__file__).parent.parent.glob("nar_kernels/_cuda.*.so")), None)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--architectures", type=int, nargs="+", default=ARCHITECTURES, help="80, 90, ..."
    )
    parser.add_argument("--json", type=Path, help="also write the rows here")
    arguments = parser.parse_args()
    library = built_extension()
    if library is None:
        print("nar_kernels._cuda is not built: no CUDA kernels below")
    rows = triton_rows(arguments.architectures)
    if library is not None:
        rows += cuda_rows(library, arguments.architectures)
    columns = list(rows[0])
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for row in rows:
        print("| " + " | ".join(str(row[column]) for column in columns) + " |")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
