"""Token critics: what they learn, and what they do not judge."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nar_kernels.ops.corrupt import corrupt
from tests.helpers.models import MASK_ID, NUM_TOKENS, Recorder, clean_batch, make_model, make_net

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_critic_that_does_not_return_scores():
    model = make_model(token_critic=make_net())
    with pytest.raises(TypeError, match=r"token_critic returned shape \[6, 10, 12\]"):
        model(clean_batch())


def critic_call(**kwargs):
    """A forward with recording generator and critic: the critic's input and its loss."""
    critic = Recorder(num_outputs=1)
    model = make_model(Recorder(), token_critic=critic, **kwargs)
    losses = model(clean_batch(64), seed=0, net_kwargs={"context": "for the generator only"})
    return model, critic, losses


def test_critic_labels_are_what_was_sampled_wrongly():
    model, critic, losses = critic_call()
    clean, judged = clean_batch(64), critic.inputs[0]
    masked = corrupt(clean, model.masking, seed=0).masked_indices
    wrong = judged != clean
    assert not (wrong & ~masked).any()
    assert (wrong & masked).any() and (~wrong & masked).any()
    assert (judged != MASK_ID).all()
    assert critic.kwargs == [{}]
    expected = F.binary_cross_entropy_with_logits(critic.table(judged).squeeze(-1), wrong.float())
    torch.testing.assert_close(losses.critic_loss, expected)


@pytest.mark.parametrize("num_maskable", [0, 1, 10])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_what_a_critic_judges_with_static_shapes(dtype, num_maskable):
    """Padding of the masked rows changes nothing, nor does the type of ids."""
    critic = Recorder(num_outputs=1)
    model = make_model(Recorder(), token_critic=critic)
    maskable = (torch.arange(10) < num_maskable).expand(6, 10)
    batch = corrupt(clean_batch(), model.masking, seed=0, maskable=maskable, ids_dtype=dtype)
    losses = [model(batch, seed=3, static_shapes=s).critic_loss for s in (False, True)]
    assert torch.equal(*critic.inputs) and torch.equal(*losses)
    assert critic.inputs[0].dtype == torch.int64
    assert not ((critic.inputs[0] != clean_batch()) & ~batch.masked_indices).any()


def test_a_perfect_critic_has_no_loss():
    """Possible only if the labels agree with what the critic sees: not so in the original."""

    class Perfect(nn.Module):
        def forward(self, ids):
            return torch.where(ids == clean_batch(), -50.0, 50.0)[..., None]

    losses = make_model(token_critic=Perfect())(clean_batch())
    assert losses.critic_loss.item() < 1e-6


def test_critic_weight_and_which_part_is_trained():
    model = make_model(token_critic=make_net(logits_dim=1), critic_loss_weight=0.25)
    batch = clean_batch()
    total, generator_loss, critic_loss = model(batch, seed=0)
    assert total.item() == pytest.approx(generator_loss.item() + 0.25 * critic_loss.item())

    generator_only = model(batch, only_train_generator=True, seed=0)
    assert generator_only == (generator_loss, generator_loss, None)

    critic_only = model(batch, only_train_critic=True, seed=0)
    assert critic_only == (critic_loss, None, critic_loss)
    critic_only.loss.backward()
    assert all(p.grad is None for p in model.net.parameters())
    assert any(p.grad is not None for p in model.token_critic.parameters())


def test_only_train_critic_without_a_critic():
    with pytest.raises(ValueError, match="only_train_critic needs"):
        make_model()(clean_batch(), only_train_critic=True)
    with pytest.raises(ValueError, match="exclude each other"):
        make_model(self_token_critic=True)(
            clean_batch(), only_train_critic=True, only_train_generator=True
        )


def test_sample_temperature():
    net = Recorder()
    with torch.no_grad():
        net.table.weight.copy_(torch.eye(NUM_TOKENS) * 3)  # prefers the id that it sees
    net.table.weight.data[MASK_ID, 7] = 3.0

    def judged(temperature):
        critic = Recorder(num_outputs=1)
        model = make_model(net, token_critic=critic, no_replace_prob=0, random_token_prob=0)
        model(clean_batch(64), generator_sample_temperature=temperature, seed=0)
        masked = net.inputs[-1] == MASK_ID
        return critic.inputs[0][masked]

    assert (judged(0.0) == 7).all()
    assert judged(100.0).bincount(minlength=NUM_TOKENS).min() == 0  # mask_id
    assert (judged(100.0) == 7).float().mean() < 0.3
    assert judged(None).unique().numel() > 1


def test_a_critic_does_not_judge_what_is_not_known():
    critic = Recorder(num_outputs=1)
    model = make_model(Recorder(), token_critic=critic)
    batch = corrupt(clean_batch(), model.masking, seed=0)
    known = batch.clean_ids
    batch.labels[:, :4] = -100
    ignored = batch.masked_indices.clone()
    ignored[:, 4:] = False
    losses = model(batch, seed=1)
    judged = critic.inputs[0]
    assert ((judged >= 0) & (judged < NUM_TOKENS) & (judged != MASK_ID)).all() and ignored.any()
    scores = critic.table(judged).squeeze(-1)
    each = F.binary_cross_entropy_with_logits(scores, (judged != known).float(), reduction="none")
    torch.testing.assert_close(losses.critic_loss, each[~ignored].mean())
    assert losses.loss.isfinite()
