"""Fused linear cross-entropy at masked positions: `masked_nll` against common implementations, in
the same process.

All get the same hidden states, head and batch, and compute the likelihood bound
`sum(loss_weight * nll) / num_maskable` and the gradients of hidden states and head:

* naive, all positions: logits [B, L, V], `F.cross_entropy` in float32 with ignored labels;
* naive, masked rows: `index_select`, then the same;
* torch: `F.linear_cross_entropy` (2.13), chunked, at the masked rows;
* Liger, CCE: on CUDA, if installed, at the masked rows. CCE filters small gradients by default;
  "all gradients" is without that filter.

Each is checked against loss and gradients in float64, and the table marks wrong ones; if
`masked_nll` is wrong, the script fails.
"products alone" is the limit: only the three matrix products at the masked rows.

    python benchmarks/bench_masked_nll.py [--device cuda] [--threads 2] [--json FILE] [--dry-run]

`--dry-run` is tiny and on the CPU. Its figures are meaningless.
"""

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from measure import (
    begin,
    in_fresh_process,
    in_this_process,
    make_parser,
    median_ns,
    peak_bytes,
    print_table,
    synchronize,
    write_json,
)
from torch import Tensor

from nar_kernels import Corrupted, MaskingConfig, corrupt


class Setting(NamedTuple):
    """V, B, L, D, and the dtype of hidden states and head."""

    num_tokens: int
    batch: int
    length: int
    dim: int
    dtype: str


class Batch(NamedTuple):
    hidden: Tensor  # [B, L, D]
    weight: Tensor  # [V, D]
    corrupted: Corrupted

    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states, labels and loss weights at the masked positions."""
        rows = self.corrupted.masked_rows
        return (
            self.hidden.flatten(0, 1).index_select(0, rows),
            self.corrupted.labels.flatten().index_select(0, rows),
            self.corrupted.loss_weight.index_select(0, rows // self.hidden.shape[1]),
        )

    def reduced(self, weighted: Tensor) -> Tensor:
        return weighted.sum() / self.corrupted.num_maskable.sum()


Loss = Callable[[Batch], Tensor]

CPU = [
    Setting(*shape, 256, dtype)
    for dtype in ("float32", "bfloat16")
    for shape in ((257, 16, 256), (8193, 16, 256), (50258, 8, 128))
]
CUDA = [Setting(50258, 32, 1024, 768, "bfloat16"), Setting(128256, 8, 1024, 768, "bfloat16")]
TINY = [Setting(33, 2, 16, 8, dtype) for dtype in ("float32", "bfloat16")]
# Relative error (norm) of the loss and of each gradient against float64. One bfloat16 rounding
# costs 0.004; a bug such as an ignored loss weight, or a missing label term, costs about 1.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
OURS, PRODUCTS = "masked_nll", "products alone"


def make_batch(setting: Setting, device: str) -> Batch:
    vocabulary, batch, length, dim, dtype = setting
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary - 1, (batch, length), generator=generator)
    hidden = torch.randn(batch, length, dim, generator=generator)
    weight = torch.randn(vocabulary, dim, generator=generator) / dim**0.5
    hidden, weight = (
        x.to(device, getattr(torch, dtype)).requires_grad_() for x in (hidden, weight)
    )
    masking = MaskingConfig(vocabulary, vocabulary - 1)
    return Batch(hidden, weight, corrupt(ids.to(device), masking, seed=1))


def ours(batch: Batch) -> Tensor:
    from nar_kernels import masked_nll

    return masked_nll(batch.hidden, batch.weight, batch.corrupted)


def naive_everywhere(batch: Batch) -> Tensor:
    logits = F.linear(batch.hidden, batch.weight).float()
    labels = batch.corrupted.labels
    nll = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return batch.reduced(batch.corrupted.loss_weight[:, None] * nll.view_as(labels))


def naive_rows(batch: Batch) -> Tensor:
    hidden, labels, weights = batch.rows()
    logits = F.linear(hidden, batch.weight).float()
    return batch.reduced(weights * F.cross_entropy(logits, labels, reduction="none"))


def torch_rows(batch: Batch) -> Tensor:
    hidden, labels, weights = batch.rows()
    options = torch.nn.LinearCrossEntropyOptions()
    nll = F.linear_cross_entropy(hidden, batch.weight, labels, reduction="none", options=options)
    return batch.reduced(weights * nll)


def liger(batch: Batch) -> Tensor:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    hidden, labels, weights = batch.rows()
    # No bias, no class weights, ignored label, z-loss, smoothing, reduction.
    nll = LigerFusedLinearCrossEntropyFunction.apply(
        hidden, batch.weight, labels, None, None, -100, 0.0, 0.0, "none"
    )
    return batch.reduced(weights * (nll[0] if isinstance(nll, tuple) else nll))


def cce(batch: Batch, **options: None) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    hidden, labels, weights = batch.rows()
    nll = linear_cross_entropy(hidden, batch.weight, labels, reduction="none", **options)
    return batch.reduced(weights * nll)


def losses(device: str) -> dict[str, Loss]:
    """The implementations available here, by name."""
    found: dict[str, Loss] = {
        OURS: ours,
        "naive, all positions": naive_everywhere,
        "naive, masked rows": naive_rows,
    }
    if hasattr(F, "linear_cross_entropy"):
        found["torch, masked rows"] = torch_rows
    if device == "cuda" and importlib.util.find_spec("liger_kernel"):
        found["Liger, masked rows"] = liger
    if device == "cuda" and importlib.util.find_spec("cut_cross_entropy"):
        found["CCE, masked rows"] = cce
        found["CCE, all gradients"] = lambda batch: cce(batch, filter_eps=None)
    return found


def forward_backward(loss: Loss, batch: Batch) -> Tensor:
    batch.hidden.grad = batch.weight.grad = None
    value = loss(batch)
    value.backward()
    return value.detach()


def truth(batch: Batch) -> list[Tensor]:
    """Reference: loss and gradients of hidden states and head in float64, chunked over rows."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (batch.hidden, batch.weight))
    rows = batch.corrupted.masked_rows
    total = torch.zeros((), dtype=torch.float64, device=rows.device)
    for some in rows.split(max((1 << 25) // len(weight), 1)):
        nll = F.cross_entropy(
            F.linear(hidden.flatten(0, 1)[some], weight),
            batch.corrupted.labels.flatten()[some],
            reduction="none",
        )
        part = batch.reduced(batch.corrupted.loss_weight[some // hidden.shape[1]] * nll)
        part.backward()
        total += part.detach()
    return [total, hidden.grad, weight.grad]


def errors(loss: Loss, batch: Batch, true: list[Tensor]) -> list[float]:
    """Relative errors (norms) of the loss and both gradients against ``true``."""
    got = [forward_backward(loss, batch), batch.hidden.grad, batch.weight.grad]
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, true, strict=True)]


def products(batch: Batch) -> Callable[[], None]:
    hidden, weight = batch.rows()[0].detach(), batch.weight.detach()
    logits = torch.mm(hidden, weight.T)
    of_hidden, of_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def run() -> None:
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(logits, weight, out=of_hidden)
        torch.mm(logits.T, hidden, out=of_weight)

    return run


def cpu_peak_bytes(setting: Setting, name: str, threads: int) -> int:
    """Peak memory of forward and backward; run it in a fresh process."""
    torch.set_num_threads(threads)
    loss = losses("cpu")[name]
    # Warm up at a tiny size: starts threads and libraries without allocating for the real one.
    forward_backward(loss, make_batch(TINY[0]._replace(dtype=setting.dtype), "cpu"))
    batch = make_batch(setting, "cpu")
    return peak_bytes(lambda: forward_backward(loss, batch))


def compare(
    setting: Setting, device: str, repeats: int, threads: int, where: Callable[..., Any]
) -> dict:
    """One row per implementation, ours first; ``failed`` is the error, "WRONG", or None."""
    batch = make_batch(setting, device)
    true, rows = truth(batch), []
    for name, loss in losses(device).items():
        row = {"loss": name, "failed": None}
        try:
            row["errors"] = errors(loss, batch, true)
            if not all(error <= TOLERANCE[setting.dtype] for error in row["errors"]):  # also NaN
                row["failed"] = "WRONG"
        except Exception as error:  # keep the figures of the others
            row["failed"] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        batch.hidden.grad = batch.weight.grad = None
        rows.append(row)
    del true

    can_run = {row["loss"]: losses(device)[row["loss"]] for row in rows if "errors" in row}
    calls = {n: lambda loss=loss: forward_backward(loss, batch) for n, loss in can_run.items()}
    ns = median_ns({**calls, PRODUCTS: products(batch)}, repeats, device=device)
    batch.hidden.grad = batch.weight.grad = None
    synchronize(device)
    for row in rows:
        if (name := row["loss"]) not in can_run:
            continue
        row["ms"] = ns[name] / 1e6
        if device == "cuda":
            batch.hidden.grad = batch.weight.grad = None
            row["peak_bytes"] = peak_bytes(calls[name], device)
        else:
            row["peak_bytes"] = where(cpu_peak_bytes, setting, name, threads)
    vocabulary, samples, length, dim, _ = setting
    num_rows = int(batch.corrupted.num_masked.sum())
    return {
        **setting._asdict(),
        "masked_rows": num_rows,
        "flops": 3 * 2 * num_rows * vocabulary * dim,
        "bytes_of_all_logits": samples * length * vocabulary * 4,
        "bytes_of_gradients": batch.hidden.nbytes + batch.weight.nbytes,
        "rows": [*rows, {"loss": PRODUCTS, "failed": None, "ms": ns[PRODUCTS] / 1e6}],
    }


def report(result: dict) -> None:
    ours, limit = result["rows"][0], result["rows"][-1]
    print(
        f"V {result['num_tokens']}, B {result['batch']}, L {result['length']}, D {result['dim']}, "
        f"{result['dtype']}: R = {result['masked_rows']} of {result['batch'] * result['length']} "
        f"rows are masked.\n3 products x 2 R V D = {result['flops'] / 1e9:.3g} GFLOP; float32 "
        f"logits [B, L, V] would be {result['bytes_of_all_logits'] / 1e6:.4g} MB; the gradients, "
        f"in every peak, are {result['bytes_of_gradients'] / 1e6:.4g} MB.\n"
    )
    table = []
    for row in result["rows"]:
        ms, peak = row.get("ms"), row.get("peak_bytes")
        loss, hidden, weight = row.get("errors", (None, None, None))
        table.append(
            {
                "loss": row["loss"],
                "ms": ms,
                "times ours": ms and ours.get("ms") and ms / ours["ms"],
                "GFLOP/s": ms and result["flops"] / ms / 1e6,
                "of the limit": ms and limit["ms"] / ms,
                "peak MB": peak and peak / 1e6,
                "peak, times ours": peak and ours.get("peak_bytes") and peak / ours["peak_bytes"],
                "error of loss": loss,
                "of d hidden": hidden,
                "of d weight": weight,
                "": row["failed"],
            }
        )
    print_table(table)


def main() -> None:
    parser = make_parser(__doc__, repeats=7)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="only these, on the CPU")
    args = parser.parse_args()
    device, repeats, record = begin(parser, args)
    record["settings"] = []
    print("forward and backward, medians of calls in turn\n")
    where = in_fresh_process if args.device == "cpu" else in_this_process
    cpu = [setting for setting in CPU if args.dtype in (None, setting.dtype)]
    for setting in TINY if args.dry_run else CUDA if device == "cuda" else cpu:
        record["settings"].append(compare(setting, device, repeats, record["threads"], where))
        report(record["settings"][-1])
        write_json(args.json, record)  # after each setting: the next may crash or hang
    failed = [row["loss"] for s in record["settings"] for row in s["rows"] if row["failed"]]
    if failed:
        # Only a fault of ours fails the script; a peer's is in the table.
        status = int(OURS in failed)
        parser.exit(status, f"wrong or failed: {', '.join(failed)}\n")


if __name__ == "__main__":
    main()
