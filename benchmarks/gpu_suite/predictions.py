"""What `benchmarks.gpu_code` predicts for figures of the suite: shares of the speed of a copy."""

import json
import re
from functools import cache
from pathlib import Path

TABLE = Path(__file__).parent.parent / "gpu_code/sm90.json"

# Figures of the report, by a pattern of their names, and the kernel that they are of.
KERNELS = {
    r"corrupt, cuda: \d+ tokens, L 1024, exact": (
        "CUDA: corrupt, step, exact, L 1024, 8 tiles a warp"
    ),
    r"corrupt, cuda: \d+ tokens, L 1024, exact, keep \+ random": (
        "CUDA: corrupt, step, exact, BERT, L 1024, 8 tiles a warp"
    ),
    r"corrupt, cuda: \d+ tokens, L 1024, bernoulli": (
        "CUDA: corrupt, step, bernoulli, L 1024, 8 tiles a warp"
    ),
    r"corrupt, triton: \d+ tokens, L 1024, exact": "Triton: corrupt, windows, exact",
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
    r"unmask, triton: V 50304, bfloat16, filter none": "Triton: unmask, bf16, V 50304",
    r"unmask, cuda: V 50304, bfloat16, filter none": "CUDA: unmask, bf16, V 50304",
    r"unmask, cuda: V 50304, bfloat16, filter 0.3 V": "CUDA: unmask, bf16, V 50304, k 15092",
    r"unmask, cuda: V 50304, float32, filter none": "CUDA: unmask, fp32, V 50304",
    r"unmask, cuda: V 50304, float32, filter 0.3 V": "CUDA: unmask, fp32, V 50304, k 15092",
}


@cache
def rows() -> dict[str, dict]:
    """The table of sm_90, by kernel; only what is counted."""
    return {row["kernel"]: row for row in json.loads(TABLE.read_text()) if row["unit"]}


def prediction(figure: str, gpu: str | None) -> str:
    """For a figure of the report on this GPU, or ``""``."""
    column = next((name for name in ("H100", "H200") if name in (gpu or "")), None)
    kernel = next((k for pattern, k in KERNELS.items() if re.fullmatch(pattern, figure)), None)
    return rows()[kernel][column] if column and kernel else ""
