"""The iterator of states: eval mode and locks for each step, and the net as it is by then."""

import threading

import pytest
import torch
from torch import nn

from nar_kernels import NonAutoregressiveWrapper, SamplingConfig
from nar_kernels.nets.modes import ModeLocks
from tests.helpers.models import LENGTH, MASK_ID, NUM_TOKENS, make_model

pytestmark = pytest.mark.usefixtures("one_thread")


def transformer(**options) -> NonAutoregressiveWrapper:
    x_transformers = pytest.importorskip("x_transformers")
    layers = x_transformers.Encoder(dim=16, depth=1, heads=2)
    net = x_transformers.TransformerWrapper(
        num_tokens=NUM_TOKENS, max_seq_len=LENGTH, attn_layers=layers, **options
    )
    return NonAutoregressiveWrapper(net, mask_id=MASK_ID)


def test_last_goes_on_from_any_state():
    model = make_model()
    expected = list(model.generate_steps(2, seed=0))
    for taken in (0, 1, 3, len(expected)):
        states = model.generate_steps(2, seed=0)
        assert [next(states).step for _ in range(taken)] == list(range(taken))
        assert torch.equal(states.last().ids, expected[-1].ids)
        assert torch.equal(states.last().ids, expected[-1].ids)  # again
        with pytest.raises(StopIteration):
            next(states)


def test_an_error_is_not_taken_for_the_end():
    def fail(logits, rows):
        raise OSError("no more")

    states = make_model().generate_steps(2, seed=0, logits_processor=fail)
    assert next(states).masked.all()
    for call in (lambda: next(states), states.last, lambda: list(states)):
        with pytest.raises(OSError, match="no more"):
            call()


def test_the_first_state_waits_for_nobody():
    """It needs no net, which another thread may be training."""
    model = make_model()
    training, done = threading.Event(), threading.Event()

    def train():
        with ModeLocks(model.net):
            training.set()
            done.wait(60)

    thread = threading.Thread(target=train)
    thread.start()
    assert training.wait(60)
    try:
        states = model.generate_steps(2, seed=0)
        assert next(states).masked.all()
    finally:
        done.set()
        thread.join()
    assert not states.last().masked.any()


def test_a_parameter_that_is_replaced_between_states():
    model = transformer()
    states = model.sample(SamplingConfig(steps=4, temperature=0.0), 2, seed=0)
    assert next(states).masked.all()
    before = next(states)
    model.net.to_logits.weight = nn.Parameter(torch.zeros_like(model.net.to_logits.weight))
    after = states.last()
    assert (after.ids[before.masked] == 0).all()
    assert torch.equal(after.ids[~before.masked], before.ids[~before.masked])


@pytest.mark.parametrize("option", [{"sigsoftmax_logits": True}, {"mixture_of_softmax": True}])
def test_a_trunk_without_its_head_is_in_eval_mode(option):
    """In training mode the net would draw how often it recycles."""
    model = transformer(recycling=True, train_max_recycle_steps=4, **option)
    assert model.training
    with pytest.raises(AssertionError, match="recycle_steps"):
        model.generate(1, seed=0)
    assert model.training and model.net.training


def test_flags_of_any_kind():
    model = make_model()
    one = model.generate(2, seed=0, can_mask_prev_unmasked=1)
    assert torch.equal(one, model.generate(2, seed=0, can_mask_prev_unmasked=True))
