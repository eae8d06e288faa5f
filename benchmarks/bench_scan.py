"""A whole corpus in one pass: validation, and counts of all ids, beside the bandwidth of memory.

    python benchmarks/bench_scan.py [--bytes N] [--folder DIR] [--json FILE] [--dry-run]

GB/s of ids in a file in the page cache. The limit is `sum of int64`: PyTorch reads the same memory
and does next to nothing with it. `mask inside`: mask_id is between other ids and must be looked
for. `first touch`: the map is new, so each page must be mapped, as in a process that opens the
corpus. `numpy` does the same work in chunks of 2**18 ids, on one thread: `validate_all` before
there was a kernel, and `bincount`. Ids are of a vocabulary of 50,257 (256 for uint8), as frequent
as words: 1 / (rank + 2.7), ranks in any order.

`--dry-run` is tiny; its figures are meaningless.
"""

import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from measure import begin, make_parser, print_table, turns_ns, write_json

from nar_kernels.data.corpus import Corpus
from nar_kernels.data.inspect.scan import find_bad
from nar_kernels.ops.scan import scan

DTYPES = ("uint8", "uint16", "uint32", "int64")
VOCABULARY = 50_257
LIMIT, VALIDATE, MASKED, HISTOGRAM = (
    "sum of int64",
    "validate",
    "validate, mask inside",
    "histogram",
)
FIRST_TOUCH, NUMPY, BINCOUNT = "validate, first touch", "numpy validate", "numpy bincount"
CHUNK = 1 << 18


def vocabulary_of(dtype: str) -> int:
    return min(VOCABULARY, np.iinfo(dtype).max + 1)


def write_corpus(path: Path, dtype: str, size: int) -> None:
    vocabulary = vocabulary_of(dtype)
    rng = np.random.default_rng(0)
    share = 1 / (np.arange(vocabulary) + 2.7)
    ids = rng.permutation(vocabulary)[
        rng.choice(vocabulary, min(1 << 22, size), p=share / share.sum())
    ].astype(dtype)
    ids[ids == vocabulary // 2] = 0  # the mask
    with path.open("wb") as file:
        while file.tell() < size:
            ids[: (size - file.tell()) // ids.itemsize].tofile(file)


def numpy_validate(tokens: np.ndarray, num_tokens: int) -> bool:
    parts = (tokens[i : i + CHUNK] for i in range(0, len(tokens), CHUNK))
    return all(part.min() >= 0 and part.max() < num_tokens for part in parts)


def numpy_bincount(tokens: np.ndarray, num_tokens: int) -> np.ndarray:
    counts = np.zeros(num_tokens, np.int64)
    for i in range(0, len(tokens), CHUNK):
        counts += np.bincount(tokens[i : i + CHUNK], minlength=num_tokens)
    return counts


def calls(path: Path, dtype: str) -> dict[str, Callable[[], object]]:
    tokens = Corpus(path, dtype=dtype).tokens
    num_tokens = vocabulary_of(dtype)
    counts = torch.zeros(num_tokens, dtype=torch.int64)
    whole = partial(scan, tokens, None, 0, len(tokens))
    assert whole(num_tokens=num_tokens, mask_id=num_tokens // 2, max_places=1).places == []
    counts.zero_()
    assert whole(counts=counts).uncounted == 0
    assert (counts.numpy() == numpy_bincount(tokens.numpy(), num_tokens)).all()
    return {
        LIMIT: tokens.view(torch.int64).sum,
        VALIDATE: partial(whole, num_tokens=num_tokens),
        MASKED: partial(whole, num_tokens=num_tokens, mask_id=num_tokens // 2),
        HISTOGRAM: partial(whole, num_tokens=num_tokens, counts=counts),
        FIRST_TOUCH: lambda: find_bad(Corpus(path, dtype=dtype), num_tokens=num_tokens),
        NUMPY: partial(numpy_validate, tokens.numpy(), num_tokens),
        BINCOUNT: partial(numpy_bincount, tokens.numpy(), num_tokens),
    }


def compare(path: Path, dtype: str, repeats: int) -> list[dict]:
    turns = turns_ns(calls(path, dtype), repeats)
    size = path.stat().st_size
    return [
        {
            "what": what,
            "gb_per_second": size / statistics.median(times),
            "ids_per_ns": size / np.dtype(dtype).itemsize / statistics.median(times),
            "share_of_limit": statistics.median(
                limit / ours for limit, ours in zip(turns[LIMIT], times, strict=True)
            ),
        }
        for what, times in turns.items()
    ]


def main() -> None:
    parser = make_parser(__doc__, repeats=7)
    parser.add_argument("--bytes", type=int, default=1 << 30, help="of each corpus")
    parser.add_argument("--folder", type=Path, help="where to write one (default: a temporary one)")
    args = parser.parse_args()
    _, repeats, record = begin(parser, args, on_cpu=True)
    size = 1 << 16 if args.dry_run else args.bytes
    record["settings"] = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for dtype in DTYPES:
            path = Path(folder, "corpus.bin")
            write_corpus(path, dtype, size)
            rows = compare(path, dtype, repeats)
            record["settings"].append({"dtype": dtype, "bytes": size, "rows": rows})
            print(f"{dtype}, {size} bytes\n")
            print_table(rows)
            write_json(args.json, record)


if __name__ == "__main__":
    main()
