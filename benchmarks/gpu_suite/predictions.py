"""What `benchmarks.gpu_code` predicts for figures of the suite: shares of the speed of a copy."""

import json
import re
from functools import cache
from pathlib import Path

TABLE = Path(__file__).parent.parent / "gpu_code/sm90.json"

# Figures of the report, by a pattern of their names, and the kernel that they are of.
KERNELS = {
    # Large batches of given windows.
    **{
        rf"corrupt, {backend}: \d+ tokens, L {length}, {draws}": f"{kernel}: corrupt, {name}"
        for backend, kernel, length, draws, name in (
            ("cuda", "CUDA", 256, "exact", "windows, exact, L 256, 4 tiles a warp"),
            ("cuda", "CUDA", 1024, "exact", "windows, exact, L 1024, 8 tiles a warp"),
            (
                *("cuda", "CUDA", 1024, r"exact, keep \+ random"),
                "windows, exact, BERT, L 1024, 8 tiles a warp",
            ),
            ("cuda", "CUDA", 1024, "bernoulli", "windows, bernoulli, L 1024, 8 tiles a warp"),
            ("cuda", "CUDA", 4096, "exact", "windows, exact, L 4096, 8 tiles a warp"),
            ("cuda", "CUDA", 16384, "exact", "windows, exact, L 16384, 12 tiles a warp"),
            ("cuda", "CUDA", 32768, "exact", "windows, exact, L 32768, long rows"),
            ("triton", "Triton", 256, "exact", "windows, exact, L 256"),
            ("triton", "Triton", 1024, "exact", "windows, exact"),
            ("triton", "Triton", 1024, r"exact, keep \+ random", "windows, exact, BERT"),
            ("triton", "Triton", 1024, "bernoulli", "windows, bernoulli"),
            ("triton", "Triton", 4096, "exact", "windows, exact, L 4096"),
            ("triton", "Triton", 32768, "exact", "windows, exact, L 32768"),
        )
    },
    **{
        f"nll: V {what}": f"Triton: nll, {name}"
        for what, name in (
            ("50258, bfloat16", "bf16, V 50258"),
            ("50258, float32, bias", "fp32, V 50258, bias"),
            ("50304, bfloat16, bias", "bf16, V 50304, bias"),
            ("128256, bfloat16", "bf16, V 128256"),
            ("257, bfloat16", "bf16, V 257"),
            ("50258, bfloat16, no gradient", "bf16, V 50258, no gradient"),
        )
    },
    # Rows of 50258 logits begin at any address: not counted.
    **{
        f"unmask, {backend.lower()}: V 50304, {dtype}, filter {filter_}": (
            f"{backend}: unmask, {short}, V 50304{kept}"
        )
        for backend in ("CUDA", "Triton")
        for dtype, short in (("bfloat16", "bf16"), ("float32", "fp32"))
        for filter_, kept in (("none", ""), ("0.3 V", ", k 15092"), ("50", ", k 50"))
    },
}


@cache
def rows() -> dict[str, dict]:
    """The table of sm_90, by kernel; only what is counted."""
    return {row["kernel"]: row for row in json.loads(TABLE.read_text()) if row["unit"]}


def kernel_of(figure: str) -> dict | None:
    """What is predicted of the kernel that a figure of the report is of; None if nothing is."""
    kernel = next((k for pattern, k in KERNELS.items() if re.fullmatch(pattern, figure)), None)
    return rows()[kernel] if kernel else None


def prediction(figure: str, gpu: str | None) -> str:
    """For a figure of the report on this GPU, or ``""``."""
    column = next((name for name in ("H100", "H200") if name in (gpu or "")), None)
    row = kernel_of(figure)
    return row[column] if column and row else ""
