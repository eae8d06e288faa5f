"""CPU benchmark of masked batches from a file of token ids: `MaskedLoader` against the loops that
people write, in the same process, page cache warm.

Peers, each from the same uint16 file of 2e8 tokens, shuffled, and masked at a ratio drawn for each
window; ids as int64:

* nanoGPT: its `get_batch`, then `torch.rand(B, L) < t`, masked ids and labels.
* nanoGPT, no targets: without the shifted ids, for which masked prediction has no use.
* Grain: `MapDataset.source(windows).seed(0).shuffle().batch(B)`, then the same mask.
* Hugging Face: `DataCollatorForLanguageModeling` over windows picked by a random permutation.

Each of ours takes turns with each peer, one batch at a time, as a training loop calls: what a
batch needs is then in no near cache. `training` writes what `masked_nll` needs, in int32. The file
is in this process's map before, as after `validate_all`, which `train` begins with; `unmapped` is
without: each window is then a page fault or two, until the first epoch is over. (nanoGPT maps the
file anew for each batch.)

Opening: a corpus of 1e9 tokens in 100 files and its first shuffled batch, in a fresh process whose
imports are done.

    python benchmarks/bench_loader.py [--threads 2] [--json FILE]
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from measure import begin, in_fresh_process, make_parser, print_table, turns_ns, write_json
from torch import Tensor

from nar_kernels import MaskedLoader, MaskingConfig, TokenDataset

NUM_TOKENS, MASK_ID = 50258, 50257
BATCH, LENGTH = 64, 1024
_ROUNDS = 6
MASKING = MaskingConfig(NUM_TOKENS, MASK_ID)


def bernoulli(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Masked ids, labels and the mask of a batch, each window at a ratio of its own."""
    masked = torch.rand(ids.shape) < torch.rand(len(ids), 1)
    return torch.where(masked, MASK_ID, ids), torch.where(masked, ids, -100), masked


def nano_gpt(path: Path, with_targets: bool) -> Callable[[], object]:
    """`get_batch` of nanoGPT's train.py, and a mask."""

    def get_batch() -> object:
        data = np.memmap(path, dtype=np.uint16, mode="r")  # anew for each batch, against a leak
        ix = torch.randint(len(data) - LENGTH, (BATCH,))
        x = torch.stack([torch.from_numpy((data[i : i + LENGTH]).astype(np.int64)) for i in ix])
        if with_targets:
            torch.stack(
                [torch.from_numpy((data[i + 1 : i + 1 + LENGTH]).astype(np.int64)) for i in ix]
            )
        return bernoulli(x)

    return get_batch


class Windows:
    """Clean windows as a random-access source."""

    def __init__(self, path: Path) -> None:
        self._ids = np.memmap(path, dtype=np.uint16, mode="r")

    def __len__(self) -> int:
        return len(self._ids) // LENGTH

    def __getitem__(self, index: Any) -> np.ndarray:
        return self._ids[index * LENGTH : (index + 1) * LENGTH].astype(np.int64)


def grain_batches(path: Path) -> Callable[[], object]:
    from grain import MapDataset

    dataset = MapDataset.source(Windows(path)).seed(0).shuffle().batch(BATCH)
    steps = iter(range(len(dataset)))
    return lambda: bernoulli(torch.from_numpy(dataset[next(steps)]))


def hugging_face(path: Path) -> Callable[[], object]:
    from transformers import BertTokenizerFast, DataCollatorForLanguageModeling

    vocabulary = {f"t{i}": i for i in range(NUM_TOKENS)} | {"[MASK]": MASK_ID}
    tokenizer = BertTokenizerFast(vocab=vocabulary, pad_token="t0", mask_token="[MASK]")
    collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.5)
    windows = Windows(path)
    order: Iterator[int] = iter(torch.randperm(len(windows)).tolist())
    return lambda: collate([{"input_ids": windows[next(order)]} for _ in range(BATCH)])


def ours(path: Path, is_mapped: bool = True, **options: Any) -> Callable[[], object]:
    dataset = TokenDataset(path, LENGTH, num_tokens=NUM_TOKENS, mask_id=MASK_ID, dtype="uint16")
    if is_mapped:
        dataset.corpus.tokens.numpy().max()
    loader = MaskedLoader(dataset, MASKING, BATCH, **options)
    return lambda: next(loader)


def write_corpus(folder: Path, tokens: int, files: int) -> list[Path]:
    """Zipf-like ids."""
    rng = np.random.default_rng(0)
    paths = []
    for i in range(files):
        ids = rng.random(tokens // files, dtype=np.float32) ** 4 * MASK_ID
        paths.append(folder / f"{i:03}.bin")
        ids.astype(np.uint16).tofile(paths[-1])
    os.sync()  # or the system writes, on the same cores, while calls are timed
    return paths


def open_milliseconds(pattern: str) -> float:
    """From the paths to the first batch."""
    torch.set_num_threads(2)
    start = time.perf_counter()
    dataset = TokenDataset(pattern, LENGTH, num_tokens=NUM_TOKENS, mask_id=MASK_ID, dtype="uint16")
    next(MaskedLoader(dataset, MASKING, BATCH))
    return (time.perf_counter() - start) * 1e3


def main() -> None:
    parser = make_parser(__doc__, repeats=300)
    args = parser.parse_args()
    _, repeats, record = begin(parser, args, on_cpu=True)
    with tempfile.TemporaryDirectory() as folder:
        tokens = 2_000_000 if args.dry_run else 200_000_000
        (path,) = write_corpus(Path(folder), tokens, 1)
        peers = {
            "nanoGPT": nano_gpt(path, with_targets=True),
            "nanoGPT, no targets": nano_gpt(path, with_targets=False),
            "Hugging Face": hugging_face(path),
        }
        if find_spec("grain"):
            peers["Grain"] = grain_batches(path)
        else:
            print("without Grain: `pip install grain` adds it\n")
        kept = {"outputs": ("labels", "masked_rows"), "ids_dtype": torch.int32}
        mine = {
            "MaskedLoader": lambda: ours(path),
            "MaskedLoader, training": lambda: ours(path, **kept),
            "MaskedLoader, unmapped": lambda: ours(path, is_mapped=False),
        }
        np.memmap(path, dtype=np.uint16, mode="r").max()  # into the page cache
        # Pairs in turns, too, since the speed of machines changes; and a loader of its own for
        # each: one that has run has pages in its map.
        pairs = {(name, peer): make() for peer in peers for name, make in mine.items()}
        times: dict[Any, dict[str, list[int]]] = {
            pair: {name: [] for name in pair} for pair in pairs
        }
        for _ in range(_ROUNDS):
            for (name, peer), call in pairs.items():
                turns = turns_ns({name: call, peer: peers[peer]}, -(-repeats // _ROUNDS), warm_up=0)
                for who, more in turns.items():
                    times[name, peer][who] += more
        ns = {p: {who: median(t) for who, t in of.items()} for p, of in times.items()}
    with tempfile.TemporaryDirectory() as folder:
        tokens, files = (100_000, 4) if args.dry_run else (1_000_000_000, 100)
        write_corpus(Path(folder), tokens, files)
        opening = [in_fresh_process(open_milliseconds, f"{folder}/*.bin") for _ in range(3)]
    rows = [
        {
            "batches of": name,
            "beside": peer,
            "us": of_both[name] / 1e3,
            "us of the other": of_both[peer] / 1e3,
            "times as fast": of_both[peer] / of_both[name],
        }
        for (name, peer), of_both in ns.items()
    ]
    print_table(rows)
    print(f"opening {tokens:.0e} tokens in {files} files, and the first batch: ", end="")
    print(", ".join(f"{ms:.1f}" for ms in opening), "ms")
    write_json(args.json, record | {"rows": rows, "opening_ms": opening})


if __name__ == "__main__":
    main()
