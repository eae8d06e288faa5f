"""Fused sampling: `unmask` on rows of logits, without a filter, with the top-k filter of `generate`
(k = 0.3 V), with the nucleus p = 0.9, also after k = 0.3 V, and, on a GPU, with k = 50.

    python benchmarks/bench_unmask.py [--device cuda] [--json FILE] [--dry-run]

Each logit must be read at least once: bytes of logits over time are compared with copy bandwidth.
The peer is what x-transformers does with the same logits (filter, softmax, sample), or, for p, what
`generate` of transformers does (temperature, filters, softmax, sample), if installed.
On a CPU with one thread and with all; on a GPU with each backend that is there. `--dry-run` is
tiny; its figures are meaningless.
"""

import importlib.util
import itertools
import statistics
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from measure import (
    LOGIT_STD,
    TEMPERATURE,
    begin,
    copy_bytes_per_second,
    make_parser,
    print_table,
    turns_ns,
    write_json,
)
from torch import Tensor

from nar_kernels import backends, unmask

OURS, X_TRANSFORMERS, TRANSFORMERS = "unmask", "x-transformers", "transformers"
CPU = [(257, 4096), (50258, 64)]  # V, rows
CUDA = [(50258, 4096), (50304, 4096)]  # several times the cache; V unaligned, V a multiple of 16
TINY = [(33, 4)]
FILTERED, UNFILTERED, FEW = "0.3 V", "none", "50"
TOP_P, NUCLEUS, BOTH = 0.9, "p 0.9", "0.3 V, p 0.9"
GOALS = {(50258, "cpu"): 2.0}  # ns per logit in float32, one thread, with the filter


class Case(NamedTuple):
    who: str
    dtype: torch.dtype
    filter: str
    threads: int
    backend: str = "auto"


def x_transformers_draw(logits: Tensor) -> None:
    """What its `generate` does with the logits of a step, except for selecting positions."""
    from x_transformers import nonautoregressive_wrapper as original

    logits = logits[None]
    filtered = original.top_k(logits, 0.7)
    (filtered / TEMPERATURE).softmax(dim=-1)
    ids = original.gumbel_sample(filtered, temperature=TEMPERATURE)
    (1 - filtered.softmax(dim=-1)).gather(2, ids[..., None])


def transformers_draw(logits: Tensor, top_k: int | None) -> Callable[[], object]:
    """What its `generate` does with the logits of a step."""
    from transformers.generation import logits_process as original

    warpers = [original.TemperatureLogitsWarper(TEMPERATURE)]
    if top_k is not None:
        warpers.append(original.TopKLogitsWarper(top_k))
    warpers.append(original.TopPLogitsWarper(TOP_P))

    def draw() -> None:
        scores = logits
        for warper in warpers:
            scores = warper(None, scores)
        torch.multinomial(scores.softmax(dim=-1), num_samples=1)

    return draw


def draws(
    num_tokens: int, num_rows: int, device: str, threads: list[int], peers: list[str]
) -> dict[Case, Callable[[], object]]:
    generator = torch.Generator().manual_seed(0)
    made = LOGIT_STD * torch.randn(num_rows, num_tokens, generator=generator)
    slots = torch.arange(num_rows, device=device)
    options = dict(mask_id=num_tokens - 1, seed=0, noise_slots=slots, temperature=TEMPERATURE)

    def on(number: int, fn: Callable[[], object]) -> Callable[[], None]:
        def call() -> None:
            torch.set_num_threads(number)
            fn()

        return call

    on_gpu = [name for name in ("cuda", "triton") if backends()[name] == "available"]
    ours = on_gpu if device == "cuda" else ["auto"]
    top_k = -(-3 * num_tokens // 10)
    filters: dict[str, dict] = {FILTERED: {"top_k": top_k}, UNFILTERED: {}}
    if device == "cuda":
        filters[FEW] = {"top_k": 50}
    filters |= {NUCLEUS: {"top_p": TOP_P}, BOTH: {"top_k": top_k, "top_p": TOP_P}}
    calls = {}
    for number in threads:
        for dtype in (torch.float32, torch.bfloat16):
            logits = made.to(device, dtype)
            for (filter_, given), backend in itertools.product(filters.items(), ours):
                draw = partial(unmask, logits, **given, backend=backend, **options)
                calls[Case(OURS, dtype, filter_, number, backend)] = on(number, draw)
        logits = made.to(device)
        if X_TRANSFORMERS in peers:
            draw = partial(x_transformers_draw, logits)
            calls[Case(X_TRANSFORMERS, torch.float32, FILTERED, number)] = on(number, draw)
        if TRANSFORMERS in peers:
            for filter_ in (NUCLEUS, BOTH):
                their_draw = transformers_draw(logits, filters[filter_].get("top_k"))
                calls[Case(TRANSFORMERS, torch.float32, filter_, number)] = on(number, their_draw)
    return calls


def compare(num_tokens: int, num_rows: int, device: str, repeats: int, peers: list[str]) -> dict:
    """One row per case, with its ratio to the peer."""
    most = torch.get_num_threads()
    threads = sorted({1, most}) if device == "cpu" else [most]
    calls = draws(num_tokens, num_rows, device, threads, peers)
    for call in calls.values():
        call()
    turns = turns_ns(calls, repeats, warm_up=0, device=device)
    torch.set_num_threads(most)
    copied = {}
    for number in threads:
        torch.set_num_threads(number)
        copied[number] = copy_bytes_per_second(device)
    torch.set_num_threads(most)
    size = num_rows * num_tokens
    ns = {case: statistics.median(times) / size for case, times in turns.items()}
    rows = []
    for case in calls:
        read = case.dtype.itemsize / ns[case] * 1e9
        peer, of = X_TRANSFORMERS, FILTERED
        if case.filter in (NUCLEUS, BOTH):
            peer, of = TRANSFORMERS, case.filter
        theirs = ns.get(Case(peer, torch.float32, of, case.threads))
        has_goal = case == Case(OURS, torch.float32, FILTERED, 1)
        rows.append(
            {
                "who": case.who,
                "backend": case.backend,
                "dtype": str(case.dtype).removeprefix("torch."),
                "filter": case.filter,
                "threads": case.threads,
                "ns_per_logit": ns[case],
                "gigabytes_per_second": read / 1e9,
                "share_of_copy": read / copied[case.threads],
                "peer": peer,
                "times_peer": theirs and theirs / ns[case],
                "goal": GOALS.get((num_tokens, device)) if has_goal else None,
            }
        )
    return {
        "num_tokens": num_tokens,
        "num_rows": num_rows,
        "copy_gigabytes_per_second": copied[most] / 1e9,
        "rows": rows,
    }


def main() -> None:
    parser = make_parser(__doc__, repeats=15)
    args = parser.parse_args()
    device, repeats, record = begin(parser, args)
    record["settings"] = []
    peers = []
    for peer in (X_TRANSFORMERS, TRANSFORMERS):
        if importlib.util.find_spec(peer.replace("-", "_")) is not None:
            peers.append(peer)
        else:
            print(f"{peer} is not installed: no comparison with it\n")
    for num_tokens, num_rows in TINY if args.dry_run else CUDA if device == "cuda" else CPU:
        record["settings"].append(compare(num_tokens, num_rows, device, repeats, peers))
        print(f"V {num_tokens}, {num_rows} rows\n")
        print_table(record["settings"][-1]["rows"])
        write_json(args.json, record)  # after each setting: the next may crash or hang


if __name__ == "__main__":
    main()
