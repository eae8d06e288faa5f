"""`unmask`: rows of logits as those of `bench_unmask`, with the last id forbidden; without
confidences or given tokens where anything is counted."""

import math

import torch

from benchmarks.gpu_code.cases import logits
from benchmarks.gpu_code.cases.case import CudaCase, TritonCase, Work, constant, regions_of
from benchmarks.gpu_code.cases.search import mean_search
from benchmarks.gpu_code.sass import Weight
from nar_kernels.ops.kernels import unmask

V = 50304
FEW, MANY = 50, -(-3 * V // 10)  # as bench_unmask filters
BYTES = {torch.float32: 4, torch.bfloat16: 2, torch.float16: 2}

# ---- CUDA


def _cuda_case(name: str, type_: str, dtype: torch.dtype, top_k: int = V) -> CudaCase:
    """A block holds a row."""
    most_warps = constant("unmask/gpu/row.h", "kMaxWarps")
    # Float32 rows fill the shared memory of a multiprocessor, of the others there are two.
    has_half = dtype != torch.float32
    warps = most_warps // 2 if has_half else most_warps
    size = 16 // BYTES[dtype]
    table_size = constant("unmask/gpu/sums.h", "kSize")
    trips = logits.trips(V, warps, size, dtype, top_k, table_size)
    num_tiles = -(-V // (32 * size))
    tiles = num_tiles / warps  # of a warp
    row_h, sums_h = regions_of("unmask/gpu/row.h"), regions_of("unmask/gpu/sums.h")
    sample_h, unmask_cu = regions_of("unmask/gpu/sample.h"), regions_of("unmask/unmask.cu")
    main, each = "void unmask_row(", ("void each_kept(", "for (uint32_t i")
    one_warp, has_table = 1 / warps, dtype == torch.bfloat16

    never = [
        row_h("float load()", "load_by<4>"),
        row_h("float load()", "load_by<sizeof(T)>"),
        unmask_cu("float exp_of_second("),
        unmask_cu("float kept_logit("),
        unmask_cu(main, "if (largest == -INFINITY)"),
        unmask_cu(main, "if (is_entropy)"),
        unmask_cu(main, "} else if (a.confidence)"),
    ]
    weights = [Weight(0, region) for region in never]
    if has_table:
        low_rounds = trips.low_rounds / trips.low if trips.low else 0
        weights += [
            Weight(0, unmask_cu(main, "if (!has_table) {")),
            Weight(table_size / (32 * warps), sums_h("void build(", "for (int i = static_cast")),
            Weight(trips.low, sums_h("void add_some_low(")),
            Weight(low_rounds, sums_h("void add_some_low(", "for (; low; low &=")),
        ]
    else:
        weights.append(Weight(0, sums_h("if (with_gap)")))

    # Four tiles a turn, of which the last may have fewer.
    shares = [num_tiles * (w + 1) // warps - num_tiles * w // warps for w in range(warps)]
    turns = sum(-(-share // 4) for share in shares) / warps
    load, usual = "float load_by(", "for (uint32_t todo = here & ~marked"
    marked = "for (uint32_t todo = here & marked"
    for_forbidden = "for (uint32_t f = "
    weights += [
        Weight(one_warp, row_h("__device__ Row(", for_forbidden)),
        Weight(1, row_h(load, "for (uint32_t first = 0")),
        Weight(turns, row_h(load, usual)),
        Weight(tiles / (4 * turns), row_h(load, usual, "c[t] = read<kBytes>")),
        Weight(tiles / (4 * turns), row_h(load, usual, "take(i + t, c[t])")),
        Weight(one_warp, row_h(load, marked)),
        Weight(1, row_h("uint32_t first_forbidden_from(", "while (first < end)")),
        Weight(1, row_h("Chunk read_unusual(", for_forbidden)),
        Weight(one_warp, unmask_cu("uint32_t find_first_largest(", "if (__any_sync")),
        Weight(tiles / 2, unmask_cu("uint32_t find_first_largest(", "for (uint32_t i = 0")),
        Weight(one_warp, sample_h("void start(")),
        Weight(tiles, unmask_cu(*each)),
        Weight(trips.offers, sample_h("void offer(")),
        Weight(trips.made / trips.offers, sample_h("void offer(", "do {")),
        Weight(one_warp, unmask_cu(main, "if (team.thread() != 0) return;", rest=True)),
    ]
    if top_k < V:
        weights.append(Weight(trips.taken, unmask_cu(*each, "if (filter &&", rest=True)))
        weights += _weights_of_search(dtype, top_k, warps, tiles)
    else:
        weights += [
            Weight(0, unmask_cu(main, "if (selects) {")),
            Weight(0, unmask_cu(*each, "if (filter) c =")),
        ]
    kept = f", k {top_k}" if top_k < V else ""
    return CudaCase(
        f"unmask, {name}, V {V}{kept}",
        "unmask/unmask.cu",
        f"unmask_kernelI{type_}LNS0_7MappingE1ELb0E",
        Work("logit", V, warps, BYTES[dtype], weights, overlaps=has_half),
    )


def _weights_of_search(dtype: torch.dtype, top_k: int, warps: int, tiles: float) -> list[Weight]:
    top_k_h = regions_of("unmask/gpu/top_k.h")
    search = mean_search(V, dtype, top_k)
    find, tie, listed = "TopK find()", "void find_tie(", "TopK last_of_list("
    turns = search.counts + 1  # of which the last ends it
    # Of the tiles of a row, those with a logit that is listed; none where nothing ever is.
    with_listed = -math.expm1(-search.listed / (tiles * warps))
    by_step = {
        "void count(": search.counts,
        "void propose_from_row(": search.from_row,
        "void propose_thirds(": search.thirds,
        "void propose_around(": search.around,
        "void propose_from_list(": search.from_list,
        "uint32_t list()": search.lists,
        listed: search.ends_by_list,
    }
    return [
        Weight(turns, top_k_h(find, "for (uint32_t turn = 0")),
        *(Weight(times / turns, top_k_h(step)) for step, times in by_step.items()),
        Weight(search.ends_by_tie / turns, top_k_h(find, "if (knows_ties)")),
        Weight(1 / warps, top_k_h(tie)),
        Weight(tiles / 2, top_k_h(tie, "for (uint32_t i = 0")),
        Weight(2 / tiles, top_k_h(tie, "for (uint32_t i = 0", "if (all < wanted)", rest=True)),
        Weight(1, top_k_h("void count(", "for (uint32_t i = 0")),
        # Four tiles a turn, and copies of two and of one for those that are left.
        Weight(tiles // 4, top_k_h("void count(", "for (; i < end"), outside=tiles % 4 / 3),
        Weight(2 / warps, top_k_h("void propose_from_sample(", "for (uint32_t j = team_")),
        # Four bits at a time.
        Weight(16 / 4, top_k_h("uint32_t sampled_key(", "for (uint32_t bit")),
        Weight(tiles, top_k_h("uint32_t list()", "for (uint32_t i = 0")),
        Weight(with_listed, top_k_h("bool enlist(")),
        Weight(search.listed / 32 / warps, top_k_h(listed, "for (uint32_t t = team_")),
        # Four at a time.
        Weight(
            search.listed / 4, top_k_h(listed, "for (uint32_t t = team_", "for (uint32_t i = 0")
        ),
        Weight(1 / warps, top_k_h("TopK up_to(", "if (i >= row_.num_tiles()", rest=True)),
    ]


def cuda_cases() -> list[CudaCase]:
    bf16 = "bf16", "13__nv_bfloat16", torch.bfloat16
    fp32 = "fp32", "f", torch.float32
    return [
        _cuda_case(*bf16),
        _cuda_case(*bf16, MANY),
        _cuda_case(*bf16, FEW),
        _cuda_case("fp16", "6__half", torch.float16),
        _cuda_case(*fp32),
        _cuda_case(*fp32, MANY),
        _cuda_case(*fp32, FEW),
        *(
            CudaCase(
                f"unmask, {name}, p",
                "unmask/unmask.cu",
                f"unmask_kernelI{type_}LNS0_7MappingE1ELb1E",
                None,
            )
            for name, type_, _ in (bf16, fp32)
        ),
    ]


# ---- Triton

BOTH = "stride", "vocabulary"
# Name, types of the logits and of optional pointers, V, k, confidence, and the scalar arguments
# that are multiples of 16.
CASES: list[tuple[str, dict[str, str], int, int, str, tuple[str, ...]]] = [
    ("bf16, V 50304", {"logits": "*bf16"}, V, V, "probability", BOTH),
    (f"bf16, V 50304, k {MANY}", {"logits": "*bf16"}, V, MANY, "probability", BOTH),
    (f"bf16, V 50304, k {FEW}", {"logits": "*bf16"}, V, FEW, "probability", BOTH),
    ("fp32, V 50304", {"logits": "*fp32"}, V, V, "probability", BOTH),
    (f"fp32, V 50304, k {MANY}", {"logits": "*fp32"}, V, MANY, "probability", BOTH),
    (f"fp32, V 50304, k {FEW}", {"logits": "*fp32"}, V, FEW, "probability", BOTH),
    (
        "fp32, V 50304, k, given, entropy",
        {"logits": "*fp32", "given": "*i64", "others": "*i64", "confidence": "*fp32"},
        *(V, FEW, "entropy", BOTH),
    ),
    ("bf16, V 50258 at any address, k", {"logits": "*bf16"}, 50258, FEW, "probability", ()),
    ("fp32, V 50304, k, p", {"logits": "*fp32", "top_p": "i32"}, V, MANY, "probability", BOTH),
]
TYPES = {
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
COUNTED = 15  # blocks, by counts of 4 bits


def _triton_work(options: dict, type_: str, vocabulary: int, top_k: int) -> Work:
    """A program is a row, which all passes but the first find in a cache."""
    dtype = {"*bf16": torch.bfloat16, "*fp32": torch.float32}[type_]
    unmask_py = regions_of("kernels/unmask.py")
    block = options["BLOCK"]
    blocks = -(-vocabulary // block)
    made = logits.made_blocks(vocabulary, dtype, top_k, block)
    each_block = "def unmask_kernel(", "for first in range(0, vocabulary"
    weights = [
        Weight(blocks, unmask_py("def _largest_logit(", "for first in range(0, row.vocabulary")),
        Weight(blocks, unmask_py(*each_block)),
        Weight(made, unmask_py(*each_block, "if tl.max(_score_bound")),
        Weight(0, unmask_py(*each_block, "else:")),
    ]
    if options["SELECTS"]:
        digits, tie_blocks = logits.radix_select(vocabulary, dtype, top_k, block)
        groups = -(-blocks // COUNTED)
        group = "def _count_digits(", "for start in range(0, row.vocabulary"
        look = "def _last_tie(", "while wanted > 0"
        has_it = 1 / tie_blocks if tie_blocks else 0
        weights += [
            Weight(digits, unmask_py("def _find_top_k(", "while (shift > LAST_SHIFT)")),
            Weight(groups, unmask_py(*group)),
            Weight(blocks / groups, unmask_py(*group, "for first in range(start")),
            Weight(tie_blocks, unmask_py(*look)),
            Weight(min(has_it, 1), unmask_py(*look, "if number >= wanted")),
        ]
    return Work("logit", vocabulary, options["num_warps"], BYTES[dtype], weights)


def triton_cases() -> list[TritonCase]:
    cases = []
    for name, given, vocabulary, top_k, confidence, aligned in CASES:
        options = unmask.launch_options(vocabulary, top_k, confidence)
        is_counted = aligned and confidence == "probability" and "top_p" not in given
        work = _triton_work(options, given["logits"], vocabulary, top_k) if is_counted else None
        types, kernel = TYPES | given, unmask.unmask_kernel
        cases.append(TritonCase(f"unmask, {name}", kernel, types, options, aligned, work))
    return cases
