"""Blocks of a block-causal net, with keys and values of finished blocks kept and without.

    python benchmarks/bench_cache.py [--device cuda] [--json FILE]

"whole sequence" calls the net for all L positions at each step, with a block-causal mask, as
without `block_length`; "up to the block" (`cache=False`) leaves out the blocks after the current
one; "cache" calls it for the positions of the block. All draw the same ids (temperature 0, at which
float32 hardly ever decides otherwise: the share of equal ids is printed). `--dry-run` is tiny; its
figures are meaningless.
"""

import statistics
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from measure import begin, make_parser, print_table, show, turns_ns, write_json
from torch import Tensor
from x_transformers import Encoder, TransformerWrapper

from nar_kernels import NonAutoregressiveWrapper, dense_block_mask

WHOLE, UP_TO, CACHE = "whole sequence", "up to the block", "cache"


class Setting(NamedTuple):
    num_tokens: int
    batch: int
    length: int
    block_length: int
    steps_per_block: int
    dim: int
    depth: int
    heads: int


SETTINGS = [Setting(8193, 1, 1024, 32, 4, 128, 4, 2)]
TINY = Setting(33, 2, 16, 4, 2, 32, 1, 2)
# Minimum speed-up over the whole sequence.
GOAL = 5.0


def make_calls(setting: Setting, device: str) -> dict[str, Callable[[], Tensor]]:
    torch.manual_seed(0)
    num_tokens, length = setting.num_tokens, setting.length
    layers = Encoder(
        dim=setting.dim,
        depth=setting.depth,
        heads=setting.heads,
        rotary_pos_emb=True,
        attn_flash=True,
    )
    net = TransformerWrapper(
        num_tokens=num_tokens, max_seq_len=length, use_abs_pos_emb=False, attn_layers=layers
    )
    net = net.to(device).eval()
    mask_id, block_length = num_tokens - 1, setting.block_length
    of_blocks = NonAutoregressiveWrapper(net, mask_id=mask_id, block_length=block_length)
    mask = dense_block_mask(length, block_length, noisy=False, device=device)
    steps = setting.steps_per_block * (-(-length // block_length) - 1)
    prompt = torch.randint(mask_id, (setting.batch, block_length))
    how = {"seed": 0, "steps": steps, "prompt": prompt}
    return {
        WHOLE: partial(
            NonAutoregressiveWrapper(net, mask_id=mask_id).generate,
            setting.batch,
            block_length=block_length,
            attn_mask=mask,
            **how,
        ),
        UP_TO: partial(of_blocks.generate, setting.batch, cache=False, **how),
        CACHE: partial(of_blocks.generate, setting.batch, cache=True, **how),
    }


def compare(setting: Setting, repeats: int, device: str) -> list[dict]:
    calls = make_calls(setting, device)
    drawn: dict[str, Tensor] = {}

    def draw(who: str) -> None:
        drawn[who] = calls[who]()

    turns = turns_ns({who: partial(draw, who) for who in calls}, repeats, warm_up=0, device=device)
    rows = []
    for who, times in turns.items():
        ratios = sorted(a / b for a, b in zip(turns[WHOLE], times, strict=True))
        rows.append(
            {
                "who": who,
                "ms": statistics.median(times) / 1e6,
                "times_speed": statistics.median(ratios),
                "times_speed_range": (ratios[0], ratios[-1]),
                "equal_ids": (drawn[who] == drawn[WHOLE]).double().mean().item(),
            }
        )
    return rows


def report(setting: Setting, rows: list[dict], is_cpu: bool) -> None:
    print(
        f"V {setting.num_tokens}, B {setting.batch}, L {setting.length}, blocks of "
        f"{setting.block_length}, {setting.steps_per_block} steps each; width {setting.dim}, "
        f"{setting.depth} layers\n"
    )
    print_table(
        [
            {
                "": row["who"],
                "ms": row["ms"],
                "times the speed of the whole sequence": row["times_speed"],
                "from, to": " to ".join(map(show, row["times_speed_range"])),
                "goal": GOAL if row["who"] == CACHE and is_cpu else None,
                "equal ids": row["equal_ids"],
            }
            for row in rows
        ]
    )


if __name__ == "__main__":
    parser = make_parser(__doc__, repeats=3)
    args = parser.parse_args()
    device, repeats, record = begin(parser, args)
    record["settings"] = []
    for setting in [TINY] if args.dry_run else SETTINGS:
        rows = compare(setting, repeats, device)
        report(setting, rows, is_cpu=device == "cpu")
        record["settings"].append({**setting._asdict(), "rows": rows})
    write_json(args.json, record)
