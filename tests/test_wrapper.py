"""NonAutoregressiveWrapper: its arguments, input checks, and what other trainers do with it."""

import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from nar_kernels.errors import InvalidTokenError
from nar_kernels.losses import Losses
from nar_kernels.nets.adapter import NetAdapter, net_attribute
from nar_kernels.ops.corrupt import corrupt
from nar_kernels.ops.masking import MaskingConfig
from tests.helpers.models import (
    BATCH,
    LENGTH,
    MASK_ID,
    NUM_TOKENS,
    Recorder,
    clean_batch,
    hugging_face_net,
    make_model,
    make_net,
    masks_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")


# Construction


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"mask_id": NUM_TOKENS}, r"mask_id 12 is not in \[0, num_tokens\)"),
        ({"schedule": "linaer"}, "unknown schedule 'linaer'"),
        ({"schedule": lambda t: t}, "increases"),
        ({"steps": 0}, "steps is 0"),
        ({"no_replace_prob": 1.5}, "no_replace_prob is 1.5"),
        ({"draw": "both"}, "draw is 'both'"),
        ({"token_critic": nn.Identity(), "self_token_critic": True}, "not both"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_model(**kwargs)


def test_a_net_without_the_attributes():
    with pytest.raises(TypeError, match=r"Linear has no attribute 'max_seq_len': .*NetAdapter\("):
        make_model(nn.Linear(2, 2))


@pytest.mark.parametrize("feature", ["self_cond", "self_token_critic"])
@pytest.mark.parametrize("adapted", [False, True])
def test_a_net_without_embeddings_serves_no_self_conditioning(feature, adapted):
    net = Recorder()
    if adapted:
        net = NetAdapter(net, num_tokens=NUM_TOKENS, max_seq_len=LENGTH)
    with pytest.raises(ValueError, match=f"{feature} needs the net's embeddings"):
        make_model(net, **{feature: True})


class Replica(nn.Module):
    """Like DistributedDataParallel: no attributes but those of a module, and ``module``."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def test_a_net_inside_a_parallel_wrapper():
    model = make_model(Replica(make_net()), self_cond=True, self_token_critic=True)
    assert (model.num_tokens, model.max_seq_len, model.dim) == (NUM_TOKENS, LENGTH, 16)
    model(clean_batch()).loss.backward()
    assert model.generate().shape == (LENGTH,)
    assert net_attribute(Replica(Replica(make_net())), "emb_dim") == 16


def test_masking_can_be_exchanged_but_not_silently_ignored():
    model = make_model()
    with pytest.raises(AttributeError):
        model.no_replace_prob = 0.0
    model.masking = replace(model.masking, no_replace_prob=0.0)
    assert model.no_replace_prob == 0.0


def test_copies():
    model = make_model(self_cond=True, self_token_critic=True, schedule="cosine")
    batch = clean_batch()
    expected = model(batch, seed=1)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.to("cpu")):
        assert other.token_critic.net is other.net
        assert other(batch, seed=1) == expected
    assert model.double()(batch, seed=1).loss.dtype == torch.float64


# Input checks: the net must not see bad data


@pytest.mark.parametrize("bad", [-1, NUM_TOKENS, 10**6, MASK_ID])
def test_bad_ids(bad):
    net = Recorder()
    batch = clean_batch()
    batch[2, 3] = bad
    with pytest.raises(InvalidTokenError, match=rf"token id {bad} at tokens\[2, 3\]"):
        make_model(net)(batch)
    assert net.inputs == []


@pytest.mark.parametrize("shape", [(LENGTH,), (BATCH, LENGTH - 1), (BATCH, LENGTH + 1), (1, 1, 1)])
def test_wrong_shapes(shape):
    net = Recorder()
    with pytest.raises(ValueError, match=r"x has shape .* must be \[batch, 10\]"):
        make_model(net)(torch.zeros(shape, dtype=torch.int64))
    assert net.inputs == []


def test_a_batch_corrupted_at_another_length():
    batch = corrupt(clean_batch(length=LENGTH + 1), MaskingConfig(NUM_TOKENS, MASK_ID), seed=0)
    with pytest.raises(ValueError, match=r"x has shape \[6, 11\]: it must be \[batch, 10\]"):
        make_model()(batch)


def test_ids_that_are_not_integers():
    with pytest.raises(TypeError, match="float32"):
        make_model()(torch.zeros(BATCH, LENGTH))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.uint16])
def test_other_integer_types(dtype):
    model = make_model()
    assert model(clean_batch().to(dtype), seed=0) == model(clean_batch(), seed=0)


@pytest.mark.parametrize(("num_tokens", "mask_id"), [(NUM_TOKENS + 1, MASK_ID), (NUM_TOKENS, 0)])
def test_a_batch_corrupted_for_another_vocabulary(num_tokens, mask_id):
    batch = torch.full((BATCH, LENGTH), 5)
    batch = corrupt(batch, MaskingConfig(num_tokens, mask_id), seed=0)
    with pytest.raises(ValueError, match="the batch was corrupted for"):
        make_model()(batch)


def test_an_invalid_corrupted_batch():
    batch = corrupt(clean_batch(), MaskingConfig(NUM_TOKENS, MASK_ID), seed=0)
    batch = replace(batch, invalid=torch.tensor([1, 13, 99, 0, 0]))
    with pytest.raises(InvalidTokenError, match=r"token id 99 at tokens\[1, 3\]"):
        make_model()(batch)


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (make_net(return_only_embed=True), r"shape \[6, 10, 16\]"),
        (make_net(logits_dim=NUM_TOKENS - 1), r"shape \[6, 10, 11\]"),
        (make_net(logits_dim=NUM_TOKENS + 4), r"shape \[6, 10, 16\]"),
        (make_net(num_output_heads=2), "tuple"),
    ],
)
def test_a_net_that_does_not_return_logits(net, message):
    with pytest.raises(TypeError, match=f"the net returned {message}"):
        make_model(net)(clean_batch())


# What other trainers do with it


def test_losses_are_a_named_tuple_and_what_transformers_makes_of_one():
    losses = make_model()(clean_batch(), seed=0)
    loss, generator_loss, critic_loss = losses
    assert losses._fields == ("loss", "generator_loss", "critic_loss") and critic_loss is None
    assert losses == Losses(loss, generator_loss, None) == losses._replace(critic_loss=None)
    assert Losses(loss=loss, generator_loss=None, critic_loss=loss).critic_loss is loss
    assert pickle.loads(pickle.dumps(Losses(1.0, 2.0, None))) == Losses(1.0, 2.0, None)
    leaves, spec = tree_flatten(losses)
    assert type(tree_unflatten(leaves, spec)) is Losses
    assert losses[1:] == (generator_loss,) and losses[2] is None  # `outputs[1:]` of transformers
    # `nested_detach` of transformers: type(tensors)(f(t) for t in tensors)
    assert type(losses)(t if t is None else t.detach() for t in losses) == (loss, generator_loss)


@pytest.mark.parametrize("kind", ["tied", "self critic", "buffers"])
def test_a_state_dict_shares_no_memory(kind, tmp_path):
    from safetensors.torch import load_file, save_file

    if kind == "tied":
        net = hugging_face_net()
        net.net.cls.predictions.decoder.weight = net.net.bert.embeddings.word_embeddings.weight
        make = lambda: make_model(net)  # noqa: E731
    elif kind == "self critic":
        make = lambda: make_model(self_token_critic=True)  # noqa: E731
    else:
        net = make_net()
        net.register_buffer("one", torch.arange(4.0))
        net.register_buffer("other", net.one[1:])
        make = lambda: make_model(net)  # noqa: E731
    model = make()
    state = model.state_dict()
    save_file(state, tmp_path / "model.safetensors")
    loaded = load_file(tmp_path / "model.safetensors")
    assert loaded.keys() == state.keys()
    model.load_state_dict(loaded)
    kept = model.state_dict(keep_vars=True)  # the parameters themselves
    assert all(kept[name] is parameter for name, parameter in model.named_parameters())
    with torch.device("meta"):
        empty = make_model(self_token_critic=True).state_dict()
    assert all(value.is_meta for value in empty.values())


def test_the_default_type_changes_no_count():
    model, expected = make_model(), make_model().generate(3, seed=0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        masking = MaskingConfig(NUM_TOKENS, MASK_ID, schedule="cosine")
        assert torch.equal(model.generate(3, seed=0), expected)
    finally:
        torch.set_default_dtype(torch.float32)
    wanted = MaskingConfig(NUM_TOKENS, MASK_ID, schedule="cosine")
    assert all(map(torch.equal, masking.table, wanted.table))


@pytest.mark.parametrize("kind", [np.int64, np.uint8, torch.tensor])
def test_integers_of_any_kind_are_plain_inside(kind):
    class Sized(Recorder):
        num_tokens, max_seq_len = kind(NUM_TOKENS), kind(LENGTH)

    model = make_model(Sized(), mask_id=kind(MASK_ID), steps=kind(4), never_mask_ids=[kind(1)])
    values = model.masking.num_tokens, model.masking.mask_id, model.steps, model.max_seq_len
    assert all(type(value) is int for value in (*values, *model.masking.never_mask_ids))
    assert torch.equal(masks_of(model, seed=kind(3)), masks_of(model, seed=3))
    for wrong in (1.5, "1", None):
        with pytest.raises(TypeError, match=f"mask_id is {wrong!r}: it must be an int"):
            make_model(mask_id=wrong)
