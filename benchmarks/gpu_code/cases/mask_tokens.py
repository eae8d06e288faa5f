"""`mask_tokens`: a coin for each position, at a given ratio of its sequence or its own."""

from benchmarks.gpu_code.cases.case import TritonCase, Work
from nar_kernels.ops.kernels import mask_tokens

TYPES = {
    **dict.fromkeys(("ids", "tokens", "bounds", "sample_ids"), "*i64"),
    **{"mask": "*u8", "mask_id": "i32", "length": "i32", "seed": "i64", "stream": "i32"},
}


def triton_cases() -> list[TritonCase]:
    cases = []
    for name, by_position in (("ratios of sequences", False), ("ratios of positions", True)):
        options = mask_tokens.launch_options(by_position)
        units, warps = options["BLOCK"], options["num_warps"]
        work = Work("token", units, warps, 8 + 8 + 1 + 8 * by_position, [])
        kernel = mask_tokens.mask_tokens_kernel
        cases.append(TritonCase(f"mask_tokens, {name}", kernel, TYPES, options, (), work))
    return cases
