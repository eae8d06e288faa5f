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

from nar_kernels import NetAdapter
from nar_kernels.integrations import diffusers, dllm, llada, maskgit, mdlm, nemo

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


def corrupt_all_masked(b: Batch) -> tuple[Call, Call]:
    peer, given = _corruption(), (b.ids, b.loss_mask, MASK_ID)
    return lambda: nemo.corrupt_all_masked(*given), lambda: peer.corrupt_all_masked(*given)


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


def _cosine_masks(b: Batch, ignore_index: int) -> Call:
    """Of aMUSEd and muse: a rounded share of each image."""
    size, length = b.ids.shape

    def formula() -> tuple[Tensor, Tensor]:
        share = torch.cos(torch.rand(size, 1) * math.pi / 2)
        masked = torch.rand(size, length).argsort(1) < (length * share).round().clamp(min=1)
        return torch.where(masked, MASK_ID, b.ids), torch.where(masked, b.ids, ignore_index)

    return formula


def amused(b: Batch) -> tuple[Call, Call]:
    return lambda: diffusers.amused_mask(b.ids, MASK_ID), _cosine_masks(b, -100)


def muse(b: Batch) -> tuple[Call, Call]:
    return lambda: maskgit.muse_mask(b.ids, MASK_ID), _cosine_masks(b, -1)


def drop_labels(b: Batch) -> tuple[Call, Call]:
    """A tenth of 1000 classes, of as many images as there are tokens."""
    classes = b.ids.flatten() % 1000

    def formula() -> Tensor:
        return torch.where(torch.rand(classes.shape) < 0.1, 1000, classes)

    return lambda: maskgit.drop_labels(classes, 0.1, 1000), formula


def mask_code(b: Batch) -> tuple[Call, Call]:
    def formula() -> tuple[Tensor, Tensor, Tensor]:
        ratio = torch.arccos(torch.rand(len(b.code), 1, 1)) / (math.pi / 2)
        masked = torch.rand(b.code.shape) < ratio
        ids = b.code.clone()
        ids[masked] = MASK_ID
        return ids, masked, torch.ones_like(masked)

    return lambda: maskgit.get_mask_code(b.code, value=MASK_ID), formula


def forward_process(b: Batch) -> tuple[Call, Call]:
    def formula(eps: float = 1e-3) -> tuple[Tensor, Tensor, Tensor]:
        p_mask = ((1 - eps) * torch.rand(len(b.ids)) + eps)[:, None].repeat(1, b.ids.shape[1])
        masked = torch.rand(b.ids.shape) < p_mask
        return torch.where(masked, MASK_ID, b.ids), masked, p_mask

    return lambda: llada.forward_process(b.ids, mask_id=MASK_ID), formula


def _encoder(b: Batch) -> Any:
    """A net as those of LLaDA: `.logits` of every position. The mask is its last id."""
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=b.logits.shape[2],
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=1024,
        max_position_embeddings=2 * b.few_ids.shape[1],
    )
    return BertForMaskedLM(config).eval()


def pretraining_loss(b: Batch) -> tuple[Call, Call]:
    return _llada_loss(b, prompt_length=0)


def sft_loss(b: Batch) -> tuple[Call, Call]:
    """Prompts of half of the length."""
    return _llada_loss(b, prompt_length=b.few_ids.shape[1] // 2)


def _llada_loss(b: Batch, prompt_length: int) -> tuple[Call, Call]:
    net, ids, mask_id = _encoder(b), b.few_ids, b.logits.shape[2] - 1
    adapter, (size, length) = NetAdapter(net), ids.shape
    prompt_lengths = torch.full((size,), prompt_length)

    def ours() -> None:
        net.zero_grad()
        if prompt_length:
            loss = llada.sft_loss(adapter, ids, prompt_lengths, mask_id=mask_id)
        else:
            loss = llada.pretraining_loss(adapter, ids, mask_id=mask_id)
        loss.backward()

    def formula(eps: float = 1e-3) -> None:
        net.zero_grad()
        p_mask = ((1 - eps) * torch.rand(size) + eps)[:, None].expand(size, length)
        is_answer = torch.arange(length) >= prompt_lengths[:, None]
        masked = (torch.rand(size, length) < p_mask) & is_answer
        logits = net(input_ids=torch.where(masked, mask_id, ids)).logits
        nll = torch.nn.functional.cross_entropy(logits[masked], ids[masked], reduction="none")
        ((nll / p_mask[masked]).sum() / is_answer.sum()).backward()

    return ours, formula


def log_likelihood(b: Batch) -> tuple[Call, Call]:
    """32 draws, 16 at a time, of an answer as long as its prompt."""
    net, ids, mask_id = _encoder(b), b.few_ids[0], b.logits.shape[2] - 1
    draws, size, n = 32, 16, len(ids) // 2

    def ours() -> float:
        return llada.get_log_likelihood(net, ids[:-n], ids[-n:], draws, size, mask_id=mask_id)

    @torch.no_grad()
    def formula() -> float:
        total = 0.0
        for _ in range(draws // size):
            first = torch.randint(n, ()) + torch.arange(size) * n // size
            counts = (first % n + 1)[:, None]
            masked = torch.zeros(size, len(ids), dtype=torch.bool)
            masked[:, -n:] = torch.rand(size, n).argsort(1) < counts
            logits = net(torch.where(masked, mask_id, ids)).logits
            labels, weights = ids.expand(size, -1)[masked], (n / counts).expand_as(masked)[masked]
            nll = torch.nn.functional.cross_entropy(logits[masked], labels, reduction="none")
            total += (nll * weights).sum().item()
        return -total / draws

    return ours, formula


def decoding(b: Batch) -> tuple[Call, Call]:
    """Half as many tokens as the prompt has, in two blocks, two a step."""
    net, prompt = _encoder(b), b.few_ids[:1, : b.few_ids.shape[1] // 2]
    mask_id, length = b.logits.shape[2] - 1, prompt.shape[1]
    answer, block = length // 2, length // 4

    def ours() -> Tensor:
        sizes = {"steps": answer // 2, "gen_length": answer, "block_length": block}
        return llada.generate(net, prompt, mask_id=mask_id, **sizes)

    @torch.no_grad()
    def formula() -> Tensor:
        ids = torch.cat([prompt, torch.full((1, answer), mask_id)], 1)
        for end in range(length + block, length + answer + 1, block):
            for _ in range(block // 2):
                logits = net(ids).logits
                best = logits.argmax(-1)
                confidence = logits.softmax(-1).gather(-1, best[..., None])[..., 0]
                confidence[ids != mask_id] = -math.inf
                confidence[:, end:] = -math.inf
                chosen = confidence.topk(2).indices
                ids.scatter_(1, chosen, best.gather(1, chosen))
        return ids

    return ours, formula


def q_xt(b: Batch) -> tuple[Call, Call]:
    size = len(b.ids)

    def ours() -> Tensor:
        return mdlm.q_xt(b.ids, mdlm.sample_t(size)[:, None], MASK_ID)

    def formula() -> Tensor:
        t = (torch.rand(size) / size + torch.arange(size) / size) % 1 * (1 - 1e-3) + 1e-3
        return torch.where(torch.rand(b.ids.shape) < t[:, None], MASK_ID, b.ids)

    return ours, formula


def q_xt_of_blocks(b: Batch) -> tuple[Call, Call]:
    """Times of blocks within (0.3, 0.8), and blocks drawn again until their share is."""
    size, length = b.ids.shape
    blocks = length // min(BLOCK, length)
    width, low, high = length // blocks, 0.3, 0.8
    bounds = {"sampling_eps_min": low, "sampling_eps_max": high}

    def ours() -> Tensor:
        t = mdlm.sample_block_t((size, length), block_size=width, **bounds)
        return mdlm.q_xt(b.ids, t, MASK_ID, width, **bounds)

    def formula() -> Tensor:
        n = size * blocks
        t = ((torch.rand(n) / n + torch.arange(n) / n) % 1 * (high - low) + low).view(size, blocks)
        t = t.repeat_interleave(width, 1)
        masked = torch.rand(b.ids.shape) <= t
        while True:
            share = masked.view(size, blocks, width).float().mean(2)
            again = (share < low) | (share > high)
            if not again.any():
                return torch.where(masked, MASK_ID, b.ids)
            again = again.repeat_interleave(width, 1)
            masked[again] = (torch.rand(b.ids.shape) <= t)[again]

    return ours, formula


def dllm_loss(b: Batch) -> tuple[Call, Call]:
    """With the last layer of a net, without what is before it."""
    num_tokens = b.logits.shape[2]
    net = Head(num_tokens)
    labels, count = b.few_ids, b.few_ids.numel()

    def ours() -> None:
        net.zero_grad()
        inputs = {"input_ids": b.few_ids, "labels": labels}
        dllm.compute_loss(net, inputs, mask_token_id=num_tokens - 1).backward()

    def formula(eps: float = 1e-3) -> None:
        net.zero_grad()
        t = (eps + (1 - eps) * torch.rand(len(labels)))[:, None]
        masked = torch.rand(labels.shape) < t
        logits = net(torch.where(masked, num_tokens - 1, b.few_ids))
        nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        ((nll * masked / t).sum() / count).backward()

    return ours, formula


class Head(torch.nn.Module):
    """Embeddings of 256 numbers, and a linear layer."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self.num_tokens, self.max_seq_len = num_tokens, 1 << 20
        self.embed = torch.nn.Embedding(num_tokens, 256)
        self.output_head = torch.nn.Linear(256, num_tokens)

    def forward(self, ids: Tensor, return_embeddings: bool = False) -> Tensor:
        hidden = self.embed(ids)
        return hidden if return_embeddings else self.output_head(hidden)


def _tokenizer(num_tokens: int) -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]"]
    pieces = [*special, *(f"w{i}" for i in range(num_tokens - len(special)))]
    inner = Tokenizer(models.WordLevel({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    names = dict(zip(("pad_token", "cls_token", "sep_token", "mask_token"), special, strict=False))
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", **names)


def mlm_collator(b: Batch) -> tuple[Call, Call]:
    from transformers import DataCollatorForLanguageModeling

    from nar_kernels.integrations import hugging_face

    tokenizer = _tokenizer(b.logits.shape[2])
    ours, theirs = (
        cls(tokenizer)
        for cls in (hugging_face.DataCollatorForLanguageModeling, DataCollatorForLanguageModeling)
    )

    def call(collate: Any) -> Call:  # which may take what it gets apart
        return lambda: collate([{"input_ids": sample["input_ids"]} for sample in b.samples])

    return call(ours), call(theirs)


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
    DropIn("corrupt_all_masked", "NeMo", corrupt_all_masked),
    DropIn("MDLMCrossEntropyLoss, forward + backward", "NeMo", mdlm_loss),
    DropIn("DLLMCollator, blocks of 32", "NeMo", collator),
    DropIn("add_noise, blocks of 32", "diffusers", add_noise),
    DropIn("DataCollatorForLanguageModeling", "transformers", mlm_collator),
    DropIn("forward_process (LLaDA)", FORMULA, forward_process),
    DropIn("pretraining_loss (LLaDA), forward + backward", FORMULA, pretraining_loss),
    DropIn("sft_loss (LLaDA), forward + backward", FORMULA, sft_loss),
    DropIn("get_log_likelihood (LLaDA), 32 draws", FORMULA, log_likelihood),
    DropIn("generate (LLaDA), two tokens a step", FORMULA, decoding),
    DropIn("sample_t, q_xt (MDLM)", FORMULA, q_xt),
    DropIn("sample_t, q_xt (BD3LM), clipped, blocks of 32", FORMULA, q_xt_of_blocks),
    DropIn("compute_loss (dllm), forward + backward of the head", FORMULA, dllm_loss),
    DropIn("amused_mask", FORMULA, amused),
    DropIn("muse_mask", FORMULA, muse),
    DropIn("drop_labels", FORMULA, drop_labels),
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
    sizes = (2, 64, (2, 16), 50) if args.dry_run else (64, 1024, (4, 256), 32001)
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
