"""Tokens a second of `nar-kernels prepare`, from JSON lines to files of ids, beside datatrove's
tokenizer pipeline with the same BPE, inputs and number of processes.

    python benchmarks/bench_prepare.py [--megabytes 64] [--workers 2] [--json FILE] [--dry-run]

The text is what Python's standard library has: its sources and the documentation of its language,
repeated with lines in another order. Both start their processes in each turn. tokenizers would run
a thread per core in each of datatrove's processes: it is measured with and without. `--dry-run` is
tiny; its figures are meaningless.
"""

import json
import os
import random
import shutil
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics

OURS, PEER, ONE_THREAD = "prepare", "datatrove", "datatrove, one thread each"
VOCAB_SIZE, EOS = 16384, "<|endoftext|>"
FILES_OF_WORKER = 4
TO_TRAIN_ON = 2000  # texts


def texts() -> Iterator[str]:
    """Endless."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(p for p in folder.rglob("*.py") if "site-packages" not in p.parts)
    sources = [path.read_text(encoding="utf-8", errors="replace") for path in paths]
    originals = [text for text in [*sources, *topics.values()] if text]
    draw = random.Random(0)
    draw.shuffle(originals)
    yield from originals
    while True:
        for text in originals:
            lines = text.splitlines(keepends=True)
            draw.shuffle(lines)
            yield "".join(lines)


def write_corpus(folder: Path, num_bytes: int, num_files: int) -> list[str]:
    """Returns some of its texts."""
    folder.mkdir()
    files = [(folder / f"{i:03d}.jsonl").open("w", encoding="utf-8") for i in range(num_files)]
    written, some = 0, []
    for i, text in enumerate(texts()):
        written += files[i % num_files].write(json.dumps({"text": text}) + "\n")
        some += [text] if i < TO_TRAIN_ON else []
        if written >= num_bytes:
            break
    for file in files:
        file.close()
    return some


def run_prepare(inputs: Path, tokenizer: Path, workers: int, out: Path) -> int:
    """Tokens written."""
    from nar_kernels.data.prepare import prepare

    made = prepare(inputs, out / "tokens", tokenizer=tokenizer, workers=workers, quiet=True)
    return made.total_tokens


def run_datatrove(
    inputs: Path, tokenizer: Path, workers: int, out: Path, threads: bool = True
) -> int:
    """Tokens written."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = str(threads).lower()
    LocalPipelineExecutor(
        pipeline=[
            JsonlReader(str(inputs)),
            DocumentTokenizer(
                str(out / "tokens"), str(tokenizer), eos_token=EOS, shuffle_documents=False
            ),
        ],
        tasks=workers,
        workers=workers,
        logging_dir=str(out / "logs"),
    ).run()
    return sum(path.stat().st_size for path in (out / "tokens").glob("*.ds")) // 2


def main() -> None:
    # Here, since datatrove's processes import this script: they need no PyTorch.
    from measure import begin, make_parser, print_table, write_json

    from nar_kernels.data.prepare.train_bpe import train_bpe

    parser = make_parser(__doc__, repeats=5)
    parser.add_argument("--megabytes", type=int, default=64, help="of JSON lines")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    args = parser.parse_args()
    _, repeats, record = begin(parser, args, on_cpu=True)
    num_bytes = (1 if args.dry_run else args.megabytes) * 1_000_000
    record |= {"bytes": num_bytes, "workers": args.workers, "vocab_size": VOCAB_SIZE}
    seconds: dict[str, list[float]] = {}
    tokens: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        inputs, file = folder / "inputs", folder / "tokenizer.json"
        some = write_corpus(inputs, num_bytes, FILES_OF_WORKER * args.workers)
        file.write_text(train_bpe(iter([some]), VOCAB_SIZE).to_json(), encoding="utf-8")
        runs = {
            OURS: partial(run_prepare, inputs, file, args.workers),
            PEER: partial(run_datatrove, inputs, file, args.workers),
            ONE_THREAD: partial(run_datatrove, inputs, file, args.workers, threads=False),
        }
        for _ in range(repeats):
            for who, run in runs.items():
                out = folder / "out"
                out.mkdir()
                began = time.perf_counter()
                tokens[who] = run(out)
                seconds.setdefault(who, []).append(time.perf_counter() - began)
                shutil.rmtree(out)
    assert len({*tokens.values()}) == 1, tokens
    # The faster of the two, turn by turn.
    peer = [min(pair) for pair in zip(seconds[PEER], seconds[ONE_THREAD], strict=True)]
    rows = [
        {
            "who": who,
            "seconds": statistics.median(own),
            "tokens_per_second": tokens[who] / statistics.median(own),
            "times_datatrove": statistics.median(
                theirs / mine for theirs, mine in zip(peer, own, strict=True)
            ),
        }
        for who, own in seconds.items()
    ]
    record |= {"tokens": tokens[OURS], "rows": rows}
    print_table(rows)
    write_json(args.json, record)


if __name__ == "__main__":
    main()
