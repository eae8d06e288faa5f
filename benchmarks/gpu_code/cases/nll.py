"""`nll`: rows of logits with labels."""

from benchmarks.gpu_code.cases.case import TritonCase, Work, regions_of
from benchmarks.gpu_code.sass import Weight
from nar_kernels.ops.kernels import nll

# Name, types of the logits and of optional pointers, V, whether with gradient.
CASES: list[tuple[str, dict[str, str], int, bool]] = [
    ("bf16, V 50258", {"logits": "*bf16", "weight": "*fp32"}, 50258, True),
    ("fp32, V 50258, bias", {"logits": "*fp32", "weight": "*fp32", "bias": "*fp32"}, 50258, True),
    ("bf16, V 50304, bias", {"logits": "*bf16", "weight": "*fp32", "bias": "*fp32"}, 50304, True),
    ("bf16, V 128256", {"logits": "*bf16", "weight": "*fp32"}, 128256, True),
    ("bf16, V 257", {"logits": "*bf16", "weight": "*fp32"}, 257, True),
    ("bf16, V 50258, no gradient", {"logits": "*bf16"}, 50258, False),
]
TYPES = {"nll": "*fp32", "labels": "*i64", "vocabulary": "i32", "stride": "i32", "width": "i32"}


def _work(options: dict, given: dict[str, str], vocabulary: int, gradient: bool) -> Work:
    """A program is a row, read from memory once and written once."""
    nll_py = regions_of("kernels/nll.py")
    whole_blocks = (vocabulary - 1) // options["BLOCK"]
    loop = "def nll_kernel(", "for first in range(0, last"
    weights = [Weight(whole_blocks, nll_py(*loop))]
    if gradient:
        loop = "def nll_kernel(", "for done in range(0, last"
        weights.append(Weight(whole_blocks, nll_py(*loop)))
    if "weight" in given:
        weights.append(Weight(0, nll_py("def nll_kernel(", "if (scale == 0)")))
    num_bytes = {"*bf16": 2, "*fp32": 4}[given["logits"]]
    return Work("logit", vocabulary, options["num_warps"], num_bytes * (1 + gradient), weights)


def triton_cases() -> list[TritonCase]:
    cases = []
    for name, given, vocabulary, gradient in CASES:
        options = nll.launch_options(vocabulary, gradient)
        work = _work(options, given, vocabulary, gradient)
        types, aligned = TYPES | given, ("stride", "width")
        cases.append(TritonCase(f"nll, {name}", nll.nll_kernel, types, options, aligned, work))
    return cases
