"""`corrupt` by block and in two views, beside `corrupt` of whole rows and beside peers.

    python benchmarks/bench_blocks.py [--threads N] [--json FILE] [--dry-run]

64 x 1024 int64 ids, blocks of 32 unless said. Peers, on the same ids: NeMo's `corrupt_blockwise`
(exact counts, and positions late in a block are masked more often), `pip install --no-deps
nemo-automodel`; Turbo-dLLM's standard objective (Bernoulli draws) and that of Fast-dLLM v2 (the
mask and its complement), `pip install --no-deps turbo-dllm`. A token of two views is one of the
clean ids. Ours writes ids, labels, mask, row indices, and times, weights and counts of each block.

"kernel": without the arguments' checks, the memory's allocation and Python around them.

Functions take turns; medians. `--dry-run` is tiny; its figures are meaningless.
"""

import importlib
import statistics
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from bench_documents import kernel_of
from measure import begin, make_parser, print_table, turns_ns, write_json

from nar_kernels import MaskingConfig, corrupt

V, MASK = 50258, 50257
BLOCK = 32


def ours(ids: torch.Tensor) -> dict[str, Callable[[], object]]:
    steps = iter(range(1 << 30))

    def call(**options: Any) -> Callable[[], object]:
        views = options.pop("views", 1)
        masking, batch = MaskingConfig(V, MASK, **options), len(ids)

        def corrupted() -> object:
            first = next(steps) * batch
            slots = range(first, first + batch)
            return corrupt(ids, masking, seed=1, sample_ids=slots, views=views)

        return corrupted

    calls = {"rows": call(), "rows, bernoulli": call(draw="bernoulli")}
    for length in (4, 8, 16, BLOCK, 64, 128, 256):
        if length <= ids.shape[1]:
            calls[f"blocks of {length}"] = call(block_length=length)
    calls["bernoulli"] = call(block_length=BLOCK, draw="bernoulli")
    calls["two views"] = call(block_length=BLOCK, draw="bernoulli", views="complement")
    for name in ("rows", f"blocks of {BLOCK}"):
        calls[f"kernel: {name}"] = kernel_of(calls[name])
    return calls


def peers(ids: torch.Tensor) -> dict[str, tuple[Callable[[], object], str]]:
    """And which of ours does the same."""
    found: dict[str, tuple[Callable[[], object], str]] = {}
    if find_spec("nemo_automodel") is None:
        print("NeMo is not installed: pip install --no-deps nemo-automodel")
    else:
        nemo = importlib.import_module("nemo_automodel.components.datasets.dllm.corruption")
        supervised, generator = torch.ones_like(ids, dtype=torch.bool), torch.Generator()
        found["NeMo, blockwise"] = (
            lambda: nemo.corrupt_blockwise(ids, supervised, MASK, BLOCK, generator=generator),
            f"blocks of {BLOCK}",
        )
    if find_spec("dllm_parallel") is None:
        print("Turbo-dLLM is not installed: pip install --no-deps turbo-dllm")
        return found
    runtime = importlib.import_module("dllm_parallel.core.objectives.runtime")
    fast = importlib.import_module("dllm_parallel.core.objectives.fast_dllm_v2")
    batch, length = ids.shape
    how = {
        "mask_token_id": MASK,
        "block_size": BLOCK,
        "seq_len": length,
        "device": ids.device,
        "seed": 1,
        "token_accounting": runtime.TokenAccountingPolicy(batch, batch, 1, 1, 1, 1, 1, False),
    }
    standard = runtime.StandardBlockDiffusionObjectiveRuntime(**how)
    paired = fast.FastDLLMv2ObjectiveRuntime(**how)
    found["Turbo-dLLM, standard"] = lambda: standard.corrupt(ids), "bernoulli"
    found["Turbo-dLLM, Fast-dLLM v2"] = lambda: paired.corrupt(ids), "two views"
    return found


def main() -> None:
    parser = make_parser(__doc__, repeats=40)
    args = parser.parse_args()
    _, repeats, record = begin(parser, args, on_cpu=True)
    ids = torch.randint(0, MASK, (4, 128) if args.dry_run else (64, 1024))
    of_peers = peers(ids)
    calls = ours(ids) | {name: call for name, (call, _) in of_peers.items()}
    times = turns_ns(calls, repeats, warm_up=3, timed=5)
    per_token = {name: statistics.median(of) / ids.numel() for name, of in times.items()}
    rows: list[dict[str, Any]] = []
    for name, ns in per_token.items():
        beside = of_peers[name][1] if name in of_peers else "rows"
        if name.startswith("kernel"):
            beside = "kernel: rows"
        rows.append(
            {"what": name, "ns_per_token": ns, "beside": beside, "times": ns / per_token[beside]}
        )
    record["rows"] = rows
    print_table(rows)
    write_json(args.json, record)


if __name__ == "__main__":
    main()
