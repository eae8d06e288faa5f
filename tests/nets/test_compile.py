"""`torch.compile` of a net, an adapter or a wrapper, in any order."""

import warnings

import pytest
import torch

from nar_kernels import NonAutoregressiveWrapper
from tests.helpers.nets_of_users import IDS, MASK_ID, Net, adapted, transformer

pytestmark = [pytest.mark.seconds, pytest.mark.usefixtures("one_thread")]


def compiled_whole(backend):
    return torch.compile(NonAutoregressiveWrapper(adapted(Net()), mask_id=MASK_ID), backend=backend)


def compiled_method(backend):
    model = NonAutoregressiveWrapper(adapted(Net()), mask_id=MASK_ID)
    model.compile(backend=backend)
    return model


def compiled_adapter_method(backend):
    model = NonAutoregressiveWrapper(adapted(Net()), mask_id=MASK_ID)
    model.net.compile(backend=backend)
    return model


def compiled_net_method(backend):
    model = NonAutoregressiveWrapper(adapted(Net()), mask_id=MASK_ID)
    model.net.net.compile(backend=backend)
    return model


def compiled_adapter(backend):
    net = torch.compile(adapted(Net()), backend=backend)
    return NonAutoregressiveWrapper(net, mask_id=MASK_ID)


def compiled_net(backend):
    net = Net()
    inner = torch.compile(net, backend=backend)
    return NonAutoregressiveWrapper(adapted(inner, net.head), mask_id=MASK_ID)


def compiled_forward(backend):
    net = Net()
    net.forward = torch.compile(net.forward, backend=backend)
    return NonAutoregressiveWrapper(adapted(net), mask_id=MASK_ID)


def compiled_transformer(backend):
    return NonAutoregressiveWrapper(torch.compile(transformer(), backend=backend), mask_id=MASK_ID)


def compiled_around_a_transformer(backend):
    return torch.compile(NonAutoregressiveWrapper(transformer(), mask_id=MASK_ID), backend=backend)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    "make",
    [
        *(compiled_whole, compiled_method, compiled_adapter_method, compiled_net_method),
        *(compiled_adapter, compiled_net, compiled_forward, compiled_transformer),
        compiled_around_a_transformer,
    ],
    ids=lambda make: make.__name__,
)
def test_any_order_of_wrapping_and_compiling(make, backend):
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of dynamo
        model = make(backend)
        is_transformer = "transformer" in make.__name__
        plain = NonAutoregressiveWrapper(
            transformer() if is_transformer else adapted(Net()), mask_id=MASK_ID
        )
        for seed in range(3):
            losses, expected = model(IDS, seed=seed), plain(IDS, seed=seed)
            torch.testing.assert_close(losses.loss, expected.loss)
            losses.loss.backward()
            expected.loss.backward()
        for a, b in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)
        assert torch.equal(model.generate(3, seed=0), plain.generate(3, seed=0))
