"""The kernels that are compiled and counted, and how often parts of them are expected to run."""

import math
from typing import NamedTuple

import numpy as np
import triton

from benchmarks.gpu_code.sass import Region, Weight
from nar_kernels.ops.arguments import ChooseArgs, CorruptArgs
from nar_kernels.ops.kernels import choose, corrupt, nll, unmask


class Work(NamedTuple):
    """What a program of Triton, or a block of CUDA, does.

    Attributes:
        unit: what its instructions and bytes are counted for.
        units: how many of them.
        warps: that work on them.
        bytes: read from and written to memory for each.
        weights: how often parts of the source run.
    """

    unit: str
    units: float
    warps: int
    bytes: float
    weights: list[Weight]


class TritonCase(NamedTuple):
    """
    Attributes:
        types: of the arguments that are given; the others are None.
        options: compile-time arguments of the kernel and of the compiler.
        aligned: scalar arguments that are multiples of 16; pointers always are.
        work: None where nothing is counted.
    """

    name: str
    kernel: triton.JITFunction
    types: dict[str, str]
    options: dict
    aligned: tuple[str, ...]
    work: Work | None


class CudaCase(NamedTuple):
    """
    Attributes:
        source: below csrc.
        symbol: a part of the mangled name.
    """

    name: str
    source: str
    symbol: str
    work: Work | None


# ---- corrupt

# Read: an id of a uint16 corpus. Written: id, label, mask, and for half of the positions, which a
# linear schedule masks, an index.
CORRUPT_BYTES = 2 + 8 + 8 + 1 + 4


def num_passes(length: int, num_ranks: int, num_rows: int = 300) -> float:
    """Mean passes of the search for order statistics of random keys, by the pivots of
    ``csrc/corrupt/gpu/select.h`` and ``ops/kernels/order_statistic.py``."""
    rng = np.random.default_rng(0)
    total = 0
    for _ in range(num_rows):
        keys = np.sort(rng.integers(0, 1 << 32, length))
        k = int(rng.integers(1, length + 1))
        total += max(_passes(keys, rank) for rank in (k, k // 5, k // 10)[:num_ranks])
    return total / num_rows


def _passes(keys: np.ndarray, rank: int) -> int:
    low, last, below_low, below_end = 0, (1 << 32) - 1, 0, len(keys)
    passes = 0
    while below_low != rank and low < last:
        share = (rank - below_low + 0.5) / (below_end - below_low + 1)
        share = share if passes < 8 or passes % 2 == 0 else 0.5
        offset = last - low if rank == below_end else int((last - low) * share)
        pivot = low + min(max(offset, 1), last - low)
        below = int(np.searchsorted(keys, pivot))
        if below <= rank:
            low, below_low = pivot, below
        else:
            last, below_end = pivot - 1, below
        passes += 1
    return passes


def _cuda_corrupt(name: str, held: int, length: int, draw: str, ranks: int) -> CudaCase:
    """A step of a loader: windows in the order of their epoch, strata of at most 256 samples.

    Args:
        held: tiles that a warp holds; 0 for long rows.
    """
    warps = -(-length // (128 * held)) if held else 16
    rows = 7 if warps == 1 else 1
    tiles = length / 128 / warps
    passes = num_passes(length, ranks) if draw == "exact" else 0

    def tiles_h(*headers: str) -> Region:
        return Region("gpu/tiles.h", headers)

    def corrupt_cu(*headers: str) -> Region:
        return Region("corrupt.cu", headers)

    rare = [
        tiles_h("void record_bad("),
        tiles_h("uint32_t find_maskable("),
        tiles_h("uint32_t exclude()"),
        tiles_h("uint32_t maskable("),
        tiles_h("void each_with_ids(", "if (__any_sync"),
        tiles_h("load_ids(", "case 1: load"),
        tiles_h("load_ids(", "case 4: load"),
        tiles_h("load_ids(", "default: load"),
        tiles_h("void load_words(", "} else {"),
        Region("gpu/write.h", ("void store(", "if (narrow_)")),
        Region("gpu/write.h", ("void store_pair(", "if (narrow_)")),
        Region("gpu/select.h", ("KeyBound tied_bound(",)),
        Region("gpu/select.h", ("for (; tied != 0",)),
        Region("gpu/select.h", ("class RankedTiles",)),
        corrupt_cu("uint32_t count_ranked("),
        corrupt_cu("void write_ranked("),
        corrupt_cu("if (tied || !a.in_pairs)"),
    ]
    one_of_block = 1 / (warps * rows)
    weights = [
        *[Weight(0, region) for region in rare],
        Weight(passes, Region("gpu/select.h", ("select_keys(", "for (int pass"))),
        Weight(one_of_block, corrupt_cu("void lead_block(")),
        Weight(one_of_block, corrupt_cu("__global__ void", "return lead_block")),
    ]
    if held == 0:
        weights.append(Weight(tiles, tiles_h("void each(Use use)", "for (int32_t tile = first_")))
    return CudaCase(
        f"corrupt, step, {name}, L {length}, " + (f"{held} tiles a warp" if held else "long rows"),
        "corrupt/corrupt.cu",
        f"corrupt_kernelILi{held}ELi{ranks}E",
        Work("token", length * rows, warps * rows, CORRUPT_BYTES, weights),
    )


def _corrupt_work(options: dict, length: int, ids: str, is_exact: bool) -> Work:
    """As ``_cuda_corrupt``. A program is a row."""

    def corrupt_py(*headers: str) -> Region:
        return Region("kernels/corrupt.py", headers)

    def random_py(*headers: str) -> Region:
        return Region("kernels/random.py", headers)

    loops = -(-length // options["TILE"])
    each_tile = "for first in range(0, row.end"
    weights = [
        Weight(0, corrupt_py("def _record_bad_ids(")),
        Weight(0, corrupt_py("def _break_ties(")),
        # Windows are many; strata are at most 256.
        Weight(0, random_py("def permute(", "if n <="), corrupt_py("def _ordered_start(")),
        Weight(0, random_py("def permute(", "else:"), corrupt_py("def _row_time(")),
        Weight(0.4, random_py("def permute(", "while result >= n")),
    ]
    if is_exact:
        passes = num_passes(length, options["RANKS"])
        weights.append(Weight(passes, corrupt_py("def _exact_bounds(", "while not")))
    if loops > 1:
        steps = "_count_maskable", "_bernoulli_count", "_count_below", "_write_positions"
        weights += [Weight(loops, corrupt_py(f"def {step}(", each_tile)) for step in steps]
    num_bytes = CORRUPT_BYTES - 2 + int(ids[2:]) // 8
    return Work("token", length, options["num_warps"], num_bytes, weights)


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
    ("bf16, V 50304, bias", {"logits": "*bf16", "weight": "*fp32", "bias": "*fp32"}, 50304, True),
    ("bf16, V 128256", {"logits": "*bf16", "weight": "*fp32"}, 128256, True),
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
    ("random, L 65536", {}, 65536, {}),
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


# ---- unmask, in CUDA


def noise_made(vocabulary: int, threads: int, size: int, num_rows: int = 20) -> tuple[float, float]:
    """Of the vectors of a warp the share whose bound says that they may win, and of the columns the
    share whose noise is made: for logits of standard deviation 3, if all warps go on at one pace
    and learn of a score in their next round."""
    rng = np.random.default_rng(0)
    warps, rounds = threads // 32, -(-vocabulary // (threads * size))
    vectors = columns = 0
    for _ in range(num_rows):
        logits = np.full(rounds * threads * size, -np.inf)
        logits[:vocabulary] = 3 * rng.standard_normal(vocabulary)
        logits -= logits.max()
        u = rng.random(len(logits))
        score, bound = logits - np.log(-np.log1p(-u)), logits - np.log(u)
        best = score[logits.argmax()]
        of_round = bound.reshape(rounds, warps, 32, size), score.reshape(rounds, -1)
        for bounds, scores in zip(*of_round, strict=True):
            may_win = (bounds >= best).any(1)  # [warps, size]
            vectors += may_win.any(1).sum()
            columns += may_win.sum()
            best = max(best, scores.max())
    return vectors / (num_rows * rounds * warps), columns / (num_rows * rounds * warps * size)


class UnmaskTrips(NamedTuple):
    """How often a warp of ``unmask`` in CUDA C++ comes to what depends on the data, for each of its
    tiles: ``offers`` of noise that may win, ``made`` rounds in which noise is made, ``low`` logits
    that the table of exponentials leaves out."""

    offers: float
    made: float
    low: float


def unmask_trips(vocabulary: int, warps: int, size: int, num_rows: int = 20) -> UnmaskTrips:
    """For logits of standard deviation 3 at temperature 1, if all warps go on at one pace and learn
    of a score with their next tile."""
    rng = np.random.default_rng(0)
    rounds = -(-vocabulary // (warps * 32 * size))
    tiles = offers = made = low = 0
    for _ in range(num_rows):
        logits = np.full(rounds * warps * 32 * size, -np.inf)
        logits[:vocabulary] = 3 * rng.standard_normal(vocabulary)
        largest = logits.max()
        least = max(largest, 21.5 - largest) * 2 ** (-1760 / 128)
        low += (np.abs(logits) < least).reshape(-1, 32 * size).any(1).sum()
        u = rng.random(len(logits))
        shape = rounds, warps, 32, size
        gap, u = (logits - largest).reshape(shape), u.reshape(shape)
        best = (gap - np.log(-np.log1p(-u))).flat[logits.argmax()]
        for gaps, us in zip(gap, u, strict=True):  # [warps, 32, size]
            tiles += warps
            may_win = gaps.max(2) - np.log(us.min(2)) > best
            offers += may_win.any(1).sum()
            made += (gaps - np.log(us) > best).sum(2).max(1).sum()
            best = max(best, (gaps - np.log(-np.log1p(-us))).max())
    return UnmaskTrips(offers / tiles, made / tiles, low / tiles)


def _cuda_unmask(
    name: str, type_: str, size: int, vocabulary: int, warps: int, top_k: int | None = None
) -> CudaCase:
    """With one forbidden id, at temperature 1, of a row that shared memory holds. The search for
    the k-th counts, and lists some 128 logits, as often as for rows of standard deviation 3 on
    average."""
    tiles = vocabulary / (32 * size * warps)  # of a warp
    trips = unmask_trips(vocabulary, warps, size)

    def unmask_cu(*headers: str) -> Region:
        return Region("unmask/unmask.cu", headers)

    def gpu(file: str, *headers: str) -> Region:
        return Region(f"unmask/gpu/{file}.h", headers)

    one_warp, has_table, listed = 1 / warps, "nv_bfloat16" in type_, 128
    counts, lists = (4.2, 0) if has_table else (2.1, 1)
    turns = counts + lists
    rare = [
        gpu("row", "float load()", "load_by<4>"),
        gpu("row", "float load()", "load_by<sizeof(T)>"),
        gpu("row", "bool forbids("),
        gpu("sums", "if (with_gap)"),
        unmask_cu("float exp_of_second("),
        unmask_cu("void unmask_row(", "if (largest == -INFINITY)"),
        unmask_cu("void unmask_row(", "if (given >= 0)"),
        unmask_cu("void unmask_row(", "if (with_gap)"),
        unmask_cu("void unmask_row(", "} else if (a.confidence)"),
        gpu("sums", "void build(") if not has_table else unmask_cu("if (!has_table)"),
    ]
    filters = [
        unmask_cu("void unmask_row(", "if (selects) {"),
        unmask_cu("const auto take =", "if (selects) c ="),
        unmask_cu("const auto take =", "if (selects &&"),
    ]
    weights = [Weight(0, region) for region in (rare if top_k else [*rare, *filters])] + [
        Weight(tiles / 4, gpu("row", "float load_by(", "for (uint32_t todo = here & ~marked")),
        Weight(one_warp, gpu("row", "float load_by(", "for (uint32_t todo = here & marked")),
        Weight(1760 / (32 * warps), gpu("sums", "void build(", "for (int i = static_cast")),
        Weight(trips.low, gpu("sums", "void add_some_low(")),
        Weight(one_warp, gpu("sample", "void start(")),
        Weight(one_warp, unmask_cu("uint32_t find_first_largest(", "if (__any_sync")),
        Weight(tiles / 2, unmask_cu("uint32_t find_first_largest(", "for (uint32_t i = 0")),
        Weight(tiles, unmask_cu("const auto take =", "for (uint32_t i = 0")),
        Weight(trips.offers, gpu("sample", "void offer(")),
        Weight(trips.made / trips.offers, gpu("sample", "void offer(", "do {")),
        Weight(turns, gpu("top_k", "TopK find()", "for (uint32_t turn = 0")),
        Weight(counts / turns, gpu("top_k", "void count(")),
        # Seven copies: of four tiles, of two and of one.
        Weight(tiles / 7, gpu("top_k", "void count(", "for (; i < end")),
        Weight(2 / turns, gpu("top_k", "void propose_around(")),
        Weight(1 / turns, gpu("top_k", "void propose_from_row(")),
        Weight(2 * one_warp, gpu("top_k", "void propose_from_sample(", "for (uint32_t j = team_")),
        Weight(lists / turns, gpu("top_k", "uint32_t list()")),
        Weight(tiles, gpu("top_k", "uint32_t list()", "for (uint32_t i = 0")),
        Weight(1 - math.exp(-listed / (tiles * warps)), gpu("top_k", "bool enlist(")),
        Weight(lists / turns, gpu("top_k", "TopK last_of_list(")),
        Weight(listed / 32 / warps, gpu("top_k", "TopK last_of_list(", "for (uint32_t t = team_")),
        # Four at a time.
        Weight(listed / 4, gpu("top_k", "TopK last_of_list(", "for (uint32_t i = 0")),
        Weight(one_warp, gpu("top_k", "TopK up_to(")),
        *(
            Weight(0, gpu("top_k", rare))
            for rare in ("void propose_thirds(", "void propose_from_list(", "uint32_t last_tie()")
        ),
    ]
    work = Work("logit", vocabulary, warps, 16 / size, weights)
    kept = f", k {top_k}" if top_k else ""
    return CudaCase(
        f"unmask, {name}, V {vocabulary}{kept}",
        "unmask/unmask.cu",
        f"unmask_kernelI{type_}LNS0_3WayE1E",  # a block holds a row
        work,
    )


def _triton_corrupt() -> list[TritonCase]:
    cases = []
    for name, ids, given, changes in CORRUPT_CASES:
        types = {"tokens": ids} | POINTERS | SCALARS
        types = {k: v for k, v in types.items() if k not in OPTIONAL - {*given}}
        arguments = STEP._replace(**changes)
        options = corrupt.launch_options(arguments)
        work = _corrupt_work(options, arguments.seq_len, ids, arguments.exact)
        cases.append(
            TritonCase(
                f"corrupt, {name}", corrupt.corrupt_kernel, types, options, ("seq_len",), work
            )
        )
    return cases


def _nll_work(options: dict, logits: str, vocabulary: int, gradient: bool) -> Work:
    """A program is a row, read from memory once and written once."""

    def nll_py(*headers: str) -> Region:
        return Region("kernels/nll.py", headers)

    whole_blocks = (vocabulary - 1) // options["BLOCK"]
    weights = [
        Weight(0, nll_py("def nll_kernel(", "if (scale == 0)")),
        Weight(whole_blocks, nll_py("def nll_kernel(", "for first in range(0, last")),
        Weight(whole_blocks, nll_py("def nll_kernel(", "for done in range(0, last")),
    ]
    num_bytes = {"*bf16": 2, "*fp32": 4}[logits]
    return Work("logit", vocabulary, options["num_warps"], num_bytes * (1 + gradient), weights)


def _triton_nll() -> list[TritonCase]:
    cases = []
    for name, given, vocabulary, gradient in NLL_CASES:
        options = nll.launch_options(vocabulary, gradient)
        work = _nll_work(options, given["logits"], vocabulary, gradient)
        aligned = "stride", "width"
        cases.append(
            TritonCase(f"nll, {name}", nll.nll_kernel, NLL_TYPES | given, options, aligned, work)
        )
    return cases


def _unmask_work(options: dict, vocabulary: int, logits: str) -> Work:
    """Without a filter, with one forbidden id, at temperature 1. A program is a row, whose second
    pass finds it in a cache."""

    def unmask_py(*headers: str) -> Region:
        return Region("kernels/unmask.py", headers)

    block = options["BLOCK"]
    loops = vocabulary / block
    # Blocks are as the vectors of one warp that goes through the row.
    made, _ = noise_made(vocabulary, 32, block // 32, 10)
    kernel, each_block = "def unmask_kernel(", "for first in range(0, vocabulary"
    weights = [
        Weight(loops, unmask_py("def _largest_logit(", "for first in range(0, row.vocabulary")),
        Weight(loops, unmask_py(kernel, each_block)),
        Weight(made, unmask_py(kernel, "if tl.max(_score_bound", "score =")),
        Weight(made, unmask_py(kernel, "if tl.max(_score_bound", "best, best_column")),
        Weight(made, unmask_py(kernel, "if tl.max(_score_bound", "to_beat =")),
        Weight(0, unmask_py(kernel, each_block, "else:")),
    ]
    num_bytes = {"*bf16": 2, "*fp32": 4}[logits]
    return Work("logit", vocabulary, options["num_warps"], num_bytes, weights)


def _triton_unmask() -> list[TritonCase]:
    cases = []
    for name, given, vocabulary, top_k, confidence, aligned in UNMASK_CASES:
        options = unmask.launch_options(vocabulary, top_k, confidence)
        counted = top_k == vocabulary and confidence == "probability"
        work = _unmask_work(options, vocabulary, given["logits"]) if counted else None
        cases.append(
            TritonCase(
                f"unmask, {name}",
                unmask.unmask_kernel,
                UNMASK_TYPES | given,
                options,
                aligned,
                work,
            )
        )
    return cases


def _choose_work(options: dict, length: int) -> Work:
    """A program is a sequence, with keys that are random: those of scores take more passes. Rows
    are read and written once; keys stay in the cache."""

    def choose_py(*headers: str) -> Region:
        return Region("kernels/choose.py", headers)

    weights = [Weight(num_passes(length, 1), choose_py("def _find_smallest(", "while not"))]
    loops, each_block = -(-length // options["BLOCK"]), "for first in range(0, "
    if loops > 1:
        steps = "_store_keys", "_find_smallest", "choose_kernel"
        weights += [Weight(loops, choose_py(f"def {step}(", each_block)) for step in steps]
    return Work("position", length, options["num_warps"], 8 + 8, weights)


def _triton_choose() -> list[TritonCase]:
    cases = []
    for name, given, length, changes in CHOOSE_CASES:
        options = choose.launch_options(CHOICE._replace(length=length, **changes))
        work = None if given else _choose_work(options, length)
        types = CHOOSE_TYPES | given
        cases.append(TritonCase(f"choose, {name}", choose.choose_kernel, types, options, (), work))
    return cases


def triton_cases() -> list[TritonCase]:
    return [*_triton_corrupt(), *_triton_nll(), *_triton_unmask(), *_triton_choose()]


def cuda_cases() -> list[CudaCase]:
    return [
        _cuda_corrupt("exact", 8, 1024, "exact", 1),
        _cuda_corrupt("exact, BERT", 8, 1024, "exact", 3),
        _cuda_corrupt("bernoulli", 8, 1024, "bernoulli", 1),
        _cuda_corrupt("exact", 4, 1024, "exact", 1),
        _cuda_corrupt("exact", 1, 1024, "exact", 1),
        _cuda_corrupt("exact", 12, 16384, "exact", 1),
        _cuda_corrupt("exact, BERT", 12, 16384, "exact", 3),
        _cuda_corrupt("exact", 0, 65536, "exact", 1),
        _cuda_corrupt("exact, BERT", 0, 65536, "exact", 3),
        _cuda_unmask("bf16", "13__nv_bfloat16", 8, 50304, 12),
        _cuda_unmask("bf16", "13__nv_bfloat16", 8, 50304, 12, top_k=15092),
        _cuda_unmask("fp16", "6__half", 8, 50304, 12),
        _cuda_unmask("fp32", "f", 4, 50304, 24),
        _cuda_unmask("fp32", "f", 4, 50304, 24, top_k=15092),
    ]
