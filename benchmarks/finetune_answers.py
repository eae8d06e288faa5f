"""Fine-tuning on prompts and answers: bits per token of an answer, before and after.

    python benchmarks/finetune_answers.py [--init CHECKPOINT] [--steps N] [--json FILE] [--dry-run]

A model of the text in Python's standard library (`nar-kernels train --data text`, or --init) learns
to answer the name of a function with the first sentence of its docstring: prompts are given, whole
pairs are packed into rows. Held-out answers are judged with their prompts, before and after, and
without them, after.

`--dry-run` trains tiny models; its figures are meaningless.
"""

import importlib
import inspect
import json
import random
import re
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from measure import begin, make_parser, print_table, write_json

from nar_kernels import Corpus, TrainConfig, load_model
from nar_kernels.data.packing.document_range import DocumentRange
from nar_kernels.data.prepare import prepare
from nar_kernels.likelihood import evaluate_documents
from nar_kernels.train import train
from nar_kernels.training.model import net_options

HELD_OUT, DRAWS, SHOWN = 256, 8, 8
TINY = {"dim": 32, "depth": 1, "heads": 2, "steps": 20, "eval_every": 20, "save_every": 20}
# Modules that do something when they are imported, or need what may be missing.
LEFT_OUT = {"antigravity", "idlelib", "lib2to3", "test", "this", "tkinter", "turtle", "turtledemo"}


def pairs() -> list[tuple[str, str]]:
    """(name of a function or class, first sentence of its docstring), in a fixed order; each
    sentence once, so that no held-out answer has been learned."""
    found: dict[str, str] = {}
    seen: set[str] = set()

    def add(name: str, thing: object) -> None:
        text = (inspect.getdoc(thing) or "").strip()
        sentence = " ".join(re.split(r"(?<=[.!?])\s|\n\n", text)[0].split())
        if 10 < len(sentence) < 160 and len(name) < 60 and sentence.isascii():
            if name not in found and sentence not in seen:
                found[name] = sentence
                seen.add(sentence)

    for module_name in sorted(sys.stdlib_module_names - LEFT_OUT):
        if module_name.startswith("_"):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                module = importlib.import_module(module_name)
        except ImportError:  # of another system
            continue
        for name, thing in sorted(vars(module).items()):
            of_module = str(getattr(thing, "__module__", "")).partition(".")[0] == module_name
            if name.startswith("_") or not callable(thing) or not of_module:
                continue
            add(f"{module_name}.{name}", thing)
            for member, part in sorted(vars(thing).items()) if inspect.isclass(thing) else ():
                if not member.startswith("_") and callable(part):
                    add(f"{module_name}.{name}.{member}", part)
    listed = sorted(found.items())
    random.Random(0).shuffle(listed)
    return listed


def write(folder: Path, name: str, records: list[dict[str, str]]) -> Corpus:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    prepare(path, folder / name, tokenizer="bytes", workers=1, quiet=True)
    return Corpus(folder / name)


def judge(checkpoint: Path, corpus: Corpus, last: int) -> dict[str, float]:
    """Of the answers from document `last` on."""
    model, spec = load_model(checkpoint)
    assert corpus.document_ends is not None
    end = len(corpus.document_ends)
    held_out = DocumentRange(corpus, last, end, spec.seq_len, spec.num_tokens, spec.mask_id)
    result = evaluate_documents(model.net, held_out, draws=DRAWS, device=torch.device("cpu"))
    return {"bits_per_token": result.bits_per_token, "standard_error": result.standard_error}


def answers(checkpoint: Path, prompts: list[str]) -> list[str]:
    model, spec = load_model(checkpoint)
    given = [list(prompt.encode()) for prompt in prompts]
    ids = model.generate(
        prompt=given,
        max_new_tokens=96,
        eos_id=ord("\n"),
        strategy="confidence",
        block_length=16,
        steps=96,
        seed=0,
        filter_thres=None,
        start_temperature=0.0,
    )
    return [bytes(i for i in row if i < 256).decode(errors="replace") for row in ids.tolist()]


def main() -> None:
    parser = make_parser(__doc__, repeats=1)
    parser.add_argument("--init", type=Path, help="checkpoint of a run on `text`")
    parser.add_argument("--steps", type=int, default=1000)
    args = parser.parse_args()
    _, _, record = begin(parser, args, on_cpu=True)
    tiny = TINY if args.dry_run else {}
    listed = pairs()[: 100 if args.dry_run else None]
    held_out = len(listed) // 5 if args.dry_run else HELD_OUT
    first = len(listed) - held_out
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with_prompts = write(
            folder, "pairs", [{"prompt": f"{p}: ", "completion": f"{c}\n"} for p, c in listed]
        )
        alone = write(folder, "answers", [{"text": f"{c}\n"} for _, c in listed])
        init = args.init
        if init is None:
            out = folder / "text"
            train(TrainConfig.for_data("text", out=out, quiet=True, **tiny))
            init = out / "best.pt"
        options = net_options(init) | {"steps": args.steps, "held_out": held_out, "quiet": True}
        if args.dry_run:
            options |= {name: tiny[name] for name in ("steps", "eval_every", "save_every")}
        tuned = folder / "tuned"
        train(TrainConfig.for_data(folder / "pairs", init=init, out=tuned, **options))
        last = tuned / "last.pt"  # not the best, which the held-out answers choose
        rows = [
            {"model": "text", "given": "prompt", **judge(init, with_prompts, first)},
            {"model": "text", "given": "nothing", **judge(init, alone, first)},
            {"model": "tuned", "given": "prompt", **judge(last, with_prompts, first)},
            {"model": "tuned", "given": "nothing", **judge(last, alone, first)},
        ]
        prompts = [f"{p}: " for p, _ in listed[first : first + SHOWN]]
        shown = {"text": answers(init, prompts), "tuned": answers(last, prompts)}
    record |= {"pairs": len(listed), "held_out": held_out, "steps": options["steps"]}
    record |= {"rows": rows, "answers": shown, "written": [c for _, c in listed[first:][:SHOWN]]}
    print_table(rows)
    for of_text, of_tuned, (_, written) in zip(
        shown["text"], shown["tuned"], listed[first:], strict=False
    ):
        print(f"before:  {of_text!r}\nafter:   {of_tuned!r}\nwritten: {written!r}\n")
    write_json(args.json, record)


if __name__ == "__main__":
    main()
