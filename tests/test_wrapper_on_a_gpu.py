"""Clean ids through the wrapper on a GPU, also on one of several: the host runs ahead of it."""

import copy
import pickle

import pytest
import torch

from nar_kernels import InvalidTokenError
from nar_kernels import wrapper as wrapper_module
from tests.helpers.models import MASK_ID, clean_batch, make_model
from tests.helpers.pretend_gpu import DEVICE, pretend_gpu

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=[1, 2])
def ranks(request, monkeypatch):
    monkeypatch.setattr(wrapper_module.distributed, "world_size", lambda: request.param)
    monkeypatch.setattr(wrapper_module.distributed, "rank", lambda: request.param - 1)
    return request.param


@pytest.mark.parametrize("draw", ["exact", "bernoulli"])
@pytest.mark.parametrize("static_shapes", [False, True])
def test_clean_ids_wait_for_nothing(static_shapes, draw, ranks):
    """Where masks depend on nothing but slots, the host counts them; with static shapes it need not
    count. What it waits for is the check of the batch before."""
    options = dict(average_tokens_across_devices=False, draw=draw)
    expected = make_model(**options)
    of_cpu = [expected(clean_batch(), seed=seed).loss for seed in range(3)]
    of_cpu[-1].backward()
    with pretend_gpu() as gpu:
        model = make_model(**options).to(DEVICE)
        ids = clean_batch().to(DEVICE)
        for seed, wanted in enumerate(of_cpu):
            gpu.waits.clear()
            model.zero_grad()
            loss = model(ids, seed=seed, static_shapes=static_shapes).loss
            loss.backward()
            if seed > 0:  # the first call copies the tables
                assert gpu.waits == ["Event.synchronize"]
            torch.testing.assert_close(loss.detach().inner, wanted.detach())
        for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(ours.grad.inner, theirs.grad)


def test_positions_that_may_be_masked(ranks):
    """Only the device knows how many are."""
    maskable = torch.rand(clean_batch().shape, generator=torch.Generator().manual_seed(0)) < 0.7
    with pretend_gpu() as gpu:
        model = make_model(average_tokens_across_devices=False).to(DEVICE)
        ids, allowed = clean_batch().to(DEVICE), maskable.to(DEVICE)
        waits = []
        for static_shapes in (True, True, False):
            gpu.waits.clear()
            model(ids, seed=0, maskable=allowed, static_shapes=static_shapes).loss.backward()
            waits.append([x for x in gpu.waits if x != "Event.synchronize"])
        assert waits[1] == [] and {*waits[2]} == {"aten._local_scalar_dense"}


def test_torch_compile_defers_the_check_too(monkeypatch):
    with pretend_gpu() as gpu:
        model = make_model().to(DEVICE)
        bad = clean_batch()
        bad[2, 3] = MASK_ID
        bad = bad.to(DEVICE)
        model(clean_batch().to(DEVICE), seed=0)
        gpu.waits.clear()
        with monkeypatch.context() as tracing:
            tracing.setattr(torch.compiler, "is_compiling", lambda: True)
            model(bad, seed=0, static_shapes=True)
        assert gpu.waits == ["Event.synchronize"]
        with pytest.raises(InvalidTokenError, match="of the batch before this call"):
            model.raise_if_invalid()


def test_an_invalid_id_is_reported_by_the_next_call():
    with pretend_gpu():
        model = make_model().to(DEVICE)
        bad = clean_batch()
        bad[2, 3] = MASK_ID
        bad = bad.to(DEVICE)
        for call in (lambda: model(clean_batch().to(DEVICE)), model.raise_if_invalid):
            assert model(bad).loss.inner.isfinite()
            for copied in (
                copy.deepcopy(model._deferred_check),
                pickle.dumps(model._deferred_check),
            ):
                assert getattr(copied, "_pending", None) is None
            message = rf"id {MASK_ID} at tokens\[2, 3\] of the batch before this call equals"
            with pytest.raises(InvalidTokenError, match=message):
                call()
            model.raise_if_invalid()  # said once


def test_an_invalid_id_on_the_cpu_is_reported_at_once():
    bad = clean_batch()
    bad[2, 3] = MASK_ID
    model = make_model()
    with pytest.raises(InvalidTokenError, match=r"tokens\[2, 3\]"):
        model(bad)
    model.raise_if_invalid()


def test_a_critic_with_static_shapes():
    """It learns from the same ids: padding draws those of the rows that it repeats."""
    model = make_model(token_critic=torch.nn.Sequential(torch.nn.Embedding(12, 1)))
    losses, static = (model(clean_batch(), seed=3, static_shapes=s) for s in (False, True))
    for x, y in zip(losses, static, strict=True):
        torch.testing.assert_close(x, y)
