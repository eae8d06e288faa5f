"""`NetAdapter` around nets that do something with their logits, or that users change."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nar_kernels import NetAdapter, NonAutoregressiveWrapper
from tests.helpers.models import Recorder
from tests.helpers.nets_of_users import (
    IDS,
    LENGTH,
    MASK_ID,
    NUM_TOKENS,
    RARE,
    Halved,
    Lora,
    Net,
    adapted,
    whole_loss,
    with_forward_hook,
    with_other_forward,
)

pytestmark = pytest.mark.usefixtures("one_thread")


class Scaled(Net):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) / 2


class InPlace(Net):
    def forward(self, ids: Tensor) -> Tensor:
        logits = super().forward(ids)
        logits[..., RARE:] = -30.0
        return logits


class Filled(Net):
    """By a method that writes where elements share their memory."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids).masked_fill_(torch.arange(NUM_TOKENS) >= RARE, -30.0)


class Sliced(Net):
    def forward(self, ids: Tensor) -> Tensor:
        logits = super().forward(ids)
        logits[..., RARE:].fill_(-30.0)
        return logits


class Looking(Net):
    """What it does depends on the values."""

    def forward(self, ids: Tensor) -> Tensor:
        logits = super().forward(ids)
        if logits.abs().max() > 0.5:
            logits = logits / 2
        return logits


class Viewed(Net):
    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.e(ids).flatten(0, 1)).view(*ids.shape, NUM_TOKENS)


class Twice(Net):
    def forward(self, ids: Tensor) -> Tensor:
        first = super().forward(ids)
        return super().forward(first.argmax(-1).clamp(max=MASK_ID - 1))


CLASSES = [Scaled, InPlace, Filled, Sliced, Viewed, Twice]


@pytest.mark.parametrize(
    ("cls", "mode"),
    [
        *((c, mode) for c in CLASSES for mode in ("train", "no_grad", "inference", "compiled")),
        *((Looking, mode) for mode in ("train", "no_grad", "inference")),  # compiled: not noticed
    ],
)
def test_an_adapter_notices_that_its_head_is_not_the_last(cls, mode):
    net = cls()
    inner = torch.compile(net, backend="eager") if mode == "compiled" else net
    model = NonAutoregressiveWrapper(adapted(inner, net.head), mask_id=MASK_ID)
    plain = NonAutoregressiveWrapper(adapted(net, knows=False), mask_id=MASK_ID)
    contexts = {"no_grad": torch.no_grad, "inference": torch.inference_mode}
    with contexts.get(mode, torch.enable_grad)(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?!NetAdapter)")  # of dynamo
        with pytest.warns(UserWarning, match="does more than return the output of its head"):
            got = model(IDS, seed=0).loss
        torch.testing.assert_close(got, plain(IDS, seed=0).loss)
        again = model(IDS, seed=1).loss  # without another warning
        torch.testing.assert_close(again, plain(IDS, seed=1).loss)
        assert torch.equal(model.generate(3, seed=0), plain.generate(3, seed=0))


def test_an_adapter_raises_what_the_net_raises():
    class Failing(Net):
        def forward(self, ids: Tensor) -> Tensor:
            super().forward(ids)
            raise LookupError("of the net itself")

    model = NonAutoregressiveWrapper(adapted(Failing()), mask_id=MASK_ID)
    with pytest.raises(LookupError, match="of the net itself"):
        model(IDS)
    assert model.net.output_head is model.net.net.head  # no judgement on the head


ADAPTED = {
    "a hook of the head": lambda net: with_forward_hook(net.head),
    "a hook of the net": with_forward_hook,
    "another forward of the head": lambda net: with_other_forward(net.head),
    "another forward of the net": with_other_forward,
    "a parametrization": lambda net: parametrize.register_parametrization(
        net.head, "weight", Halved()
    ),
}


@pytest.mark.parametrize("name", ADAPTED)
@pytest.mark.parametrize("before", [True, False])
def test_what_users_change_in_an_adapted_net(name, before):
    """Before it is adapted or later; without a warning, since nothing was promised wrongly."""
    net = Net()
    if before:
        ADAPTED[name](net)
    model = NonAutoregressiveWrapper(adapted(net), mask_id=MASK_ID)
    if not before:
        ADAPTED[name](net)
    torch.testing.assert_close(model(IDS, seed=0).loss, whole_loss(net, model, 0))
    plain = NonAutoregressiveWrapper(adapted(net, knows=False), mask_id=MASK_ID)
    assert torch.equal(model.generate(8, seed=0), plain.generate(8, seed=0))


def test_one_call_that_uses_logits_says_nothing_of_others():
    class Judging(Net):
        def forward(self, ids: Tensor, targets: Tensor | None = None) -> Tensor:
            logits = super().forward(ids)
            if targets is not None:
                F.cross_entropy(logits.flatten(0, 1), targets.flatten())
            return logits

    model = NonAutoregressiveWrapper(adapted(Judging()), mask_id=MASK_ID)
    with pytest.warns(UserWarning, match="called like this, the net does more"):
        model(IDS, targets=IDS)
    assert model.net.head_is_last(()) is None and model.net.head_is_last(["targets"]) is False
    model(IDS)
    assert model.net.head_is_last(()) is True


def test_lora_in_the_place_of_the_adapted_head():
    net = Net()
    model = NonAutoregressiveWrapper(adapted(net), mask_id=MASK_ID)
    net.head = Lora(net.head)
    torch.testing.assert_close(model(IDS, seed=0).loss, whole_loss(net, model, 0))


def test_the_adapted_head_runs_at_the_masked_rows_only():
    """What all the checks above must not cost."""
    net, rows = Net(), []
    model = NonAutoregressiveWrapper(adapted(net), mask_id=MASK_ID)
    original = nn.functional.linear

    class Counting(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is original:
                rows.append(args[0].shape)
            return func(*args, **(kwargs or {}))

    with Counting():
        model(IDS)
    assert {shape[:-1] for shape in rows} == {(1, LENGTH)}  # looks once at one sequence
    rows.clear()
    with Counting():
        model(IDS)
    assert rows == []


def test_an_adapter_refuses_a_head_that_is_not_in_the_net():
    with pytest.raises(ValueError, match="a Linear that is no submodule of Recorder"):
        NetAdapter(Recorder(), num_tokens=12, max_seq_len=10, head=nn.Linear(2, 2))
