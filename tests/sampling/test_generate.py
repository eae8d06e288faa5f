"""`NonAutoregressiveWrapper.generate`: its arguments are those of x-transformers, too."""

import pytest
import torch
from torch import nn

from nar_kernels.sampling.config import SamplingConfig
from tests.helpers.models import LENGTH, MASK_ID, NUM_TOKENS, clean_batch, make_model, make_net

pytestmark = pytest.mark.usefixtures("one_thread")


class Lover(nn.Module):
    """A net that wants mask_id everywhere; with ``only``, nothing else at all."""

    num_tokens, max_seq_len = NUM_TOKENS, LENGTH

    def __init__(self, mask_id: int, only: bool) -> None:
        super().__init__()
        self.logits = torch.full((NUM_TOKENS,), -torch.inf if only else 0.0)
        self.logits[mask_id] = 1e4

    def forward(self, ids):
        return self.logits.expand(*ids.shape, -1)


@pytest.mark.parametrize("mask_id", [0, MASK_ID, NUM_TOKENS - 1])
@pytest.mark.parametrize("only", [False, True])
@pytest.mark.parametrize("filter_thres", [None, 0.0, 0.7, 1.0])
def test_never_generates_mask_id(mask_id, only, filter_thres):
    model = make_model(Lover(mask_id, only), mask_id=mask_id)
    ids = model.generate(16, filter_thres=filter_thres)
    assert ((ids >= 0) & (ids < NUM_TOKENS) & (ids != mask_id)).all()


@pytest.mark.parametrize("self_cond", [False, True])
@pytest.mark.parametrize("critic", [{}, {"self_token_critic": True}, {"token_critic": 1}])
@pytest.mark.parametrize("can_mask_prev_unmasked", [False, True])
@pytest.mark.parametrize("steps", [1, 12])
def test_generate_with_all_arguments(self_cond, critic, can_mask_prev_unmasked, steps):
    if "token_critic" in critic:
        critic = {"token_critic": make_net(logits_dim=1)}
    model = make_model(
        self_cond=self_cond, can_mask_prev_unmasked=can_mask_prev_unmasked, steps=steps, **critic
    )
    for batch_size, kwargs in [
        (None, {}),
        (1, {"start_temperature": 0.0}),
        (3, {"filter_thres": None, "noise_level_scale": 0.0}),
        (2, {"filter_thres": 1.0, "start_temperature": 10.0}),
    ]:
        ids = model.generate(batch_size, **kwargs)
        assert ids.shape == ((LENGTH,) if batch_size is None else (batch_size, LENGTH))
        assert ids.dtype == torch.int64
        assert ((ids >= 0) & (ids < NUM_TOKENS) & (ids != MASK_ID)).all()


def test_generate_repeats_by_seed_and_manual_seed():
    model = make_model()
    state = torch.get_rng_state()
    one = model.generate(4, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one, model.generate(4, seed=7))
    assert not torch.equal(one, model.generate(4, seed=8))

    torch.manual_seed(1)
    first, second = model.generate(4), model.generate(4)
    torch.manual_seed(1)
    assert torch.equal(model.generate(4), first)
    assert not torch.equal(first, second)


def test_generate_restores_every_modules_mode():
    model = make_model(make_net(dropout=0.5), token_critic=make_net(logits_dim=1))
    model.token_critic.eval()  # frozen by the user
    modes = [m.training for m in model.modules()]
    during = []
    model.net.register_forward_pre_hook(lambda *_: during.append(model.net.attn_layers.training))
    model.generate()
    assert not any(during)
    assert [m.training for m in model.modules()] == modes

    for _ in model.generate_steps():
        assert [m.training for m in model.modules()] == modes  # also in between

    def fail(*_):
        raise KeyboardInterrupt

    model.net.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        model.generate()
    assert [m.training for m in model.modules()] == modes


@pytest.mark.parametrize("filter_thres", [-0.1, 1.1])
def test_filter_out_of_range(filter_thres):
    with pytest.raises(ValueError, match="filter_thres is"):
        make_model().generate(filter_thres=filter_thres)


class Favourites(nn.Module):
    """A net for which the first ids are always the most probable ones."""

    num_tokens, max_seq_len = NUM_TOKENS, LENGTH

    def forward(self, ids):
        return (-0.5 * torch.arange(NUM_TOKENS)).expand(*ids.shape, -1)


def test_generates_from_the_nucleus():
    model = make_model(Favourites(), mask_id=1)
    options = dict(strategy="random", steps=4)
    args = dict(options, filter_thres=None, start_temperature=4 / 3, seed=2)
    ids = model.generate(32, top_p=0.8, **args)
    # The first step has temperature 1, at which ids 0, 2 and 3 have 0.56, 0.20 and 0.12.
    assert set(ids.flatten().tolist()) == {0, 2, 3}
    assert len(set(model.generate(32, **args).flatten().tolist())) > 5
    config = SamplingConfig(**options, temperature=4 / 3, top_p=0.8)
    assert torch.equal(model.sample(config, 32, seed=2).last().ids, ids)


def test_a_head_without_a_column_for_the_mask_token():
    last = NUM_TOKENS - 1
    model = make_model(make_net(logits_dim=last), mask_id=last, self_token_critic=True)
    model(clean_batch().clamp(max=last - 1)).loss.backward()
    for filter_thres in (None, 0.0, 0.7):
        ids = model.generate(32, start_temperature=50.0, filter_thres=filter_thres)
        assert ids.max() < last


def test_learns_and_generates_what_it_has_seen():
    model = make_model(self_token_critic=True, schedule="cosine")
    rows = clean_batch(2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    torch.manual_seed(0)
    for _ in range(120):
        model(rows.repeat(8, 1)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    generated = model.generate(16, seed=0)
    matches = (generated[:, None] == rows).all(-1)
    assert matches.any(1).float().mean() > 0.8
