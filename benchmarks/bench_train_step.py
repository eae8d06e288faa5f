"""A training step: x-transformers' `NonAutoregressiveWrapper` against ours, in the same process.

Both get the same net, weights and clean ids, and run at their own default arguments. A step is
forward, backward, `clip_grad_norm_`, AdamW (theirs with PyTorch's defaults, ours with `fused=True`)
and `zero_grad`. "trunk" is the lower bound: forward and backward of the net without its head, from
a random gradient of the hidden states.

    python benchmarks/bench_train_step.py [--device cuda] [--compile] [--flash] [--json FILE]
    python benchmarks/bench_train_step.py --profile FILE.png   # time breakdown of both steps
    python benchmarks/bench_train_step.py --quality digits     # fused against unfused training

Peak memory of a call excludes parameters and optimiser state. On CUDA the net has 12 layers of
width 768 and runs in bf16 autocast, and the largest batch that fits is searched for. `--dry-run` is
tiny and on the CPU. Its figures are meaningless.
"""

import bisect
import gc
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measure import (
    begin,
    draw_bars,
    in_fresh_process,
    in_this_process,
    make_parser,
    peak_bytes,
    peers_may_fail,
    print_table,
    show,
    synchronize,
    turns_ns,
    write_json,
)
from peers import COMPILED, OURS, PEER, TRUNK, Setting, Training
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from nar_kernels import Corrupted, MaskedLoader
from nar_kernels.data.opened import BUILT_IN
from nar_kernels.data.sources import Data, open_data
from nar_kernels.likelihood import evaluate
from nar_kernels.training.config import TrainConfig
from nar_kernels.training.model import build_model
from nar_kernels.training.optim import adamw, learning_rate

CPU = [Setting(257, 16, 256), Setting(8193, 16, 256), Setting(50258, 8, 128)]
CUDA = [Setting(50258, 16, 1024, dim=768, depth=12, heads=12, flash=True)]
TINY = Setting(33, 2, 16, dim=16, depth=1, heads=2)
PROFILED = CPU[1]
# Minimum speed-up, and maximum fraction of the memory, relative to x-transformers.
GOALS = dict(zip(CPU, ((1.05, 1.0), (1.9, 0.5), (2.4, 0.35)), strict=True))
LARGEST_DRY_RUN = 5


def peaks(training: Training) -> dict[str, int]:
    list(training.calls().values())[-1]()  # allocate the optimiser state
    return {what: peak_bytes(call, training.device) for what, call in training.calls().items()}


def cpu_peaks(who: str, setting: Setting, threads: int) -> dict[str, int]:
    """Peak memory of each call; run it in a fresh process."""
    torch.set_num_threads(threads)
    return peaks(Training(who, setting, "cpu"))


def compare(
    setting: Setting, device: str, repeats: int, compiled: bool, where: Callable[..., Any]
) -> list[dict]:
    """One row per wrapper and call."""
    trainings = {
        who: Training(who, setting, device)
        for who in (TRUNK, PEER, OURS, *([COMPILED] if compiled else []))
    }
    calls = {
        (who, what): call
        for who, training in trainings.items()
        for what, call in training.calls().items()
    }
    calls = peers_may_fail(calls, {of_call for of_call in calls if of_call[0] == PEER})
    # Ratios per turn: on a shared machine, speed drifts by 10 % between minutes.
    turns = turns_ns(calls, repeats, warm_up=0, device=device)
    ns = {of_call: statistics.median(times) for of_call, times in turns.items()}
    rows = {}
    for who, training in trainings.items():
        if device == "cuda":
            peak = peaks(training)
        else:
            peak = where(cpu_peaks, who, setting, torch.get_num_threads())
        for what in training.calls():
            if (who, what) not in turns:
                continue
            theirs = rows.get((PEER, what))
            row = rows[who, what] = {
                "who": who,
                "what": what,
                "ms": ns[who, what] / 1e6,
                "tokens_per_second": training.ids.numel() / ns[who, what] * 1e9,
                "peak_bytes": peak[what],
            }
            if theirs is not None:
                pairs = zip(turns[PEER, what], turns[who, what], strict=True)
                ratios = sorted(their_ns / our_ns for their_ns, our_ns in pairs)
                row["times_speed"] = statistics.median(ratios)
                row["times_speed_quartiles"] = (
                    ratios[len(ratios) // 4],
                    ratios[-1 - len(ratios) // 4],
                )
                row["share_of_memory"] = row["peak_bytes"] / theirs["peak_bytes"]
    if trainings[OURS].makes_all_logits():
        print("note: our wrapper makes logits at all positions, so its loss is not fused")
    return list(rows.values())


def report(setting: Setting, rows: list[dict]) -> None:
    speed_goal, memory_goal = GOALS.get(setting._replace(flash=False), (None, None))
    print(
        f"V {setting.num_tokens}, B {setting.batch}, L {setting.length}; width {setting.dim}, "
        f"{setting.depth} layers, {setting.heads} heads"
        + (", flash attention" if setting.flash else "")
        + "\n"
    )
    table = []
    for row in rows:
        is_ours = row["who"] in (OURS, COMPILED)
        table.append(
            {
                "": f"{row['who']}: {row['what']}",
                "ms": row["ms"],
                "tokens/s": row["tokens_per_second"],
                "peak MB": row["peak_bytes"] / 1e6,
                "times the speed of x-transformers": row.get("times_speed"),
                "quartiles": " to ".join(map(show, row.get("times_speed_quartiles", ()))),
                "goal: at least": speed_goal if is_ours else None,
                "share of its memory": row.get("share_of_memory"),
                "goal: at most": memory_goal if is_ours else None,
            }
        )
    print_table(table)


def free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def largest_batch(who: str, setting: Setting, device: str) -> dict:
    """Doubles, then bisects, to within 1/16; ``stopped_by`` is the last error message."""
    free(device)
    training = Training(who, setting, device)
    stopped_by = None

    def fits(batch: int) -> bool:
        nonlocal stopped_by
        try:
            if device == "cpu" and batch > LARGEST_DRY_RUN:
                raise torch.OutOfMemoryError("as if")
            training.draw(batch)
            training.step()
            synchronize(device)
            return True
        except RuntimeError as error:  # OOM, or kernels with 32-bit indexing
            stopped_by = f"{type(error).__name__}: {str(error).partition('.')[0]}"
        training.net.zero_grad()
        free(device)
        return False

    good, bad = 0, 1
    while fits(bad):
        good, bad = bad, 2 * bad
    while bad - good > max(good // 16, 1):
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return {"who": who, "largest_batch": good, "stopped_by": stopped_by}


# ---- --profile

KINDS = {
    "trunk: matrix products": "#9db4d0",
    "trunk: norms, softmax, GELU, rest": "#dbe3ed",
    "embedding": "#66717e",
    "masking": "#f6b957",
    "head: matrix products": "#1d2733",
    "head: softmax and loss": "#d1495b",
    "clipping and AdamW": "#b9a88f",
}
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "matmul", "linear"}
MARKS = {"forward": "masking", "net": "trunk", "backward": "backward", "optimizer": "optimizer"}


def kind(name: str, shapes: list, phase: str, vocabulary: int) -> str:
    """The category in ``KINDS`` of an operator that started in ``phase`` of a step."""
    of_head = any(vocabulary in shape for shape in shapes if isinstance(shape, (list, tuple)))
    if phase == "optimizer":
        return "clipping and AdamW"
    if "embedding" in name.lower():
        return "embedding"
    if name.removeprefix("aten::").rstrip("_") in PRODUCTS:
        return f"{'head' if of_head else 'trunk'}: matrix products"
    if phase == "masking":
        return "masking"
    if phase == "loss" or of_head:
        return "head: softmax and loss"
    return "trunk: norms, softmax, GELU, rest"


def profile_step(training: Training) -> dict[str, float]:
    """Milliseconds of one step by category of operator."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        training.step()
    events = profiled.events()
    # Start times of the phases: masking precedes the net, the loss follows it.
    begins = [(e.time_range.start, MARKS[e.name]) for e in events if e.name in MARKS]
    begins = sorted(begins + [(e.time_range.end, "loss") for e in events if e.name == "net"])
    milliseconds = dict.fromkeys(KINDS, 0.0)
    for event in events:
        now = bisect.bisect(begins, event.time_range.start, key=lambda begin: begin[0])
        # Self time of a mark is Python between operators.
        phase = begins[max(now, 1) - 1][1] if event.name not in MARKS else "trunk"
        of_kind = kind(event.name, event.input_shapes, phase, training.setting.num_tokens)
        milliseconds[of_kind] += event.self_cpu_time_total / 1e3
    return milliseconds


def profile_steps(setting: Setting, repeats: int) -> dict[str, dict[str, float]]:
    """The median step of each wrapper, measured in turns."""
    trainings = [Training(who, setting, "cpu") for who in (PEER, OURS)]
    steps: dict[str, list[dict[str, float]]] = {PEER: [], OURS: []}
    for training in trainings:
        training.net.forward = record_function("net")(training.net.forward)
        training.step()
    for _ in range(repeats):
        for training in trainings:
            steps[training.who].append(profile_step(training))
    return {
        who: sorted(some, key=lambda step: sum(step.values()))[len(some) // 2]
        for who, some in steps.items()
    }


# ---- --quality


def unfused(net: nn.Module, batch: Corrupted) -> Tensor:
    """The likelihood bound from logits at all positions."""
    logits = net(batch.input_ids).flatten(0, 1)
    nll = F.cross_entropy(logits, batch.labels.flatten(), reduction="none")
    weighted = batch.loss_weight[:, None] * nll.view_as(batch.labels)
    return weighted.sum() / batch.num_maskable.sum()


def held_out_bits(config: TrainConfig, data: Data, fused: bool) -> float:
    """Bits per held-out token after training; weights and batches are determined by the config."""
    torch.manual_seed(config.seed)
    model = build_model(config, data.spec)
    optimizer = adamw(model, config)
    loader = MaskedLoader(data.train, model.masking, config.batch_size, seed=config.seed)
    for step, batch in zip(range(config.steps), loader, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        loss = model(batch).loss if fused else unfused(model.net, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad()
    windows, device = data.held_out_windows, torch.device("cpu")
    result = evaluate(model.net, data.held_out, windows, draws=config.eval_draws, device=device)
    return result.bits_per_token


def quality(name: str, steps: int, seeds: int) -> list[dict]:
    rows = []
    for seed in range(seeds):
        config = TrainConfig.for_data(name, steps=steps, seed=seed, loss="nelbo")
        data = open_data(name, seq_len=config.seq_len, stride=config.stride)
        fused, plain = (held_out_bits(config, data, fused) for fused in (True, False))
        rows.append({"seed": seed, "fused": fused, "unfused": plain, "difference": fused - plain})
    return rows


def report_quality(name: str, steps: int, rows: list[dict]) -> None:
    print(f"{name}, {steps} steps: held-out bits per token\n")
    print_table([{key: show(value, 5) for key, value in row.items()} for row in rows])
    differences = torch.tensor([row["difference"] for row in rows])
    of_seeds = torch.tensor([row["unfused"] for row in rows])
    print(
        f"mean difference {differences.mean():+.5f}, standard deviation {differences.std():.5f}; "
        f"standard deviation over seeds {of_seeds.std():.5f}\n"
    )


def main() -> None:
    parser = make_parser(__doc__, repeats=7)
    parser.add_argument("--compile", action="store_true", help="also ours with net.compile()")
    parser.add_argument("--flash", action="store_true", help="flash attention for both, on the CPU")
    parser.add_argument("--profile", type=Path, metavar="FILE.png", help="instead, on the CPU")
    parser.add_argument("--quality", choices=BUILT_IN, help="instead, on the CPU")
    parser.add_argument("--steps", type=int, default=400, help="of --quality")
    parser.add_argument("--seeds", type=int, default=3, help="of --quality")
    args = parser.parse_args()
    other = args.profile or args.quality
    dry = args.dry_run
    steps = 2 if dry else args.steps
    device, repeats, record = begin(parser, args, on_cpu=bool(other))
    if args.profile:
        setting = TINY if dry else PROFILED
        record["profile_ms"] = bars = profile_steps(setting, repeats)
        print_table([{"ms": part, **{who: bars[who][part] for who in bars}} for part in KINDS])
        title = f"A training step: V = {setting.num_tokens}, {setting.batch} x {setting.length} "
        title += f"tokens, {record['device']}, {record['threads']} threads"
        draw_bars(args.profile, bars, KINDS, title, "ms")
    if args.quality:
        record["quality"] = quality(args.quality, steps, args.seeds)
        report_quality(args.quality, steps, record["quality"])
    where = in_fresh_process if args.device == "cpu" else in_this_process
    cpu = [setting._replace(flash=args.flash) for setting in CPU]
    for setting in [] if other else [TINY] if dry else CUDA if device == "cuda" else cpu:
        rows = compare(setting, device, repeats, args.compile, where)
        record.setdefault("settings", []).append({**setting._asdict(), "rows": rows})
        report(setting, rows)
        write_json(args.json, record)  # after each setting: the next may crash or hang
        if args.device == "cuda":
            largest = [largest_batch(who, setting, device) for who in (PEER, OURS)]
            record["settings"][-1]["largest_batches"] = largest
            print_table(largest)
    write_json(args.json, record)


if __name__ == "__main__":
    main()
