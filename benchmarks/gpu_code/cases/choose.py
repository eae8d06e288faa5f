"""`choose`: which positions of a sequence keep their ids."""

from benchmarks.gpu_code.cases.case import TritonCase, Work, regions_of
from benchmarks.gpu_code.cases.order_statistic import num_passes
from benchmarks.gpu_code.sass import Weight
from nar_kernels.ops.arguments import ChooseArgs
from nar_kernels.ops.kernels import choose

# Name, types of optional pointers, L, and differences from no noise and the highest first.
CASES: list[tuple[str, dict[str, str], int, dict]] = [
    ("random, L 1024", {}, 1024, {}),
    ("random, L 65536", {}, 65536, {}),
    ("confidence, L 1024", {"score": "*fp32"}, 1024, {}),
    ("noise, L 1024", {"score": "*fp32"}, 1024, {"noise_scale": 1.0}),
    ("critic, L 65536", {"score": "*fp32"}, 65536, {"noise_scale": 1.0, "lowest_first": True}),
]
TYPES = {
    **dict.fromkeys(("kept", "left", "rows", "bounds", "left_bounds"), "*i64"),
    **dict.fromkeys(("seed", "first_slot", "slot_stride"), "i64"),
    **{"keys": "*i32", "length": "i32", "noise_scale": "fp32"},
}
DEFAULTS = ChooseArgs(**dict.fromkeys(ChooseArgs._fields))._replace(
    by_position=False, lowest_first=False, noise_scale=0.0
)


def _work(options: dict, length: int) -> Work:
    """A program is a sequence, with keys that are random: those of scores take more passes. Rows
    are read and written once; keys stay in the cache."""
    choose_py = regions_of("kernels/choose.py")
    weights = [Weight(num_passes(length, 1), choose_py("def _find_smallest(", "while not"))]
    loops, each_block = -(-length // options["BLOCK"]), "for first in range(0, "
    steps = "_store_keys", "_find_smallest", "choose_kernel"
    weights += [Weight(loops, choose_py(f"def {step}(", each_block)) for step in steps]
    return Work("position", length, options["num_warps"], 8 + 8, weights)


def triton_cases() -> list[TritonCase]:
    cases = []
    for name, given, length, changes in CASES:
        options = choose.launch_options(DEFAULTS._replace(length=length, **changes))
        work = None if given else _work(options, length)
        types = TYPES | given
        cases.append(TritonCase(f"choose, {name}", choose.choose_kernel, types, options, (), work))
    return cases
