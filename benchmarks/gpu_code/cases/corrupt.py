"""`corrupt`: windows of a corpus, and of which slots they are.

A step is that of a loader: windows in the order of their epoch, and times from strata of at most
256 samples. The windows of `bench_corrupt_gpu` are given, and their times are from 65536 strata.
"""

from benchmarks.gpu_code.cases.case import CudaCase, TritonCase, Work, constant, regions_of
from benchmarks.gpu_code.cases.order_statistic import num_passes
from benchmarks.gpu_code.sass import Weight
from nar_kernels.ops.arguments import CorruptArgs
from nar_kernels.ops.kernels import corrupt

# Read: an id of a uint16 corpus. Written: id, label, mask, and for half of the positions, which a
# linear schedule masks, an index.
BYTES = 2 + 8 + 8 + 1 + 4

# Times that a number walks through the network of a Feistel permutation: the mean for any number of
# windows, of which the next power of two is 1 to 2 times as many; and of a power of two.
WALKS, WALKS_OF_POWER = 1.44, 1

# Windows of published words that it takes to look back: a guess. It depends on how far apart in
# time the blocks are that run at once.
LOOK_BACKS = 2

# ---- CUDA

TILE = 128
BLOCK_H = "corrupt/gpu/block.h"


def _weights_of_leader(rows: int, warps: int, draws: str, is_step: bool) -> list[Weight]:
    """Of the warp that draws the slots of ``rows`` while ``warps`` warps work on them."""
    corrupt_cu, slots_h = regions_of("corrupt.cu"), regions_of("gpu/slots.h")
    look_back_h = regions_of("gpu/look_back.h")
    lead, permute = "void lead_block(", "uint64_t permute("
    order, time = slots_h("int64_t ordered_start("), slots_h("uint32_t time_of(")
    feistel = regions_of("rng/permutation.h")("uint64_t feistel_permute(", "do {")

    def of_permutation(walks: float, within, ranks: int = 0) -> list[Weight]:
        """``ranks``: of an exact one of 256, how many ranks are wanted."""
        # The words of 256, 4 to a lane and step; or those of all rounds, at once.
        parts = {"for (uint32_t todo": 1, "for (uint32_t block": 2 if ranks else 1}
        parts |= {"if (!is_exact)": 0 if ranks else 1, "for (uint32_t rest": ranks}
        weights = [Weight(n, slots_h(permute, part), within) for part, n in parts.items()]
        # 8 steps of the warp, four a turn; none is left for the copies behind the loop.
        counting = slots_h(permute, "for (uint32_t rest", "for (uint32_t i = lane")
        weights.append(Weight(256 / 32 / 4, counting, within, outside=0))
        # The first walk is a copy ahead of the loop.
        again, first = max(walks - 1, 0), min(walks, 1)
        return [*weights, Weight(again, feistel, within, outside=first)]

    if is_step:
        weights = [*of_permutation(WALKS, order), *of_permutation(0, time, ranks=rows)]
    else:
        weights = [Weight(0, order), *of_permutation(WALKS_OF_POWER, time)]
    if draws == "exact":
        weights.append(Weight(0, corrupt_cu(lead, "} else {")))
    else:
        weights.append(Weight(0, corrupt_cu(lead, "if (counts_are_known(a)) {")))
        weights.append(Weight(1, corrupt_cu(lead, "for (int i = 0; i < a.shape.warps_per_row")))
    weights.append(
        Weight(LOOK_BACKS, look_back_h("uint64_t masked_in_blocks_before(", "for (int6"))
    )
    weights.append(Weight(0, look_back_h("if (missing > up_to) {")))
    return [*weights, Weight(1 / warps, corrupt_cu(lead))]


def _cuda_case(
    name: str, held: int, length: int, draws: str, ranks: int, rows_of: str = "kWindows"
) -> CudaCase:
    """
    Args:
        held: tiles that a warp holds; 0 for long rows.
        rows_of: ``"kWindows"``; or ``"kDocuments"`` of this length, of which the longest fills what
            is held; or ``"kParts"``, blocks of it.
    """
    warps_per_row = -(-length // (TILE * held)) if held else constant(BLOCK_H, "kMaxWarps")
    rows = constant(BLOCK_H, "kMaxRows") if warps_per_row == 1 else 1
    warps = rows * warps_per_row
    tiles = length / TILE / warps_per_row
    block_h, corrupt_cu = regions_of("corrupt/gpu/block.h"), regions_of("corrupt.cu")
    select_h, tiles_h = regions_of("gpu/select.h"), regions_of("gpu/tiles.h")
    write_h, ids_h = regions_of("gpu/write.h"), regions_of("gpu/ids.h")
    never = [
        tiles_h("Keys make_keys(", "if (!is_whole(row, tile)) {"),
        ids_h("Ids mend("),
        ids_h("uint32_t find_wide("),
        ids_h("uint32_t find_maskable("),
        tiles_h("Ids take_ids(", "if (__any_sync", "mend"),
        ids_h("Ids load_ids(", "case 1: load"),
        ids_h("Ids load_ids(", "case 4: load"),
        ids_h("Ids load_ids(", "default: load"),
        write_h("void store(", "if (narrow_)"),
        corrupt_cu("__global__ void", "if (a.restricted) {"),
        corrupt_cu("uint32_t count_ranked("),
        corrupt_cu("void write_ranked("),
        corrupt_cu("if (tied || (kRows == kWindows && !a.in_pairs))"),
    ]
    if rows_of == "kWindows":  # not of others, whose documents begin anywhere: no pairs
        never.append(write_h("void store_pair(", "if (narrow_)"))
    weights = [Weight(0, region) for region in never]
    searches = corrupt_cu("RowBounds<kRanks> row_bounds(", "if (is_exact(a, row.view)) {")
    if draws == "exact":
        passes = num_passes(length, ranks)
        weights += [
            Weight(passes, select_h("select_keys(", "for (int pass")),
            Weight(0, select_h("select_keys(", "for (; tied != 0")),
            Weight(0, corrupt_cu(*searches.headers, rest=True), is_optional=True),
        ]
    else:
        weights.append(Weight(0, searches))
    if warps_per_row == 1:
        behind = block_h("void sum(", "if (num_warps == 1) return;", rest=True)
        weights.append(Weight(0, behind))
    if held == 0:
        weights.append(Weight(tiles, tiles_h("void each_made(", "for (int32_t tile = first_")))
        made = tiles_h("Keys keys(int32_t tile, const RoundKeys& round_keys)", "if (a_.restricted)")
        weights.append(Weight(0, made))
    elif tiles < held:
        for part in ("void each(Use use)", "void each_with_ids(", "__device__ Tiles("):
            weights.append(Weight(tiles / held, tiles_h(part, "if (is_mine(t))")))
    has_many = held > constant(BLOCK_H, "kFewTiles")
    ahead = constant("corrupt/gpu/tiles.h", "kAheadOfMany") if has_many else 1
    if tiles < ahead:
        weights.append(Weight(tiles / ahead, tiles_h("void load_ahead(", "if (is_mine(t))")))
    later = max(tiles - ahead, 0) / tiles
    weights.append(Weight(later, tiles_h("Ids take_ids(", "if (tile + kAhead < end_)")))
    weights += _weights_of_leader(rows, warps, draws, name.startswith("step"))
    if rows_of != "kWindows":
        padding = write_h("void write_padding(", "for (int32_t i = row.length")
        weights.append(Weight(0, padding))
    return CudaCase(
        f"corrupt, {name}, L {length}, " + (f"{held} tiles a warp" if held else "long rows"),
        "corrupt/corrupt.cu",
        f"corrupt_kernelILi{held}ELi{ranks}ELi{constant('corrupt/corrupt.cu', rows_of)}E",
        Work("token", length * rows, warps, BYTES, weights),
    )


def cuda_cases() -> list[CudaCase]:
    return [
        _cuda_case("step, exact", 8, 1024, "exact", 1),
        _cuda_case("step, exact, BERT", 8, 1024, "exact", 3),
        _cuda_case("step, bernoulli", 8, 1024, "bernoulli", 1),
        _cuda_case("step, exact", 4, 1024, "exact", 1),
        _cuda_case("step, exact", 1, 1024, "exact", 1),
        _cuda_case("step, exact", 0, 65536, "exact", 1),
        _cuda_case("step, exact, BERT", 0, 65536, "exact", 3),
        _cuda_case("windows, exact", 4, 256, "exact", 1),
        _cuda_case("windows, exact", 8, 1024, "exact", 1),
        _cuda_case("windows, exact, BERT", 8, 1024, "exact", 3),
        _cuda_case("windows, bernoulli", 8, 1024, "bernoulli", 1),
        _cuda_case("windows, exact", 8, 4096, "exact", 1),
        _cuda_case("windows, exact", 12, 16384, "exact", 1),
        _cuda_case("windows, exact", 0, 32768, "exact", 1),
        _cuda_case("windows, exact", 8, 256, "exact", 1),
        _cuda_case("documents, exact", 8, 256, "exact", 1, "kDocuments"),
        _cuda_case("documents, exact, BERT", 8, 256, "exact", 3, "kDocuments"),
        _cuda_case("windows, blocks, exact", 4, 32, "exact", 1, "kParts"),
    ]


# ---- Triton

DOCUMENTS = ("starts", "spans", "sample_ids", "eos_id", "pad_id")
BLOCKS = {"seq_len": 32, "num_blocks": 32, "blocks_per_slot": 32}  # of which a program has one
# Name, type of the ids, optional pointers that are given, and differences from STEP: a step of a
# loader with exact draws.
CASES: list[tuple[str, str, tuple[str, ...], dict]] = [
    ("step, exact", "*u16", (), {}),
    ("step, exact, BERT", "*u16", (), {"keep_share": 1}),
    ("step, bernoulli", "*u16", (), {"exact": False}),
    ("step, exact, L 4096", "*u16", (), {"seq_len": 4096}),
    ("step, exact, L 65536, BERT", "*u16", (), {"seq_len": 65536, "keep_share": 1}),
    ("windows, exact", "*u16", ("starts",), {"num_windows": 0}),
    ("windows, exact, BERT", "*u16", ("starts",), {"num_windows": 0, "keep_share": 1}),
    ("windows, bernoulli", "*u16", ("starts",), {"num_windows": 0, "exact": False}),
    ("windows, exact, L 256", "*u16", ("starts",), {"num_windows": 0, "seq_len": 256}),
    ("windows, exact, L 4096", "*u16", ("starts",), {"num_windows": 0, "seq_len": 4096}),
    ("windows, exact, L 32768", "*u16", ("starts",), {"num_windows": 0, "seq_len": 32768}),
    ("documents, exact, L 256", "*u16", DOCUMENTS, {"num_windows": 0, "seq_len": 256}),
    ("windows, blocks of 32", "*u16", ("starts",), {"num_windows": 0, **BLOCKS}),
    ("windows, pairs", "*u16", ("starts",), {"num_windows": 0, "views": 2, "pairing": 1}),
    ("batch, exact", "*i64", (), {"num_windows": 0}),
    ("batch, exact, L 256", "*i64", (), {"num_windows": 0, "seq_len": 256}),
    ("batch, exact, maskable", "*i64", ("maskable", "never_mask"), {"num_windows": 0}),
]
POINTERS = {
    "starts": "*i64",
    "spans": "*i64",
    "sample_ids": "*i64",
    "step": "*i64",
    "view_times": "*i64",
    "maskable": "*i1",
    "loss_mask": "*i1",
    "prompt_lengths": "*i64",
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
    "eos_id": "i32",
    "pad_id": "i32",
    "num_tokens": "i32",
    "mask_id": "i32",
    "global_batch": "i64",
    "keep_share": "i64",
    "random_share": "i64",
    "coin_share": "i64",
    "time_low": "fp32",
    "time_span": "fp32",
    **dict.fromkeys(("batch", "num_positions", "block_length", "num_blocks"), "i64"),
    **dict.fromkeys(("blocks_per_slot", "views", "first_view"), "i64"),
}
OPTIONAL = {"starts", "sample_ids", "step", "maskable", "prompt_lengths"}
OPTIONAL |= {"never_mask", "seed_tensor", "spans", "loss_mask", "eos_id", "pad_id", "view_times"}
STEP = CorruptArgs(**dict.fromkeys(CorruptArgs._fields))._replace(
    seq_len=1024, num_windows=1, shuffle=True, exact=True, stratified=True, num_blocks=1,
    blocks_per_slot=1, views=1, first_view=0, pairing=0, weights_by_view=False,
)  # fmt: skip


def _triton_work(options: dict, length: int, ids: str, given: tuple[str, ...]) -> Work:
    """A program is a row."""
    corrupt_py, random_py = regions_of("kernels/corrupt.py"), regions_of("kernels/random.py")
    walk = "def permute(", "while result >= n"  # again, after the first time
    order, time = corrupt_py("def _ordered_start("), corrupt_py("def _row_time(")
    rows_before = "def _rows_before(", "while end > 0"
    weights = [
        Weight(0, corrupt_py("def _checked_start(", "if outside")),
        Weight(0, corrupt_py("def _checked_start(", "if (sample < 0)")),
        Weight(0, corrupt_py("def _record_bad_ids(", "if (num_bad > 0)")),
        Weight(LOOK_BACKS, corrupt_py(*rows_before)),
    ]
    if options["ORDERED"]:
        weights.append(Weight(0, random_py("def permute(", "if n <="), order))
        weights.append(Weight(WALKS - 1, random_py(*walk), order))
    if "starts" in given:
        weights.append(Weight(0, random_py("def permute(", "if n <="), time))
        weights.append(Weight(WALKS_OF_POWER - 1, random_py(*walk), time))
    else:
        weights.append(Weight(0, random_py("def permute(", "else:"), time))
    steps = ["_write_positions"]
    if options["EXACT"]:
        passes = num_passes(length, options["RANKS"])
        weights.append(Weight(passes, corrupt_py("def _exact_bounds(", "while not")))
        weights.append(Weight(0, corrupt_py("def _break_ties(", "if (wanted0 > 0)")))
        steps.append("_count_below")
    else:
        steps.append("_bernoulli_count")
    if not options["FITS"]:
        loops, each_tile = -(-length // options["TILE"]), "for first in range(0, row.end"
        weights += [Weight(loops, corrupt_py(f"def {step}(", each_tile)) for step in steps]
    num_bytes = BYTES - 2 + int(ids[2:]) // 8
    return Work("token", length, options["num_warps"], num_bytes, weights)


def triton_cases() -> list[TritonCase]:
    cases = []
    for name, ids, given, changes in CASES:
        types = {"tokens": ids} | POINTERS | SCALARS
        types = {k: v for k, v in types.items() if k not in OPTIONAL - {*given}}
        arguments = STEP._replace(**changes)
        length = arguments.seq_len
        arguments = arguments._replace(weighs_counts=arguments.exact, block_length=length)
        options = corrupt.launch_options(arguments)
        work = _triton_work(options, length, ids, given)
        kernel = corrupt.corrupt_kernel
        cases.append(TritonCase(f"corrupt, {name}", kernel, types, options, ("seq_len",), work))
    return cases
