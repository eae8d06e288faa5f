"""Reductions of the loss against what other codes compute from a mask, its probabilities and the
losses of all positions."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from nar_kernels import MaskingConfig, corrupt, masked_nll
from nar_kernels.ops.corrupted import Corrupted
from nar_kernels.ops.documents import Documents
from nar_kernels.ops.masked_nll import count

B, L, V, D = 5, 24, 40, 8
MASK = V - 1
PROMPTS = torch.tensor([0, 3, 17, 11, 18])


class Theirs:
    """A batch that another code has masked: prompts are given, p is its probability of each row."""

    def __init__(self, eps: float = 1e-3) -> None:
        generator = torch.Generator().manual_seed(3)
        self.ids = torch.randint(0, MASK, (B, L), generator=generator)
        self.supervised = torch.arange(L) >= PROMPTS[:, None]
        t = 0.5 + torch.rand(B, generator=generator, dtype=torch.float64) / 2
        self.p = ((1 - eps) * t + eps)[:, None].expand(B, L)
        self.masked = (torch.rand(B, L, generator=generator) < self.p) & self.supervised
        assert self.masked.any(1).all()
        self.hidden = torch.randn(B, L, D, generator=generator, dtype=torch.float64)
        self.head = torch.randn(V, D, generator=generator, dtype=torch.float64)
        self.ce = F.cross_entropy((self.hidden @ self.head.T).flatten(0, 1), self.ids.flatten(),
                                  reduction="none").view(B, L)  # fmt: skip

    def ours(self) -> Corrupted:
        """The same mask as a batch of ours."""
        batch = corrupt(self.ids, MaskingConfig(V, MASK), seed=0)
        rows = self.masked.flatten().nonzero().flatten()
        return replace(
            batch,
            input_ids=self.ids.masked_fill(self.masked, MASK),
            labels=self.ids.masked_fill(~self.masked, -100),
            masked_indices=self.masked,
            num_masked=self.masked.sum(1),
            num_maskable=self.supervised.sum(1),
            loss_weight=(1 / self.p[:, 0]).float(),
            row_buffer=torch.cat([rows, rows.new_zeros(B * L - len(rows))]),
            num_strata=0,
        )


def nemo(of: Theirs) -> torch.Tensor:
    """MDLM loss of NeMo: over the supervised tokens of the global batch."""
    return (of.ce * of.masked / of.p).sum() / of.supervised.sum()


def dllm(of: Theirs, loss_norm_type: str) -> torch.Tensor:
    """The loss of dLLM's MDLMTrainer."""
    token_nll = of.ce * of.masked / of.p
    if loss_norm_type == "token":
        token_nll = token_nll / of.supervised.sum()
    elif loss_norm_type == "sequence":
        token_nll = token_nll / (of.supervised.sum(-1, keepdim=True) * B)
    else:
        token_nll = token_nll / B
    return token_nll.sum()


def llada_sft(of: Theirs) -> torch.Tensor:
    """LLaDA's guidelines for fine-tuning."""
    answer_lengths = (L - PROMPTS)[:, None].expand(B, L)
    token_loss = of.ce[of.masked] / of.p[of.masked]
    return (token_loss / answer_lengths[of.masked]).sum() / B


THEIRS = {
    "NeMo": (nemo, "token"),
    "dLLM, token": (lambda of: dllm(of, "token"), "token"),
    "dLLM, sequence": (lambda of: dllm(of, "sequence"), "sequence"),
    "dLLM, batch": (lambda of: dllm(of, "batch"), "batch"),
    "LLaDA": (llada_sft, "sequence"),
    "LLaDA, answer": (llada_sft, "answer"),
}


@pytest.mark.parametrize("name", THEIRS)
def test_equals_the_loss_of(name: str) -> None:
    formula, reduction = THEIRS[name]
    of = Theirs()
    got = masked_nll(of.hidden, of.head, of.ours(), reduction=reduction)
    assert abs(got / formula(of) - 1) < 1e-6


@pytest.mark.parametrize("reduction", ["token", "sequence", "answer", "batch"])
def test_parts_of_a_batch_add_up(reduction: str) -> None:
    """Of gradient accumulation, or of ranks: each divides by the count of the whole."""
    of = Theirs()
    whole = of.ours()
    expected = masked_nll(of.hidden, of.head, whole, reduction=reduction)
    divisor = count(whole, reduction)
    parts = (
        masked_nll(
            of.hidden[i : i + 2], of.head, whole[i : i + 2], reduction=reduction, normalizer=divisor
        )  # fmt: skip
        for i in range(0, B, 2)
    )
    assert abs(sum(parts) / expected - 1) < 1e-12


@pytest.mark.parametrize("sample", range(B))
def test_an_answer_counts_the_same_whatever_its_length(sample: int) -> None:
    """Of one answer alone, where every token has the same loss; `token` weighs it by its length."""
    of = Theirs()
    weight = of.supervised.sum(1) / of.masked.sum(1) * (torch.arange(B) == sample)
    batch = replace(of.ours(), loss_weight=weight.float())
    hidden, each = torch.zeros_like(of.hidden), torch.tensor(float(V)).log()
    got = masked_nll(hidden, of.head, batch, reduction="sequence")
    assert abs(got - each / B) < 1e-6
    got = masked_nll(hidden, of.head, batch, reduction="token")
    assert abs(got - each * of.supervised[sample].sum() / of.supervised.sum()) < 1e-6


def test_token_needs_no_bound() -> None:
    of = Theirs()
    ids, masking = of.ids, MaskingConfig(V, MASK, weighting="unit", time_range=(0.2, 0.7))
    batch = corrupt(ids, masking, seed=1, maskable=of.supervised)
    nll = masked_nll(of.hidden, of.head, batch, reduction="none")
    got = masked_nll(of.hidden, of.head, batch, reduction="token")
    assert abs(got / (nll.sum() / of.supervised.sum()) - 1) < 1e-12
    with pytest.raises(ValueError, match="weighting is 'unit', which gives no bound"):
        masked_nll(of.hidden, of.head, batch, reduction="nelbo")


def packed(of: Theirs) -> tuple[Corrupted, torch.Tensor]:
    """The same answers, two or three to a row, and the hidden states there."""
    batch, order = of.ours(), torch.tensor([3, 0, 4, 1, 2])
    begins = torch.tensor([0, L, 3 * L, 4 * L, 5 * L, 6 * L])  # padding behind the second
    documents = Documents.of(begins, *torch.full((2, B), L), order, 3 * L)
    at = (begins[:-1, None] + torch.arange(L)).flatten()

    def there(x: torch.Tensor, fill: float) -> torch.Tensor:
        moved = torch.full((6 * L, *x.shape[2:]), fill, dtype=x.dtype)
        moved[at] = x[order].flatten(0, 1)
        return moved.view(2, 3 * L, *x.shape[2:])

    masked = there(batch.masked_indices, False)
    rows = masked.flatten().nonzero().flatten()
    moved = replace(
        batch,
        input_ids=there(batch.input_ids, 0),
        labels=there(batch.labels, -100),
        masked_indices=masked,
        times=batch.times[order],
        loss_weight=batch.loss_weight[order],
        num_masked=batch.num_masked[order],
        num_maskable=batch.num_maskable[order],
        row_buffer=torch.cat([rows, rows.new_zeros(6 * L - len(rows))]),
        documents=documents,
        spans=documents.spans(torch.device("cpu")),
    )
    return moved, there(of.hidden, 0.0)


def test_packed_answers() -> None:
    """Of answers that share rows, "answer" and "token" are what they are of answers apart;
    "sequence" is of rows."""
    of = Theirs()
    batch, hidden = packed(of)
    for reduction, expected in (
        ("answer", llada_sft(of)),
        ("token", nemo(of)),
        ("batch", dllm(of, "batch") * B / 2),
    ):
        got = masked_nll(hidden, of.head, batch, reduction=reduction)
        assert abs(got / expected - 1) < 1e-6, reduction
    of_answers = (of.ce * of.masked / of.p).sum(1)[[3, 0, 4, 1, 2]]
    lengths = of.supervised.sum(1)[[3, 0, 4, 1, 2]]
    expected = sum(of_answers[i].sum() / lengths[i].sum() for i in (slice(2), slice(2, 5))) / 2
    assert abs(masked_nll(hidden, of.head, batch, reduction="sequence") / expected - 1) < 1e-6


@pytest.mark.parametrize("reduction", ["token", "sequence", "answer", "batch", "mean"])
def test_parts_of_packed_answers_add_up(reduction: str) -> None:
    batch, hidden = packed(of := Theirs())
    expected = masked_nll(hidden, of.head, batch, reduction=reduction)
    divisor = count(batch, reduction)
    parts = (
        masked_nll(h[None], of.head, part, reduction=reduction, normalizer=divisor)
        for h, part in zip(hidden, batch.microbatches(1), strict=True)
    )
    assert abs(sum(parts) / expected - 1) < 1e-12


def test_answers_with_nothing_to_learn() -> None:
    """Do not count as answers; rows and documents do."""
    ids = torch.randint(0, MASK, (60,), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([10, 0, 20, 30])
    batch = corrupt(
        ids,
        MaskingConfig(V, MASK),
        seed=1,
        starts=lengths.cumsum(0) - lengths,
        lengths=lengths,
        prompt_lengths=torch.tensor([10, 0, 5, 0]),
    )
    assert count(batch, "answer") == 2 and count(batch, "sequence") == count(batch, "batch") == 4
    hidden = torch.zeros(60, D, dtype=torch.float64)
    head = torch.zeros(V, D, dtype=torch.float64)
    each = (batch.loss_weight * batch.num_masked / batch.num_maskable.clamp(min=1)).sum()
    expected = each * torch.tensor(float(V)).log() / 2
    assert abs(masked_nll(hidden, head, batch, reduction="answer") / expected - 1) < 1e-6


def test_weights_of_positions() -> None:
    of = Theirs()
    batch = of.ours()
    weight = torch.rand(B, L, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for reduction, divisor in (
        ("token", of.supervised.sum()),
        ("batch", B),
        ("mean", of.masked.sum()),
    ):
        each = of.ce * of.masked * weight * (1 if reduction == "mean" else 1 / of.p)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                got = masked_nll(
                    of.hidden, of.head, batch, reduction=reduction, position_weight=weight
                )
            assert abs(got / (each.sum() / divisor) - 1) < 1e-6
    with pytest.raises(ValueError, match="position_weight was given with reduction 'nelbo'"):
        masked_nll(of.hidden, of.head, batch, position_weight=weight)
    with pytest.raises(ValueError, match=r"it must be floats \[5, 24\]"):
        masked_nll(of.hidden, of.head, batch, reduction="token", position_weight=weight[0])
