"""Functions of other code bases, beside ours of the same name (`nar_kernels.integrations`), in
turns: what a training loop that swaps the import saves.

    python benchmarks/bench_drop_ins.py [--json FILE] [--dry-run]

Peers run as they are installed. Of those that no package has, a formula in plain PyTorch stands in,
and the table says so; what is not installed is left out, with the reason. `--dry-run` is tiny; its
figures are meaningless.
"""

import math
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from measure import begin, make_parser, print_table, turns_ns, write_json
from torch import Tensor

from nar_kernels.integrations import diffusers, maskgit, nemo

MASK_ID, BLOCK = 32000, 32


class Batch(NamedTuple):
    """What the functions get: ids ``[B, L]``; those of a loss, shorter, with logits."""

    ids: Tensor
    loss_mask: Tensor  # float, 0 at prompts
    slots: Tensor
    samples: list[dict[str, list[int]]]
    few_ids: Tensor
    logits: Tensor

    @property
    def code(self) -> Tensor:
        """As images, 32 tokens wide or as wide as they are long."""
        side = math.gcd(32, self.ids.shape[1])
        return self.ids.view(len(self.ids), side, -1)


def make_batch(size: int, length: int, few: tuple[int, int], num_tokens: int) -> Batch:
    noise = torch.Generator().manual_seed(0)
    ids = torch.randint(0, num_tokens - 1, (size, length), generator=noise)
    prompts = torch.randint(0, length // 2, (size, 1), generator=noise)
    loss_mask = (torch.arange(length) >= prompts).float()
    lengths = torch.randint(length // 2, length + 1, (size,), generator=noise).tolist()
    samples = [
        {
            "input_ids": row[:n].tolist(),
            "loss_mask": mask[:n].long().tolist(),
            "attention_mask": [1] * n,
        }
        for row, mask, n in zip(ids, loss_mask, lengths, strict=True)
    ]
    few_ids = torch.randint(0, num_tokens - 1, few, generator=noise)
    logits = torch.randn(*few, num_tokens, generator=noise).requires_grad_()
    return Batch(ids, loss_mask, torch.arange(size), samples, few_ids, logits)


Call = Callable[[], Any]


class DropIn(NamedTuple):
    """A row of the table.

    Attributes:
        calls: from a batch, the call of ours and that of the peer; raises ImportError without it.
        peer: what it is called.
    """

    name: str
    peer: str
    calls: Callable[[Batch], tuple[Call, Call]]


def _corruption() -> Any:
    from nemo_automodel.components.datasets.dllm import corruption

    return corruption


def corrupt_uniform(b: Batch) -> tuple[Call, Call]:
    peer, given = _corruption(), (b.ids, b.loss_mask, MASK_ID)
    return lambda: nemo.corrupt_uniform(*given), lambda: peer.corrupt_uniform(*given)


def corrupt_uniform_by_sample(b: Batch) -> tuple[Call, Call]:
    """Masks that do not depend on the batch."""
    peer = _corruption()

    def theirs() -> list[Tensor]:
        parts = []
        for ids, loss_mask, slot in zip(b.ids, b.loss_mask, b.slots.tolist(), strict=True):
            noise = torch.Generator().manual_seed(slot)
            parts.append(peer.corrupt_uniform(ids[None], loss_mask[None], MASK_ID, generator=noise))
        return [torch.cat(part) for part in zip(*parts, strict=True)]

    def ours() -> Any:
        return nemo.corrupt_uniform(b.ids, b.loss_mask, MASK_ID, seed=0, sample_ids=b.slots)

    return ours, theirs


def corrupt_blockwise(b: Batch) -> tuple[Call, Call]:
    peer, given = _corruption(), (b.ids, b.loss_mask, MASK_ID, BLOCK)
    return lambda: nemo.corrupt_blockwise(*given), lambda: peer.corrupt_blockwise(*given)


def corrupt_blockwise_in_any_order(b: Batch) -> tuple[Call, Call]:
    """Samples whose numbers do not follow one another, each in a launch of its own."""
    peer, given, slots = _corruption(), (b.ids, b.loss_mask, MASK_ID, BLOCK), b.slots * 7
    return (
        lambda: nemo.corrupt_blockwise(*given, seed=0, sample_ids=slots),
        lambda: peer.corrupt_blockwise(*given),
    )


def corrupt_whole_sequences(b: Batch) -> tuple[Call, Call]:
    peer, given = _corruption(), (b.ids, b.loss_mask, MASK_ID)
    return lambda: nemo.corrupt_blockwise(*given), lambda: peer.corrupt_blockwise(*given)


def mdlm_loss(b: Batch) -> tuple[Call, Call]:
    from nemo_automodel.components.loss.dllm_loss import MDLMCrossEntropyLoss

    ones = torch.ones(b.few_ids.shape, dtype=torch.float32)
    _, masked, p_mask = nemo.corrupt_uniform(b.few_ids, ones, MASK_ID, seed=0)

    def call(cls: type[torch.nn.Module]) -> Call:
        loss = cls()

        def step() -> None:
            b.logits.grad = None
            loss(b.logits, b.few_ids, masked, p_mask, ones).total_loss.backward()

        return step

    return call(nemo.MDLMCrossEntropyLoss), call(MDLMCrossEntropyLoss)


def collator(b: Batch) -> tuple[Call, Call]:
    from nemo_automodel.components.datasets.dllm.collate import DLLMCollator

    ours, theirs = (
        cls(pad_token_id=0, eos_token_id=1, block_size=BLOCK)
        for cls in (nemo.DLLMCollator, DLLMCollator)
    )
    return lambda: ours(b.samples), lambda: theirs(b.samples)


def add_noise(b: Batch) -> tuple[Call, Call]:
    from diffusers import BlockRefinementScheduler

    scheduler, given = BlockRefinementScheduler(), (b.ids, b.loss_mask.long())
    options = {"prompt_length": 0, "block_length": BLOCK, "mask_token_id": MASK_ID}
    return (
        lambda: diffusers.add_noise(*given, **options),
        lambda: scheduler.add_noise(*given, **options),
    )


def amused(b: Batch) -> tuple[Call, Call]:
    size, length = b.ids.shape

    def formula() -> tuple[Tensor, Tensor]:
        share = torch.cos(torch.rand(size, 1) * math.pi / 2)
        masked = torch.rand(size, length).argsort(1) < (length * share).round().clamp(min=1)
        return torch.where(masked, MASK_ID, b.ids), torch.where(masked, b.ids, -100)

    return lambda: diffusers.amused_mask(b.ids, MASK_ID), formula


def mask_code(b: Batch) -> tuple[Call, Call]:
    def formula() -> tuple[Tensor, Tensor, Tensor]:
        ratio = torch.arccos(torch.rand(len(b.code), 1, 1)) / (math.pi / 2)
        masked = torch.rand(b.code.shape) < ratio
        ids = b.code.clone()
        ids[masked] = MASK_ID
        return ids, masked, torch.ones_like(masked)

    return lambda: maskgit.get_mask_code(b.code, value=MASK_ID), formula


FORMULA = "its formula in PyTorch"
DROP_INS = [
    DropIn("corrupt_uniform", "NeMo", corrupt_uniform),
    DropIn(
        "corrupt_uniform, whatever the batch",
        "NeMo, a generator a sample",
        corrupt_uniform_by_sample,
    ),
    DropIn("corrupt_blockwise, blocks of 32", "NeMo", corrupt_blockwise),
    DropIn("corrupt_blockwise, scattered sample_ids", "NeMo", corrupt_blockwise_in_any_order),
    DropIn("corrupt_blockwise, whole sequences", "NeMo", corrupt_whole_sequences),
    DropIn("MDLMCrossEntropyLoss, forward + backward", "NeMo", mdlm_loss),
    DropIn("DLLMCollator, blocks of 32", "NeMo", collator),
    DropIn("add_noise, blocks of 32", "diffusers", add_noise),
    DropIn("amused_mask", FORMULA, amused),
    DropIn("get_mask_code", FORMULA, mask_code),
]


def compare(drop_in: DropIn, batch: Batch, repeats: int) -> dict[str, Any]:
    """A row: medians of calls that take turns."""
    ours, theirs = drop_in.calls(batch)
    turns = turns_ns({"ours": ours, "peer": theirs}, repeats, warm_up=1, timed=2)
    pairs = zip(turns["peer"], turns["ours"], strict=True)
    return {
        "function": drop_in.name,
        "peer": drop_in.peer,
        "ours, us": statistics.median(turns["ours"]) / 1e3,
        "peer, us": statistics.median(turns["peer"]) / 1e3,
        "times as fast": statistics.median(peer / mine for peer, mine in pairs),
    }


def main() -> None:
    parser = make_parser(__doc__, repeats=40)
    args = parser.parse_args()
    _, repeats, record = begin(parser, args, on_cpu=True)
    # Sequences, their length, both of the loss, and its vocabulary.
    sizes = (2, 64, (2, 8), 50) if args.dry_run else (64, 1024, (4, 256), 32001)
    batch = make_batch(*sizes)
    size, length, few, num_tokens = sizes
    record |= {"batch": size, "length": length, "loss": [*few, num_tokens]}
    record |= {"rows": [], "left_out": {}}
    for drop_in in DROP_INS:
        try:
            record["rows"].append(compare(drop_in, batch, repeats))
        except ImportError as error:
            record["left_out"][drop_in.name] = str(error)
            print(f"{drop_in.name} is left out: {error}")
    print(f"B {size}, L {length}; loss: B {few[0]}, L {few[1]}, V {num_tokens}\n")
    print_table(record["rows"])
    write_json(args.json, record)


if __name__ == "__main__":
    main()
