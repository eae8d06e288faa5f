"""`corrupt` of documents beside windows of their mean length, and of answers beside NeMo.

    python benchmarks/bench_documents.py [--threads N] [--json FILE] [--dry-run]

Documents: 65,536 ids, of lengths 128 to 384 with mean 256, or log-normal ones up to 1024; flat,
packed into rows of 1024, and padded; beside 256 windows of 256 ids of the same corpus (uint16).
`PackedLoader` also packs them, 4096 of 64 times as many at a time; the loss mask lies beside the
corpus.

Answers: 64 x 1024 int64 ids, a quarter of each row a prompt. NeMo (`pip install --no-deps
nemo-automodel`): `corrupt_uniform`, and the loop of its trainer, which has a generator for each
sample, so that a sample's mask does not depend on the world size; as ours never does. Ours writes
what theirs returns: ids, mask and, without memory, `p_mask`.

"kernel": without the arguments' checks, the memory's allocation and Python around them.

Functions take turns; medians. `--dry-run` is tiny; its figures are meaningless.
"""

import importlib
import statistics
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any
from unittest import mock

import numpy as np
import torch
from measure import begin, make_parser, print_table, turns_ns, write_json

from nar_kernels import Corpus, MaskingConfig, PackedLoader, corrupt
from nar_kernels.data.packing.pack import pack

corrupt_module = importlib.import_module("nar_kernels.ops.corrupt")  # `corrupt` is a function, too

V, MASK, EPS = 50258, 50257, 1e-3
MEAN, ROW = 256, 1024
EPOCH = 64  # batches of the loader's corpus


def draw_lengths(kind: str, total: int) -> torch.Tensor:
    rng, num = np.random.default_rng(0), total // MEAN
    if kind == "uniform":
        drawn = rng.integers(MEAN // 2, MEAN * 3 // 2 + 1, num)
    else:
        drawn = rng.lognormal(np.log(MEAN) - 0.5, 1, num).astype(np.int64).clip(1, ROW)
    return torch.from_numpy(drawn)


def kernel_of(call: Callable[[], object]) -> Callable[[], object]:
    """The kernel of a call of `corrupt` alone."""
    found = []
    run = corrupt_module.run_corrupt

    def note(arguments: Any, backend: str, memory: Any) -> Any:
        found.append((arguments, backend, run(arguments, backend, memory)))
        return found[-1][-1]

    with mock.patch.object(corrupt_module, "run_corrupt", note):
        call()
    ((arguments, backend, outputs),) = found
    return lambda: run(arguments, backend, outputs[:-1])


def documents(kind: str, total: int, repeats: int) -> list[dict[str, Any]]:
    masking = MaskingConfig(V, MASK)
    lengths = draw_lengths(kind, total)
    starts, count = lengths.cumsum(0) - lengths, int(lengths.sum())
    ids = torch.randint(0, MASK, (max(count, total),)).to(torch.uint16)
    num, slots = total // MEAN, torch.arange(len(lengths))
    packed = pack(lengths.numpy(), ROW)
    order = np.lexsort((packed.offsets, packed.rows))
    places = torch.from_numpy((packed.rows * ROW + packed.offsets)[order])
    chosen = torch.from_numpy(order)
    how: dict[str, Any] = {"seed": 1, "global_batch": len(lengths)}
    of = {"starts": starts, "lengths": lengths, "sample_ids": slots}
    in_rows = {name: values[chosen] for name, values in of.items()}
    in_rows |= {"places": places, "num_rows": packed.num_rows, "seq_len": ROW}
    many = lengths.repeat(EPOCH)
    corpus = Corpus(ids[:count].repeat(EPOCH).numpy())
    corpus.__dict__["document_ends"] = many.cumsum(0).numpy()
    loader = PackedLoader(corpus, ROW, masking, packed.num_rows, seed=1)
    per_batch = float(np.mean([loader.batch(s).lengths.sum() for s in range(8)]))
    steps = iter(range(1 << 30))
    window_starts = torch.arange(num) * MEAN
    flags = torch.randint(0, 2, ids.shape, dtype=torch.uint8)
    calls: dict[str, tuple[Callable[[], object], float]] = {
        "windows": (
            lambda: corrupt(ids, masking, starts=window_starts, seq_len=MEAN, **how),
            num * MEAN,
        ),
        "documents, flat": (lambda: corrupt(ids, masking, **how, **of), count),
        "documents, rows": (lambda: corrupt(ids, masking, **how, **in_rows), count),
        "documents, padded": (
            lambda: corrupt(ids, masking, seq_len=int(lengths.max()), **how, **of),
            count,
        ),
        "windows, loss mask": (
            lambda: corrupt(
                ids, masking, starts=window_starts, seq_len=MEAN, loss_mask=flags, **how
            ),
            num * MEAN,
        ),
        "documents, loss mask": (
            lambda: corrupt(ids, masking, loss_mask=flags, **how, **of),
            count,
        ),
        "PackedLoader": (lambda: loader.batch(next(steps)), per_batch),
    }
    for name in ("windows", "documents, flat", "documents, rows"):
        call, num_tokens = calls[name]
        calls[f"kernel: {name}"] = kernel_of(call), num_tokens
    times = turns_ns({name: call for name, (call, _) in calls.items()}, repeats, warm_up=3, timed=5)
    per_token = {name: statistics.median(times[name]) / n for name, (_, n) in calls.items()}
    rows = []
    for name, ns in per_token.items():
        base = per_token["kernel: windows" if "kernel" in name else "windows"]
        rows.append({"what": name, "ns_per_token": ns, "times_windows": ns / base})
    return rows


def answers(batch: int, length: int, repeats: int) -> list[dict[str, Any]]:
    ids = torch.randint(0, MASK, (batch, length))
    loss_mask = (torch.arange(length) >= length // 4).to(torch.uint8).expand(batch, -1).contiguous()
    masking = MaskingConfig(V, MASK, draw="bernoulli", time_range=(0, 1 - EPS), times="uniform")
    steps = iter(range(1 << 30))

    def ours() -> object:
        first = next(steps) * batch
        slots = range(first, first + batch)
        made = corrupt(
            ids, masking, seed=1, sample_ids=slots, loss_mask=loss_mask, outputs=("masked_indices",)
        )
        return made.input_ids, made.masked_indices, made.p_mask

    def everything() -> object:
        first = next(steps) * batch
        slots = range(first, first + batch)
        return corrupt(ids, masking, seed=1, sample_ids=slots, loss_mask=loss_mask)

    calls: dict[str, Callable[[], object]] = {"ours": ours, "ours, all outputs": everything}
    if find_spec("nemo_automodel") is None:
        print("NeMo is not installed: pip install --no-deps nemo-automodel")
    else:
        from nemo_automodel.components.datasets.dllm.corruption import corrupt_uniform

        generator = torch.Generator()

        def by_sample() -> object:
            parts = []
            first = next(steps) * batch
            for j in range(batch):
                of_sample = torch.Generator().manual_seed(first + j)
                here = slice(j, j + 1)
                parts.append(
                    corrupt_uniform(ids[here], loss_mask[here], MASK, EPS, generator=of_sample)
                )
            return tuple(torch.cat(part) for part in zip(*parts, strict=True))

        calls["NeMo"] = lambda: corrupt_uniform(ids, loss_mask, MASK, EPS, generator=generator)
        calls["NeMo, by sample"] = by_sample
    times = turns_ns(calls, repeats, warm_up=3, timed=5)
    per_token = {name: statistics.median(of) / ids.numel() for name, of in times.items()}
    return [
        {"what": name, "ns_per_token": ns, "times_ours": ns / per_token["ours"]}
        for name, ns in per_token.items()
    ]


def main() -> None:
    parser = make_parser(__doc__, repeats=40)
    args = parser.parse_args()
    _, repeats, record = begin(parser, args, on_cpu=True)
    total = 4096 if args.dry_run else 65536
    record["documents"] = []
    for kind in ("uniform", "log-normal"):
        rows = documents(kind, total, repeats)
        record["documents"].append({"lengths": kind, "rows": rows})
        print(f"documents of {kind} lengths\n")
        print_table(rows)
    size = (4, 128) if args.dry_run else (64, 1024)
    record["answers"] = answers(*size, repeats)
    print("answers\n")
    print_table(record["answers"])
    write_json(args.json, record)


if __name__ == "__main__":
    main()
