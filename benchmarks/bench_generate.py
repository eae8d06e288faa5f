"""Generation: x-transformers' `generate` against ours, on the same net, at its default arguments.

    python benchmarks/bench_generate.py [--device cuda] [--json FILE]
    python benchmarks/bench_generate.py --quality      # sample quality

"trunk" is the lower bound: as many forward passes of the net without its head. Peak memory of a
call excludes the parameters; for comparison, the report gives the size of the logits at the masked
positions of the first step, where they are largest. On a CPU, the matrix product with the head is
also compared with PyTorch's. (`bench_unmask.py` benchmarks sampling alone.)
`--dry-run` is tiny; its figures are meaningless.

`--quality` trains the net of `nar-kernels train --data digits` and samples images from it with
both, and with other strategies of ours. Metrics come from a classifier trained on the training
images only: its confidence in the digits; the Frechet distance between Gaussians of its hidden
features of samples and of held-out images; and the distance to the nearest held-out image, in the
same features.
"""

import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import (
    begin,
    in_fresh_process,
    in_this_process,
    make_parser,
    peak_bytes,
    peers_may_fail,
    print_table,
    show,
    turns_ns,
    write_json,
)
from peers import OURS, PEER, TRUNK, Setting, make_net
from torch import Tensor, nn
from x_transformers import nonautoregressive_wrapper as original

import nar_kernels
from nar_kernels.data.sources import open_data
from nar_kernels.ops.arguments import LinearArgs
from nar_kernels.ops.linear import LogitsMemory, run_linear
from nar_kernels.training.config import TrainConfig
from nar_kernels.training.train import Run

STEPS = 18
CPU = [Setting(257, 4, 256), Setting(8193, 4, 256), Setting(50258, 4, 128)]
CUDA = [Setting(50258, 16, 1024, dim=768, depth=12, heads=12, flash=True)]
TINY = Setting(33, 2, 16, dim=16, depth=1, heads=2)
# Minimum speed-up over x-transformers.
GOALS = dict(zip(CPU, (1.05, 5.0, 15.0), strict=True))


class Generation:
    """Generation with a net by one implementation (``who``)."""

    def __init__(self, who: str, setting: Setting, device: str) -> None:
        self.net = make_net(setting, device).eval()
        self.setting, self.who = setting, who
        shape = setting.batch, setting.length
        self.ids = torch.randint(0, setting.num_tokens - 1, shape, device=device)
        wrapper = {
            PEER: original.NonAutoregressiveWrapper,
            OURS: nar_kernels.NonAutoregressiveWrapper,
        }.get(who)
        self.wrapper = wrapper and wrapper(self.net, mask_id=setting.num_tokens - 1, steps=STEPS)

    @torch.no_grad()
    def __call__(self) -> None:
        if self.wrapper is not None:
            self.wrapper.generate(self.setting.batch)
            return
        for _ in range(STEPS):
            self.net(self.ids, return_embeddings=True)


def cpu_peak(who: str, setting: Setting, threads: int) -> int:
    """Peak memory of a call; run it in a fresh process."""
    torch.set_num_threads(threads)
    generation = Generation(who, setting, "cpu")
    generation.net(generation.ids[:1, :1])  # warm up: libraries allocate their memory
    return peak_bytes(generation, "cpu")


def compare(setting: Setting, device: str, repeats: int, where: Callable[..., Any]) -> list[dict]:
    """One row per implementation."""
    generations = {who: Generation(who, setting, device) for who in (TRUNK, PEER, OURS)}
    generations = peers_may_fail(generations, {PEER})
    turns = turns_ns(generations, repeats, warm_up=0, device=device)
    rows = []
    for who, generation in generations.items():
        if device == "cuda":
            peak = peak_bytes(generation, device)
        else:
            peak = where(cpu_peak, who, setting, torch.get_num_threads())
        row = {"who": who, "ms": statistics.median(turns[who]) / 1e6, "peak_bytes": peak}
        if PEER in turns:
            ratios = sorted(a / b for a, b in zip(turns[PEER], turns[who], strict=True))
            quartiles = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
            row["times_speed"] = statistics.median(ratios)
            row["times_speed_quartiles"] = quartiles
        rows.append(row)
    return rows


def report(setting: Setting, rows: list[dict]) -> None:
    masked = setting.batch * setting.length * setting.num_tokens * 4
    print(
        f"V {setting.num_tokens}, B {setting.batch}, L {setting.length}, {STEPS} steps; width "
        f"{setting.dim}, {setting.depth} layers; logits of all masked positions: "
        f"{masked / 1e6:.0f} MB\n"
    )
    print_table(
        [
            {
                "": row["who"],
                "ms": row["ms"],
                "times the speed of x-transformers": row.get("times_speed"),
                "quartiles": " to ".join(map(show, row.get("times_speed_quartiles", ()))),
                "goal": GOALS.get(setting) if row["who"] == OURS else None,
                "peak MB": row["peak_bytes"] / 1e6,
            }
            for row in rows
        ]
    )


def bench_product(num_tokens: int, dim: int, all_rows: list[int], repeats: int) -> list[dict]:
    """Product with the head (logits) in float32: PyTorch against the kernel of `generate`."""
    weight = torch.randn(num_tokens, dim)
    rows = []
    for num_rows in all_rows:
        hidden = torch.randn(num_rows, dim)
        logits = LogitsMemory().rows(num_rows, num_tokens, hidden)
        calls = {
            "torch.mm": partial(torch.mm, hidden, weight.t(), out=logits),
            "ours": partial(run_linear, LinearArgs(logits, hidden, weight, None)),
        }
        turns = turns_ns(calls, repeats, warm_up=1, device="cpu")
        ns = {who: statistics.median(times) for who, times in turns.items()}
        flops = 2 * num_rows * num_tokens * dim
        rows.append(
            {"rows": num_rows}
            | {f"{who}, GFLOP/s": flops / time for who, time in ns.items()}
            | {"times as fast": ns["torch.mm"] / ns["ours"]}
        )
    return rows


# Quality


class Classifier:
    """A small digit classifier; its hidden layer gives the features of the quality metrics."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        x, y = torch.tensor(images).float() / 16, torch.tensor(labels)
        optimizer = torch.optim.AdamW(self.net.parameters(), lr=3e-3, weight_decay=1e-2)
        for _ in range(400):
            noisy = x + 0.1 * torch.randn_like(x)
            nn.functional.cross_entropy(self.net(noisy), y).backward()
            optimizer.step()
            optimizer.zero_grad()

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        return self.net[:2](images.float() / 16).double()

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor:
        return self.net(images.float() / 16).softmax(-1)


def frechet(a: Tensor, b: Tensor) -> float:
    """Frechet distance between Gaussians fitted to the rows (Heusel et al. 2017)."""
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    eigenvalues = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0)
    squared = (a.mean(0) - b.mean(0)).square().sum()
    return (squared + cov_a.trace() + cov_b.trace() - 2 * eigenvalues.sqrt().sum()).item()


def quality(folder: Path, steps: int, num_images: int, num_seeds: int) -> list[dict]:
    from sklearn.datasets import load_digits

    config = TrainConfig.for_data(
        data="digits", out=str(folder), steps=steps, quiet=True, device="cpu"
    )
    run = Run(config, torch.device("cpu"))
    run.begin()
    run.fit()
    net = run.model.net.eval()
    data = open_data("digits")
    held_out = torch.stack([data.held_out[int(i)] for i in data.held_out_windows])
    digits = load_digits()
    number = len(digits.data) - len(held_out)
    classifier = Classifier(digits.data[:number], digits.target[:number])
    correct = classifier.probabilities(held_out).argmax(-1) == torch.tensor(digits.target[number:])
    print(f"the classifier is right on {correct.float().mean():.1%} of the held-out images\n")
    real = classifier.features(held_out)
    theirs = original.NonAutoregressiveWrapper(net, mask_id=17, schedule=original.linear_schedule)
    ours = nar_kernels.NonAutoregressiveWrapper(net, mask_id=17)
    samplers: dict[str, Callable[[int], Tensor]] = {
        "x-transformers, its defaults": lambda _: theirs.generate(num_images),
        "ours, the same arguments": lambda seed: ours.generate(num_images, seed=seed),
        "x-transformers, no filter": lambda _: theirs.generate(num_images, filter_thres=None),
        "ours, no filter": lambda seed: ours.generate(num_images, filter_thres=None, seed=seed),
        "ours, confidence with noise 4.5": lambda seed: ours.generate(
            num_images, filter_thres=None, choice_temperature=4.5, seed=seed
        ),
    }
    for strategy in ("random", "halton", "margin", "entropy", "threshold"):
        samplers[f"ours, {strategy}"] = lambda seed, strategy=strategy: ours.generate(
            num_images, filter_thres=None, strategy=strategy, seed=seed
        )
    rows = [{"sampler": "held-out images", **judge(classifier, real, held_out)}]
    for name, sampler in samplers.items():
        for seed in range(num_seeds):
            torch.manual_seed(seed)
            with torch.no_grad():
                images = sampler(seed)
            figures = judge(classifier, real, images.clamp(max=16))
            figures["share_of_mask_id"] = (images == 17).double().mean().item()
            rows.append({"sampler": name, "seed": seed, **figures})
    return rows


def judge(classifier: Classifier, real: Tensor, images: Tensor) -> dict[str, float]:
    features, probs = classifier.features(images), classifier.probabilities(images)
    share = probs.argmax(-1).bincount(minlength=10).double() / len(images)
    return {
        "frechet": frechet(features, real),
        "sure": (probs.max(-1).values > 0.9).double().mean().item(),
        "nearest": torch.cdist(features, real).min(1).values.mean().item(),
        "entropy_of_digits_bits": torch.special.entr(share).sum().item() / np.log(2),
    }


def report_quality(rows: list[dict]) -> None:
    names = list(dict.fromkeys(row["sampler"] for row in rows))
    columns = {
        "frechet": "Frechet",
        "sure": "classifier surer than 0.9",
        "nearest": "to the nearest",
        "entropy_of_digits_bits": "entropy of digits (bits)",
        "share_of_mask_id": "mask_id drawn",
    }
    table = []
    for name in names:
        own = [row for row in rows if row["sampler"] == name]
        line: dict[str, object] = {"sampler": name}
        for key, title in columns.items():
            values = [row[key] for row in own if key in row]
            line[title] = show(statistics.mean(values)) if values else None
            if len(values) > 1:
                line[title] = f"{line[title]} ± {show(statistics.stdev(values), 2)}"
        table.append(line)
    print_table(table)


def main() -> None:
    parser = make_parser(__doc__, repeats=5)
    parser.add_argument("--quality", action="store_true", help="instead, on the CPU")
    parser.add_argument("--steps", type=int, default=800, help="of training for --quality")
    parser.add_argument("--seeds", type=int, default=3, help="of --quality")
    parser.add_argument("--folder", type=Path, default=Path("runs/quality"), help="of --quality")
    args = parser.parse_args()
    dry = args.dry_run
    device, repeats, record = begin(parser, args, on_cpu=args.quality)
    if args.quality:
        steps, images, seeds = (2, 8, 2) if dry else (args.steps, 500, args.seeds)
        record["quality"] = quality(args.folder, steps, images, seeds)
        report_quality(record["quality"])
        write_json(args.json, record)
        return
    where = in_fresh_process if args.device == "cpu" else in_this_process
    for setting in [TINY] if dry else CUDA if device == "cuda" else CPU:
        rows = compare(setting, device, repeats, where)
        record.setdefault("settings", []).append({**setting._asdict(), "rows": rows})
        report(setting, rows)
        write_json(args.json, record)  # after each setting: the next may crash or hang
    if device == "cuda":
        return
    heads = [(33, 16)] if dry else [(257, 256), (8193, 256), (50258, 256), (30522, 768)]
    for num_tokens, dim in heads:
        rows = bench_product(num_tokens, dim, [1, 24] if dry else [1, 24, 96, 256, 512], repeats)
        record.setdefault("product", []).append(
            {"num_tokens": num_tokens, "dim": dim, "rows": rows}
        )
        print(f"product with the head: V {num_tokens}, width {dim}\n")
        print_table(rows)
        write_json(args.json, record)


if __name__ == "__main__":
    main()
