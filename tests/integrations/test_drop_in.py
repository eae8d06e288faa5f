"""Side by side with x-transformers' own wrapper: only the import may change."""

import inspect
import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import x_transformers
from torch import Tensor, nn
from x_transformers import Encoder, TransformerWrapper

from nar_kernels.losses import Losses
from nar_kernels.ops.corrupt import corrupt
from nar_kernels.ops.corrupted import Corrupted
from nar_kernels.wrapper import NonAutoregressiveWrapper

pytestmark = pytest.mark.usefixtures("one_thread")

Original = x_transformers.NonAutoregressiveWrapper
NUM_TOKENS, MASK_ID, LENGTH, BATCH = 12, 11, 10, 6


def make_net(**kwargs) -> TransformerWrapper:
    return TransformerWrapper(
        num_tokens=NUM_TOKENS,
        max_seq_len=LENGTH,
        attn_layers=Encoder(dim=16, depth=1, heads=2, attn_dim_head=8),
        **kwargs,
    )


def make_pair(net_kwargs=None, critic: str | None = None, **kwargs):
    """The original and ours, with equal weights."""
    made = []
    for wrapper in (Original, NonAutoregressiveWrapper):
        torch.manual_seed(0)
        critics = {
            None: {},
            "token_critic": {"token_critic": make_net(logits_dim=1)},
            "self_token_critic": {"self_token_critic": True},
        }[critic]
        made.append(wrapper(make_net(**net_kwargs or {}), mask_id=MASK_ID, **critics, **kwargs))
    return made


def clean_batch(seed: int = 0, batch: int = BATCH) -> Tensor:
    return torch.randint(
        0, NUM_TOKENS - 1, (batch, LENGTH), generator=torch.Generator().manual_seed(seed)
    )


@pytest.mark.parametrize("method", ["__init__", "forward", "generate"])
def test_signatures(method):
    theirs = inspect.signature(getattr(Original, method)).parameters
    ours = inspect.signature(getattr(NonAutoregressiveWrapper, method)).parameters

    def facts(parameters):
        return [(p.name, p.kind, p.default) for p in parameters.values()]

    shared = [p for p in facts(ours) if p[0] in theirs]
    added = [p for p in facts(ours) if p[0] not in theirs]
    assert shared == facts(theirs)
    assert all(kind is inspect.Parameter.KEYWORD_ONLY for _, kind, _ in added)
    assert all(default is not inspect.Parameter.empty for _, _, default in added)


def test_losses_have_the_same_fields():
    from x_transformers.nonautoregressive_wrapper import Losses as TheirLosses

    assert Losses._fields == TheirLosses._fields
    assert Losses(1, 2, 3) == TheirLosses(1, 2, 3)


@pytest.mark.parametrize("self_cond", [False, True])
@pytest.mark.parametrize("critic", [None, "token_critic", "self_token_critic"])
def test_checkpoints_load_both_ways(self_cond, critic):
    theirs, ours = make_pair(self_cond=self_cond, critic=critic)
    state = theirs.state_dict()
    assert list(state) == list(ours.state_dict())
    for key, value in ours.state_dict().items():
        assert torch.equal(value, state[key]), f"{key} starts differently from the same seed"

    for source, target in ((theirs, ours), (ours, theirs)):
        with torch.no_grad():
            for parameter in source.parameters():
                parameter.normal_()
        target.load_state_dict(source.state_dict())
        for key, value in source.state_dict().items():
            assert torch.equal(value, target.state_dict()[key])


PUBLIC = """net dim num_tokens mask_id max_seq_len steps schedule_fn self_cond self_cond_train_prob
    no_replace_prob random_token_prob can_mask_prev_unmasked token_critic critic_loss_weight
    null_embed to_self_cond""".split()


def test_public_attributes():
    theirs, ours = make_pair(self_cond=True, critic="token_critic")
    for name in PUBLIC:
        expected, got = getattr(theirs, name), getattr(ours, name)
        if isinstance(expected, (int, float)):
            assert got == expected, name


SCRIPT = """
import torch
from x_transformers import Encoder, NonAutoregressiveWrapper, TransformerWrapper

def layers():
    return Encoder(dim=16, depth=1, heads=2, attn_dim_head=8)

def build(**kwargs):
    net = TransformerWrapper(num_tokens=12, max_seq_len=10, attn_layers=layers())
    return NonAutoregressiveWrapper(net, mask_id=11, steps=5, **kwargs)

torch.manual_seed(0)
data = torch.randint(0, 11, (4, 10))
critic = TransformerWrapper(num_tokens=12, max_seq_len=10, logits_dim=1, attn_layers=layers())
models = [
    build(),
    build(schedule="cosine", use_simple_mdlm_loss_weight=False, no_replace_prob=0.),
    build(schedule=lambda t: 1 - t ** 2, self_cond=True, can_mask_prev_unmasked=True),
    build(token_critic=critic, self_cond=True),
    build(self_token_critic=True, critic_loss_weight=0.5),
]
shapes = []
for i, model in enumerate(models):
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    has_critic = model.token_critic is not None
    parts = [{}]
    if has_critic:
        parts += [{"only_train_generator": True}, {"only_train_critic": True}]
    for step in range(3):
        for kwargs in parts:
            losses = model(data, generator_sample_temperature=0.5, **kwargs)
            losses.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            shapes.append([None if part is None else part.shape for part in losses])
    total, generator_loss, critic_loss = model(data)
    assert (critic_loss is not None) == has_critic

    torch.save(model.state_dict(), f"{folder}/{i}.pt")
    model.load_state_dict(torch.load(f"{folder}/{i}.pt"))
    for kwargs in ({}, {"start_temperature": 0.5}, {"filter_thres": 0.9, "noise_level_scale": 2.}):
        one, many = model.generate(**kwargs), model.generate(batch_size=3, **kwargs)
        shapes.append([one.shape, many.shape, one.dtype, model.training])
"""


@pytest.mark.seconds
def test_a_script_for_the_original_runs_unchanged(tmp_path):
    results = []
    imports = "from x_transformers import Encoder, NonAutoregressiveWrapper, TransformerWrapper"
    ours = (
        "from nar_kernels.wrapper import NonAutoregressiveWrapper\n"
        "from x_transformers import Encoder, TransformerWrapper"
    )
    assert SCRIPT.count(imports) == 1
    for i, script in enumerate((SCRIPT, SCRIPT.replace(imports, ours))):
        names = {"folder": str(tmp_path)}
        exec(script, names)
        module = names["NonAutoregressiveWrapper"].__module__
        assert module.startswith(("x_transformers", "nar_kernels")[i])
        results.append(names["shapes"])
    assert results[0] == results[1]


def run_original(model, batch: Tensor, seed: int) -> tuple[Losses, Tensor, Tensor]:
    """Its losses, what its net saw last, and its mask: the first things that it draws."""
    seen = []
    hook = model.net.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    torch.manual_seed(seed)
    random.seed(seed)
    losses = model(batch)
    hook.remove()

    torch.manual_seed(seed)
    times = torch.empty(len(batch)).uniform_(0, 1)
    rank = torch.rand(batch.shape).argsort(dim=-1).float()
    masked = rank < (model.schedule_fn(times) * LENGTH).clamp(min=1)[:, None]
    return losses, seen[-1], masked


def as_corrupted(batch: Tensor, input_ids: Tensor, masked: Tensor, ours) -> Corrupted:
    rows = masked.flatten().nonzero().flatten()
    return replace(
        corrupt(batch, ours.masking, seed=0),
        input_ids=input_ids,
        labels=batch.masked_fill(~masked, -100),
        masked_indices=masked,
        num_masked=masked.sum(1),
        row_buffer=nn.functional.pad(rows, (0, masked.numel() - len(rows))),
    )


@pytest.mark.parametrize(
    ("net_kwargs", "kwargs"),
    [
        ({}, {}),
        ({"tie_embedding": True}, {"schedule": "cosine"}),
        ({"mixture_of_softmax": True}, {}),  # output_is_log_prob
        ({}, {"self_cond": True, "self_cond_train_prob": 1.0}),
        ({}, {"self_cond": True, "self_cond_train_prob": 0.0}),
    ],
)
def test_loss_and_gradients_on_identical_masks(net_kwargs, kwargs):
    theirs, ours = make_pair(net_kwargs, use_simple_mdlm_loss_weight=False, **kwargs)
    for seed in range(8):  # its coins fall each way
        batch = clean_batch(seed)
        expected, input_ids, masked = run_original(theirs, batch, seed)
        got = ours(as_corrupted(batch, input_ids, masked, ours))
        assert got.loss.item() == pytest.approx(expected.loss.item(), abs=1e-6)
        for model, losses in ((theirs, expected), (ours, got)):
            model.zero_grad()
            losses.loss.backward()
        for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), name
            if p.grad is not None:
                torch.testing.assert_close(p.grad, q.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("steps", [1, 4, 18])
@pytest.mark.parametrize("self_cond", [False, True])
@pytest.mark.parametrize("critic", [None, "token_critic", "self_token_critic"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_generate_without_noise_is_the_same(steps, self_cond, critic, schedule):
    """At temperature 0 both are deterministic. The original must be kept from drawing mask_id."""
    pair = make_pair(steps=steps, self_cond=self_cond, critic=critic, schedule=schedule)
    generated = []
    for model in pair:
        model.net.to_logits.register_forward_hook(
            lambda _, __, logits: logits - 1e4 * F.one_hot(torch.tensor(MASK_ID), NUM_TOKENS)
        )
        generated.append(model.generate(3, start_temperature=0.0, noise_level_scale=0.0))
    assert torch.equal(*generated)


@pytest.mark.parametrize(
    ("wrapper", "learns"), [(NonAutoregressiveWrapper, True), (Original, False)]
)
def test_training_with_default_arguments_learns(wrapper, learns):
    """The original's default weight is negative: it drives the cross-entropy up."""
    torch.manual_seed(0)
    random.seed(0)
    model = wrapper(make_net(), mask_id=MASK_ID)
    batch = clean_batch(batch=1).expand(16, -1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    def cross_entropy() -> float:
        inputs = batch[:1].repeat(LENGTH, 1)
        inputs.fill_diagonal_(MASK_ID)
        return F.cross_entropy(model.net(inputs).diagonal().T, batch[0]).item()

    before = cross_entropy()
    for _ in range(60):
        model(batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if learns:
        assert cross_entropy() < 0.5 * before
    else:
        assert cross_entropy() > 1.5 * before
