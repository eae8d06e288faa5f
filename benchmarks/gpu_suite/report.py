"""The summary table: each figure, its physical limit or peer, the ratio, and its prediction.

    python -m benchmarks.gpu_suite.report FOLDER

prints the summary of a results folder.
"""

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu_suite import outcomes
from benchmarks.gpu_suite.predictions import prediction
from benchmarks.gpu_suite.step import FINISHED, PASSED, SKIPPED


class Row(NamedTuple):
    what: str
    figure: float
    unit: str
    against: str
    its_figure: float | None
    ratio: float | None


HEAD = ("what", "figure", "unit", "limit or peer", "its figure", "ratio", "predicted")
# Peers that each benchmark compares with if installed, as named in its rows.
COMPARED = {
    "bench_corrupt_cuda": {"x-transformers"},
    "bench_corrupt_triton": {"x-transformers"},
    "bench_masked_nll": {"Liger", "CCE"},
    "bench_unmask": {"x-transformers"},
}


def corrupt(record: dict) -> Iterator[Row]:
    speeds = record["gigabytes_per_second"]
    for row in record["rows"]:
        what = f"corrupt, {row['backend']}: {row['what']}"
        if "share_of_copy" in row:
            figure = row["gigabytes_per_second"]
            yield Row(what, figure, "GB/s", "copy", speeds["copy"], row["share_of_copy"])
        elif "share_of_bus" in row:
            figure = row["gigabytes_per_second"]
            yield Row(what, figure, "GB/s", "copy over the bus", speeds["bus"], row["share_of_bus"])
        elif "times_x_transformers" in row:
            theirs = row["x_transformers_us"]
            yield Row(what, row["us"], "us", "x-transformers", theirs, row["times_x_transformers"])
        else:
            yield Row(what, row["host_us"], "us of the host", "", None, None)
            if "gpu_us" in row:
                yield Row(what, row["gpu_us"], "us in a graph", "", None, None)


def masked_nll(record: dict) -> Iterator[Row]:
    for setting in record["settings"]:
        what = f"masked_nll, V {setting['num_tokens']}, {setting['masked_rows']} rows"
        ours, *others = setting["rows"]
        if "ms" not in ours:
            continue
        for row in others:
            against = row["loss"] + (f" ({row['failed']})" if row["failed"] else "")
            if "ms" in row:
                yield Row(what, ours["ms"], "ms", against, row["ms"], row["ms"] / ours["ms"])
            if row.get("peak_bytes") and ours.get("peak_bytes"):
                mine, theirs = ours["peak_bytes"] / 1e6, row["peak_bytes"] / 1e6
                yield Row(what, mine, "MB", against, theirs, theirs / mine)


def nll(record: dict) -> Iterator[Row]:
    copy = record["copy_gigabytes_per_second"]
    for row in record["rows"]:
        what = f"nll: {row['what']}"
        if row["who"] == "nll_":
            figure, ours = row["gigabytes_per_second"], row["ns_per_logit"]
            yield Row(what, figure, "GB/s", "copy", copy, row["share_of_copy"])
        else:
            theirs, ratio = row["ns_per_logit"], row["times_ours"]
            yield Row(what, ours, "ns a logit", row["who"], theirs, ratio)


def choose(record: dict) -> Iterator[Row]:
    for setting in record["settings"]:
        of_strategy = itertools.groupby(setting["rows"], key=lambda row: row["strategy"])
        for strategy, (ours, *others) in of_strategy:
            what = f"choose, B {setting['batch']}, L {setting['length']}, {strategy}"
            for row in others:
                yield Row(what, ours["us"], "us", row["who"], row["us"], row["us"] / ours["us"])


def unmask(record: dict) -> Iterator[Row]:
    for setting in record["settings"]:
        copy = setting["copy_gigabytes_per_second"]
        for row in setting["rows"]:
            if row["who"] != "unmask":
                continue
            what = f"unmask, {row['backend']}: V {setting['num_tokens']}, {row['dtype']}, "
            what += f"filter {row['filter']}"
            rate = row["gigabytes_per_second"]
            yield Row(what, rate, "GB/s", "copy", copy, row["share_of_copy"])
            # Records from before there were two peers name one.
            peer, times = row.get("peer", "x-transformers"), row.get("times_peer")
            times = row.get("times_x_transformers", times)
            if times is not None:
                ns = row["ns_per_logit"]
                yield Row(what, ns, "ns a logit", peer, times * ns, times)


def calls(name: str, record: dict) -> Iterator[Row]:
    """Rows for whole calls: ours against the trunk (lower bound) and x-transformers."""
    for setting in record.get("settings", []):
        by_who = {(row["who"], row.get("what")): row for row in setting["rows"]}
        for (who, of), row in by_who.items():
            if not who.startswith("ours"):
                continue
            what = f"{name}, V {setting['num_tokens']}, {who}{f': {of}' if of else ''}"
            for other in ("trunk", "x-transformers"):
                theirs = by_who.get((other, of))
                if theirs is not None:
                    ratio = theirs["ms"] / row["ms"]
                    yield Row(what, row["ms"], "ms", other, theirs["ms"], ratio)
                    mine, its = row["peak_bytes"] / 1e6, theirs["peak_bytes"] / 1e6
                    if other != "trunk" and mine > 0:
                        yield Row(what, mine, "MB", other, its, its / mine)
        largest = {row["who"]: row["largest_batch"] for row in setting.get("largest_batches", [])}
        if {"ours", "x-transformers"} <= set(largest):
            mine, theirs = largest["ours"], largest["x-transformers"]
            what = f"{name}, largest batch"
            yield Row(what, mine, "sequences", "x-transformers", theirs, mine / max(theirs, 1))


READERS = {
    "bench_corrupt_cuda": corrupt,
    "bench_corrupt_triton": corrupt,
    "bench_masked_nll": masked_nll,
    "bench_nll": nll,
    "bench_unmask": unmask,
    "bench_choose": choose,
    "bench_train_step": lambda record: calls("train_step", record),
    "bench_generate": lambda record: calls("generate", record),
}


def rows(figures: dict[str, dict]) -> Iterator[Row]:
    for name, reader in READERS.items():
        try:
            yield from reader(figures[name]) if name in figures else ()
        except (KeyError, TypeError, ValueError) as error:  # other version, or incomplete
            yield Row(f"{name}: cannot be read ({error!r})", 0, "", "", None, None)


def skipped_peers(figures: dict[str, dict]) -> Iterator[str]:
    """Lines for peers without a figure in a benchmark that ran."""
    for name, peers in COMPARED.items():
        if name in figures:
            against = " ".join(row.against for row in rows({name: figures[name]}))
            missing = [peer for peer in sorted(peers) if peer not in against]
            yield from (
                f"{name}: skipped {peer}: not installed, or it failed (see the log)"
                for peer in missing
            )


def show(value: object) -> str:
    if not isinstance(value, float):
        return "" if value is None else str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def markdown(head: tuple[str, ...], lines: list[tuple[Any, ...]]) -> list[str]:
    table = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return table + ["| " + " | ".join(map(show, line)) + " |" for line in lines]


def figure_lines(figures: dict[str, dict], gpu: str | None) -> list[str]:
    """A table of all figures, with what is predicted of them; empty if there are none."""
    lines = [
        (*row, prediction(row.what, gpu) if row.against == "copy" else "") for row in rows(figures)
    ]
    return markdown(HEAD, lines) if lines else []


def remark(step: dict, gpu: str | None, sources: str | None) -> str:
    """Reason of a step's status, and a note if it is from other sources or another GPU."""
    text = step["reason"][:100].replace("|", "/")
    if step["sources"] != sources:
        text += f" (of other sources, {step['sources']})"
    if step["gpu"] != gpu and step["status"] in FINISHED:
        text += f" (on {step['gpu'] or 'no GPU'})"
    return text.strip()


def summary(results: dict) -> list[str]:
    """The summary in Markdown lines: machine, steps, failed tests, figures."""
    environment = results.get("environment") or {}
    packages = environment.get("packages", {})
    gpu, sources = environment.get("gpu"), results["calls"][-1].get("sources")
    versions = f"torch {packages.get('torch')}, Triton {packages.get('triton')}"
    lines = [
        f"{gpu or 'no GPU'}, {versions}, CUDA {environment.get('cuda')}, sources {sources}",
        "",
    ]
    steps = [
        (name, step["status"], f"{step.get('seconds', 0):.0f} s", remark(step, gpu, sources))
        for name, step in results["steps"].items()
    ]
    lines += [*markdown(("step", "status", "time", ""), steps), ""]
    for name, tests in results["tests"].items():
        lines.append(f"{name}: {outcomes.counts(tests)}")
        lines += [f"  FAILED {test}" for test, of in tests.items() if of["outcome"] == "failed"]
    missed = [name for name, state, *_ in steps if state not in (PASSED, SKIPPED)]
    lines += [f"not passed: {', '.join(missed) or 'none'}", ""]
    lines += figure_lines(results["figures"], gpu)
    return [*lines, *skipped_peers(results["figures"])]


def main() -> None:
    if len(sys.argv) != 2 or not Path(sys.argv[1], "results.json").exists():
        sys.exit("usage: python -m benchmarks.gpu_suite.report FOLDER, which the suite has written")
    print("\n".join(summary(json.loads(Path(sys.argv[1], "results.json").read_text()))))


if __name__ == "__main__":
    main()
