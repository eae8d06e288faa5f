"""The functions of LLaDA (github.com/ML-GSAI/LLaDA) and Megatron-Bridge, against their formulas."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nar_kernels import InvalidTokenError
from nar_kernels.integrations.llada import (
    MASK_ID,
    forward_process,
    forward_process_simple_masking,
    generate,
    get_log_likelihood,
    pretraining_loss,
    sft_loss,
)
from tests.helpers.goodness_of_fit import assert_mean, assert_uniform
from tests.helpers.neighbours import LENGTH, NUM_TOKENS, Neighbours
from tests.helpers.neighbours import MASK_ID as OF_NEIGHBOURS

pytestmark = pytest.mark.usefixtures("one_thread")

EPS = 1e-3


def ids_of(batch: int, length: int, high: int = 1000) -> Tensor:
    return torch.randint(0, high, (batch, length), generator=torch.Generator().manual_seed(batch))


def test_what_it_returns():
    ids = ids_of(3, 7)
    noisy, masked, p_mask = forward_process(ids)
    assert noisy.dtype == torch.int64 and masked.dtype == torch.bool
    assert p_mask.dtype == torch.float32 and p_mask.shape == masked.shape == ids.shape
    assert torch.equal(noisy, torch.where(masked, MASK_ID, ids))
    assert (p_mask == p_mask[:, :1]).all()
    assert forward_process(ids.int())[0].dtype == torch.int32


def test_a_call_draws_anew_and_a_seed_repeats():
    ids = ids_of(4, 50)
    torch.manual_seed(1)
    first, second = forward_process(ids)[1], forward_process(ids)[1]
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(forward_process(ids)[1], first)
    assert torch.equal(forward_process(ids, seed=3)[0], forward_process(ids, seed=3)[0])
    draw = torch.Generator().manual_seed(5)
    by_generator = forward_process_simple_masking(ids, MASK_ID, generator=draw)[1]
    draw.manual_seed(5)
    again = forward_process_simple_masking(ids, MASK_ID, generator=draw)[1]
    assert torch.equal(by_generator, again)


def test_a_mask_does_not_depend_on_what_lies_beside():
    ids, slots = ids_of(6, 33), torch.tensor([70, 3, 9, 1 << 40, 5, 4])
    whole = forward_process(ids, seed=2, sample_ids=slots)
    order = torch.tensor([4, 0, 2])
    for one, two in zip(
        whole, forward_process(ids[order], seed=2, sample_ids=slots[order]), strict=True
    ):
        assert torch.equal(one[order], two)


@pytest.mark.seconds
def test_under_torch_compile():
    def step(ids: Tensor) -> Tensor:
        return forward_process(ids + 1, 0.017, mask_id=2000, seed=2)[0] * 2

    ids = ids_of(3, 20)
    assert torch.equal(torch.compile(step, backend="eager")(ids), step(ids))


def test_the_law():
    """p is uniform in (eps, 1); given p, positions are independent coins."""
    batch, length, eps = 4000, 64, 0.2
    _, masked, p_mask = forward_process(ids_of(batch, length), eps, seed=0)
    p = p_mask[:, 0].double()
    assert eps < p.min() < eps + 0.01 and 0.99 < p.max() < 1
    assert_uniform(torch.histc((p - eps) / (1 - eps), 20, 0, 1), num_tests=4)
    spread = (p * (1 - p)).sqrt()
    assert_mean(((masked.double().mean(1) - p) / spread), 0.0, num_tests=4)
    errors = (masked.double() - p_mask) / spread[:, None]
    assert_mean(errors.square().flatten(), 1.0, num_tests=4)
    assert_mean((errors[:, 1:] * errors[:, :-1]).flatten(), 0.0, num_tests=4)


def test_nothing_is_masked_where_the_loss_mask_is_0():
    ids = ids_of(5, 40)
    loss_mask = (torch.arange(40) % 3 > 0).long().expand(5, 40)
    for given in (loss_mask, loss_mask.float(), loss_mask.bool()):
        noisy, masked, _ = forward_process_simple_masking(ids, 1000, loss_mask=given, seed=1)
        assert not masked[loss_mask == 0].any() and masked[loss_mask == 1].any()
        free = forward_process_simple_masking(ids, 1000, seed=1)[1]
        assert torch.equal(masked, free & loss_mask.bool())
        assert torch.equal(noisy, torch.where(masked, 1000, ids))


def test_clear_errors():
    with pytest.raises(InvalidTokenError, match="id 126336"):
        forward_process(torch.tensor([[1, MASK_ID]]))
    with pytest.raises(TypeError, match="input_ids is a list"):
        forward_process([[1, 2]])
    with pytest.raises(ValueError, match="input_ids is torch.float32"):
        forward_process(torch.rand(2, 3))
    with pytest.raises(ValueError, match="mask token is 126336, which torch.int16 cannot hold"):
        forward_process(ids_of(2, 3).short())
    with pytest.raises(ValueError, match=r"eps is 1\.0: it must be in"):
        forward_process(ids_of(2, 3), 1.0)
    for name in ("gen_length", "block_length", "steps"):
        with pytest.raises(ValueError, match=f"{name} is 0: it must be at least 1"):
            generate(Neighbours(), torch.tensor([[1]]), **{name: 0})
    with pytest.raises(ValueError, match="must divide gen_length"):
        generate(Neighbours(), torch.tensor([[1]]), gen_length=8, block_length=3, steps=8)


class Net(nn.Module):
    """Attends to everything, by a mean."""

    num_tokens, max_seq_len = NUM_TOKENS, 64

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(NUM_TOKENS, 16)
        self.output_head = nn.Linear(16, NUM_TOKENS)

    def forward(self, ids: Tensor, return_embeddings: bool = False) -> Tensor:
        x = self.embed(ids)
        hidden = torch.tanh(x + x.mean(1, keepdim=True))
        return hidden if return_embeddings else self.output_head(hidden)


def test_losses_are_those_of_the_guidelines():
    torch.manual_seed(0)
    net, ids = Net().double(), ids_of(6, 20, OF_NEIGHBOURS)
    noisy, masked, p_mask = forward_process(ids, EPS, mask_id=OF_NEIGHBOURS, seed=7)
    nll = F.cross_entropy(net(noisy)[masked], ids[masked], reduction="none")
    expected = (nll / p_mask[masked]).sum() / ids.numel()
    loss = pretraining_loss(net, ids, mask_id=OF_NEIGHBOURS, seed=7)
    assert torch.allclose(loss, expected, rtol=1e-6)
    loss.backward()
    assert net.embed.weight.grad.abs().sum() > 0

    prompts = torch.tensor([0, 3, 5, 10, 20, 7])  # one without an answer
    is_prompt = torch.arange(20) < prompts[:, None]
    noisy, masked = ids.where(is_prompt, noisy), masked & ~is_prompt
    nll = F.cross_entropy(net(noisy)[masked], ids[masked], reduction="none") / p_mask[masked]
    answers = (~is_prompt).sum(1, keepdim=True).expand(6, 20)[masked]
    expected = (nll / answers).sum() / 6
    loss = sft_loss(net, ids, prompts, mask_id=OF_NEIGHBOURS, seed=7)
    assert torch.allclose(loss, expected, rtol=1e-6)


def exact_bound(net: nn.Module, prompt: Tensor, answer: Tensor, cfg_scale: float) -> float:
    """By all subsets of the answer."""
    n, total = len(answer), 0.0
    for k in range(1, n + 1):
        subsets = list(itertools.combinations(range(n), k))
        for subset in subsets:
            at = [len(prompt) + i for i in subset]
            ids = torch.cat([prompt, answer])[None]
            ids[0, at] = OF_NEIGHBOURS
            logits = net(ids)
            if cfg_scale:
                other = ids.clone()
                other[0, : len(prompt)] = OF_NEIGHBOURS
                other = net(other)
                logits = other + (cfg_scale + 1) * (logits - other)
            nll = F.cross_entropy(logits[0, at], answer[list(subset)], reduction="sum").item()
            total += n / k * nll / len(subsets) / n
    return -total


@pytest.mark.parametrize("cfg_scale", [0.0, 1.5])
def test_the_likelihood_is_that_of_all_subsets(cfg_scale):
    net, prompt, answer = Neighbours(), torch.tensor([1, 7]), torch.tensor([3, 2, 11])
    options = {"mc_num": 6000, "batch_size": 500, "cfg_scale": cfg_scale, "mask_id": OF_NEIGHBOURS}
    estimate = get_log_likelihood(net, prompt, answer, seed=0, **options)
    exact = exact_bound(net, prompt, answer, cfg_scale)
    assert math.isclose(estimate, exact, rel_tol=0.02)
    options["batch_size"] = 77
    other = get_log_likelihood(net, prompt, answer, seed=0, **options)
    assert math.isclose(estimate, other, rel_tol=1e-6)


EOS, EOT = 5, 6


def llada(
    net: nn.Module,
    prompt: Tensor,
    steps: int,
    gen_length: int,
    block_length: int,
    cfg_scale: float = 0.0,
    logits_eos_inf: bool = False,
    confidence_eos_eot_inf: bool = False,
) -> Tensor:
    """Its loop at temperature 0, one sequence. Equal confidences go from left to right."""
    start = prompt.shape[1]
    x = torch.full((1, start + gen_length), OF_NEIGHBOURS)
    x[:, :start] = prompt
    prompt_index = x != OF_NEIGHBOURS
    blocks = gen_length // block_length
    for block in range(blocks):
        stop = start + (block + 1) * block_length
        base, rest = divmod(block_length, steps // blocks)
        for step in range(steps // blocks):
            logits = net(x).double()
            if cfg_scale > 0:
                un_logits = net(x.masked_fill(prompt_index, OF_NEIGHBOURS)).double()
                logits = un_logits + (cfg_scale + 1) * (logits - un_logits)
            logits[..., OF_NEIGHBOURS] = -torch.inf  # which LLaDA does not predict
            if logits_eos_inf:
                logits[..., EOS] = -torch.inf
            x0 = logits.argmax(-1)
            if confidence_eos_eot_inf:
                logits[..., [EOS, EOT]] = -torch.inf
            x0_p = logits.softmax(-1).gather(-1, x0[..., None])[..., 0]
            x0_p[:, stop:] = -torch.inf
            confidence = x0_p.where(x == OF_NEIGHBOURS, -torch.inf)
            order = confidence[0].argsort(descending=True, stable=True)
            chosen = order[: base + (step < rest)]
            x[0, chosen] = x0[0, chosen]
    return x


@pytest.mark.parametrize(
    ("block_length", "steps_of_a_block"), [(2, 1), (2, 2), (4, 2), (4, 3), (8, 1), (8, 5), (8, 12)]
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cfg_scale": 1.5},
        {"cfg_scale": -1.0},
        {"logits_eos_inf": True},
        {"confidence_eos_eot_inf": True},
        {"logits_eos_inf": True, "confidence_eos_eot_inf": True},
    ],
    ids=["plain", "guided", "not guided", "never", "last", "never and last"],
)
def test_answers_are_those_of_llada(block_length, steps_of_a_block, options):
    net = Neighbours()
    net.table[:, [EOS, EOT]] += 1.5  # which are drawn now and then
    prompts = torch.tensor([[1, 2, 3], [7, 7, 7], [3, 1, 4], [EOS, 2, 9]])
    shared = {
        "steps": steps_of_a_block * (8 // block_length), "gen_length": 8,
        "block_length": block_length, **options,
    }  # fmt: skip
    given = prompts.clone()
    ids = generate(net, given, mask_id=OF_NEIGHBOURS, eos_ids=(EOS, EOT), **shared)
    assert ids.shape == (4, 11) and torch.equal(given, prompts)
    for row, prompt in zip(ids, prompts, strict=True):
        answer, wanted = row.tolist(), llada(net, prompt[None], **shared)[0].tolist()
        ends = [i for i in range(3, 11) if wanted[i] in (EOS, EOT)]
        if ends and "confidence_eos_eot_inf" in options:  # LLaDA cuts when it decodes text
            wanted[ends[0] + 1 :] = [EOS] * (10 - ends[0])
        assert answer == wanted


def test_a_head_without_the_mask():
    class Narrow(Neighbours):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids)[..., :-1]

    last, prompt = NUM_TOKENS - 1, torch.tensor([[1, 2, 3], [7, 7, 7]])
    options = {"steps": 4, "gen_length": 8, "block_length": 8, "mask_id": last}
    narrow, whole = (
        generate(net, prompt, eos_ids=(EOS, EOT), confidence_eos_eot_inf=True, **options)
        for net in (Narrow(), Neighbours())
    )
    assert torch.equal(narrow, whole)


def test_random_remasking_does_not_see_ends():
    net, prompt = Neighbours(), torch.tensor([[1, 2], [3, 4]])
    options = {
        "steps": 8, "gen_length": 8, "block_length": 4, "mask_id": OF_NEIGHBOURS,
        "remasking": "random", "seed": 0, "eos_ids": (EOS, EOT),
    }  # fmt: skip
    plain = generate(net, prompt, **options)
    assert torch.equal(plain, generate(net, prompt, confidence_eos_eot_inf=True, **options))


def test_at_a_temperature_one_end_is_never_drawn_and_the_other_last():
    net, prompt = Neighbours(), torch.arange(4).repeat(8)[:, None]
    net.table[:, [EOS, EOT]] += 3.0
    ids = generate(
        net, prompt, steps=8, gen_length=8, block_length=8, temperature=1.0, seed=0,
        mask_id=OF_NEIGHBOURS, eos_ids=(EOS, EOT), logits_eos_inf=True, confidence_eos_eot_inf=True,
    )[:, 1:]  # fmt: skip
    is_end = (ids == EOS) | (ids == EOT)
    first = ids[is_end & (is_end.cumsum(1) == 1)]
    assert len(first) > 8 and (first == EOT).all()


def test_answers_that_are_drawn():
    net, prompt = Neighbours(), torch.tensor([[1, 2], [3, 4]])
    options = {"steps": 8, "gen_length": 8, "block_length": 4, "mask_id": OF_NEIGHBOURS}
    for remasking in ("random", "low_confidence"):
        hot = {**options, "remasking": remasking, "temperature": 1.0}
        some = [generate(net, prompt, seed=seed, **hot) for seed in (0, 0, 1)]
        assert torch.equal(some[0], some[1]) and not torch.equal(some[0], some[2])
        assert (some[0] != OF_NEIGHBOURS).all()
    with pytest.raises(ValueError, match="remasking is 'low'"):
        generate(net, prompt, remasking="low", **options)


def test_the_attention_mask_reaches_the_model():
    class Masked(Neighbours):
        def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
            assert attention_mask.shape == ids.shape
            return super().forward(ids, shift=attention_mask.sum(1)[:, None])

    net, prompt = Masked(), torch.tensor([[0, 2], [3, 4]])
    attention_mask = torch.tensor([[0, 1], [1, 1]])
    options = {"steps": 4, "gen_length": 4, "block_length": 4, "mask_id": OF_NEIGHBOURS}
    ids = generate(net, prompt, attention_mask, **options)
    alone = generate(net, prompt[:1], attention_mask[:1], **options)
    assert torch.equal(ids[:1], alone) and ids.shape[1] <= LENGTH
