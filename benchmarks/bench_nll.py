"""The loss of rows of logits and its gradient in their place: `nll_`, which `masked_nll` runs on
each chunk of logits.

    python benchmarks/bench_nll.py [--device cuda] [--json FILE] [--dry-run]

Each logit must be read once, and its gradient written once: these bytes over time are compared with
copy bandwidth. The peer is `F.cross_entropy` in float32, forward and backward. `--dry-run` is tiny;
its figures are meaningless.
"""

import statistics
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from measure import (
    begin,
    copy_bytes_per_second,
    make_parser,
    peers_may_fail,
    print_table,
    turns_ns,
    write_json,
)
from torch import Tensor

from nar_kernels.ops.arguments import NllArgs
from nar_kernels.ops.backends import resolve_backend
from nar_kernels.ops.linear import LogitsMemory
from nar_kernels.ops.nll import NLL_DTYPES, run_nll


class Setting(NamedTuple):
    """V, rows, and what comes with the logits."""

    num_tokens: int
    num_rows: int
    dtype: torch.dtype = torch.bfloat16
    bias: bool = False
    gradient: bool = True

    def __str__(self) -> str:
        return (
            f"V {self.num_tokens}, {str(self.dtype).removeprefix('torch.')}"
            f"{', bias' if self.bias else ''}{'' if self.gradient else ', no gradient'}"
        )


CPU = [
    Setting(num_tokens, num_rows, dtype)
    for num_tokens, num_rows in ((257, 4096), (50258, 64))
    for dtype in (torch.float32, torch.bfloat16)
]
CUDA = [  # several times the cache
    Setting(50258, 8192),
    Setting(50258, 8192, torch.float32, bias=True),
    Setting(50304, 8192, bias=True),
    Setting(128256, 4096),
    Setting(257, 1 << 20),
    Setting(50258, 8192, gradient=False),
]
TINY = [Setting(33, 4), Setting(33, 4, bias=True, gradient=False)]
OURS, PEER = "nll_", "F.cross_entropy"


def make_args(setting: Setting, device: str) -> NllArgs:
    generator = torch.Generator().manual_seed(0)
    num_tokens, num_rows = setting.num_tokens, setting.num_rows
    like = torch.empty(0, dtype=setting.dtype, device=device)
    logits = LogitsMemory().rows(num_rows, num_tokens, like)
    logits.normal_()
    labels = torch.randint(num_tokens, (num_rows,), generator=generator).to(device)
    bias = torch.randn(num_tokens, generator=generator).to(device) if setting.bias else None
    weight = torch.ones(num_rows, device=device) if setting.gradient else None
    return NllArgs(logits, labels, bias, weight, setting.gradient)


def cross_entropy(logits: Tensor, a: NllArgs) -> None:
    logits = logits.detach().requires_grad_(a.gradient)
    wide = logits.float() if a.bias is None else logits.float() + a.bias
    total = F.cross_entropy(wide, a.labels, reduction="sum")
    if a.gradient:
        total.backward()


def compare(setting: Setting, device: str, repeats: int, copied: float) -> list[dict]:
    a = make_args(setting, device)
    # Its own logits, since ours overwrite theirs.
    theirs = a.logits.clone()
    calls: dict[str, Callable[[], object]] = {
        OURS: partial(run_nll, a, resolve_backend("auto", a.logits.device, tuple(NLL_DTYPES))),
        PEER: partial(cross_entropy, theirs, a),
    }
    calls = peers_may_fail(calls, {PEER})
    turns = turns_ns(calls, repeats, device=device)
    num_bytes = a.logits.numel() * a.logits.itemsize * (1 + setting.gradient)
    rows = []
    for who, times in turns.items():
        ns = statistics.median(times)
        rows.append(
            {
                "what": str(setting),
                "rows": setting.num_rows,
                "who": who,
                "ns_per_logit": ns / a.logits.numel(),
                "gigabytes_per_second": num_bytes / ns,
                "share_of_copy": num_bytes / ns * 1e9 / copied,
                "times_ours": ns / statistics.median(turns[OURS]),
            }
        )
    return rows


def main() -> None:
    parser = make_parser(__doc__, repeats=9)
    args = parser.parse_args()
    device, repeats, record = begin(parser, args)
    copied = copy_bytes_per_second(device)
    record |= {"copy_gigabytes_per_second": copied / 1e9, "rows": []}
    for setting in TINY if args.dry_run else CUDA if device == "cuda" else CPU:
        record["rows"] += compare(setting, device, repeats, copied)
        write_json(args.json, record)  # after each setting: the next may crash or hang
    print_table(record["rows"])


if __name__ == "__main__":
    main()
