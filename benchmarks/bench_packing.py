"""Packing documents into rows: `PackingPlan` beside TRL's `pack_dataset`.

    python benchmarks/bench_packing.py [--documents N] [--json FILE] [--dry-run]

Log-normal lengths of mean 256; documents longer than a row are split. `PackingPlan`: all that it
does for the first epoch, from the ends of documents to what each row holds, 1024 rows at a time.
`pack` alone: first fit decreasing of the documents of one window, in the order of the corpus.

TRL (`pip install --no-deps trl`; it needs datasets and transformers; without it the rest is timed)
packs by best fit decreasing, in Python, in batches as long as our windows, without shuffling. It
also moves the tokens into the new rows, here in memory and one byte each: `pyarrow take` is what
that takes for documents in any order. TRL is timed once.

`--dry-run` is tiny; its figures are meaningless.
"""

import statistics
from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
from measure import begin, call_ns, make_parser, print_table, turns_ns, write_json

from nar_kernels.data.packing.pack import PackMethod, pack
from nar_kernels.data.packing.plan import PackingPlan

SEQ_LENS = (1024, 4096)
MEAN, WINDOW, ROWS_AT_ONCE = 256, 4096, 1024
FFD, IN_ORDER, ALONE = "PackingPlan", "PackingPlan, in order", "pack alone"
TRL, TAKE = "TRL", "pyarrow take"
METHODS: dict[str, PackMethod] = {FFD: "first_fit_decreasing", IN_ORDER: "in_order"}


def draw_lengths(num: int) -> np.ndarray:
    lengths = np.random.default_rng(0).lognormal(np.log(MEAN) - 0.5, 1, num)
    return lengths.astype(np.int64).clip(1)


def plan_of(lengths: np.ndarray, seq_len: int, window: int, who: str) -> PackingPlan:
    return PackingPlan(lengths.cumsum(), seq_len, seed=0, window=window, method=METHODS[who])


def read_rows(plan: PackingPlan, num_rows: int) -> int:
    """How many tokens these rows hold."""
    firsts = range(0, num_rows, ROWS_AT_ONCE)
    parts = (plan.rows(first, min(ROWS_AT_ONCE, num_rows - first)) for first in firsts)
    return sum(int(pieces.length.sum()) for pieces in parts)


def ours(lengths: np.ndarray, seq_len: int, window: int, repeats: int) -> list[dict]:
    calls: dict[str, Callable[[], object]] = {}
    padding: dict[str, float | None] = {}
    for who in METHODS:
        plan = plan_of(lengths, seq_len, window, who)
        num_rows, padding[who] = plan.num_rows(), plan.padding_share()
        assert read_rows(plan, num_rows) == lengths.sum()
        calls[who] = lambda who=who, n=num_rows: read_rows(
            plan_of(lengths, seq_len, window, who), n
        )
    calls[ALONE] = lambda: pack(np.minimum(lengths[:window], seq_len), seq_len)
    padding[ALONE] = None
    turns = turns_ns(calls, repeats)
    return [
        row(who, statistics.median(turns[who]), window if who == ALONE else len(lengths), share)
        for who, share in padding.items()
    ]


def theirs(lengths: np.ndarray, seq_len: int, window: int) -> list[dict]:
    if find_spec("trl") is None:
        print("TRL is not installed: pip install --no-deps trl")
        return []
    import datasets
    import pyarrow as pa
    import pyarrow.compute as pc
    from trl.data_utils import pack_dataset

    datasets.disable_progress_bars()
    total = int(lengths.sum())
    offsets = pa.array(np.concatenate([[0], lengths.cumsum()]).astype(np.int32))
    column = pa.ListArray.from_arrays(offsets, pa.array(np.zeros(total, np.uint8)))
    documents = datasets.Dataset(pa.table({"input_ids": column}))
    how = {"batch_size": window, "keep_in_memory": True}
    packed: list[datasets.Dataset] = []
    ns = call_ns(lambda: packed.append(pack_dataset(documents, seq_len, "bfd_split", how)))
    held = pc.sum(pc.list_value_length(packed[0].data["input_ids"])).as_py()
    assert held == total
    order = pa.array(np.random.default_rng(1).permutation(len(lengths)))
    take_ns = call_ns(lambda: pc.take(column, order))
    padding = 1 - total / (len(packed[0]) * seq_len)
    return [row(TRL, ns, len(lengths), padding), row(TAKE, take_ns, len(lengths), None)]


def row(who: str, ns: float, num_documents: int, padding: float | None) -> dict:
    rate = num_documents / ns * 1e9
    return {"who": who, "seconds": ns / 1e9, "documents_per_second": rate, "padding": padding}


def main() -> None:
    parser = make_parser(__doc__, repeats=5)
    parser.add_argument("--documents", type=int, default=10**6)
    args = parser.parse_args()
    _, repeats, record = begin(parser, args, on_cpu=True)
    num = 300 if args.dry_run else args.documents
    lengths = draw_lengths(num)
    record["documents"], record["settings"] = num, []
    for seq_len in SEQ_LENS:
        for window in (min(WINDOW, num), num):
            rows = ours(lengths, seq_len, window, repeats) + theirs(lengths, seq_len, window)
            trl = next((row["seconds"] for row in rows if row["who"] == TRL), None)
            for timed in rows:
                is_plan = trl is not None and timed["who"] in METHODS
                timed["times_trl"] = trl / timed["seconds"] if is_plan else None
            record["settings"].append({"seq_len": seq_len, "window": window, "rows": rows})
            print(f"{num} documents, seq_len {seq_len}, window {window}\n")
            print_table(rows)
            write_json(args.json, record)


if __name__ == "__main__":
    main()
