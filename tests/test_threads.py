"""Losses and samples in several threads at a time."""

import threading

import pytest
import torch
from torch import Tensor, nn

from nar_kernels import NetAdapter, NonAutoregressiveWrapper
from tests.helpers.nets_of_users import (
    BATCH,
    IDS,
    LENGTH,
    MASK_ID,
    NUM_TOKENS,
    Net,
    adapted,
    transformer,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def in_threads(number: int, work) -> list:
    results: list = [None] * number
    errors: list[BaseException] = []

    def run(i: int) -> None:
        try:
            results[i] = work(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


THREADED = {
    "adapter": lambda: adapted(Net()),
    "transformer": transformer,
    "mixture of softmaxes": lambda: transformer(mixture_of_softmax=True),
    "sigsoftmax": lambda: transformer(sigsoftmax_logits=True),
}


@pytest.mark.parametrize("name", THREADED)
def test_generation_side_by_side(name):
    net = THREADED[name]()
    model = NonAutoregressiveWrapper(net, mask_id=MASK_ID, steps=4)
    attributes = {n: dict(vars(m)) for n, m in net.named_modules()}
    expected = [model.generate(2, seed=seed) for seed in range(40)]
    got = in_threads(4, lambda i: [model.generate(2, seed=seed) for seed in range(i, 40, 4)])
    for i in range(4):
        assert all(map(torch.equal, got[i], expected[i::4]))
    assert net(IDS).shape == (BATCH, LENGTH, NUM_TOKENS)
    assert {n: dict(vars(m)) for n, m in net.named_modules()} == attributes


@pytest.mark.parametrize("name", THREADED)
def test_losses_side_by_side(name):
    net = THREADED[name]()
    model = NonAutoregressiveWrapper(net, mask_id=MASK_ID)
    expected = [model(IDS, seed=seed).loss for seed in range(40)]
    got = in_threads(4, lambda i: [model(IDS, seed=seed).loss for seed in range(i, 40, 4)])
    for i in range(4):
        torch.testing.assert_close(got[i], expected[i::4])


def test_training_beside_generation_keeps_its_mode():
    modes: dict[str, list[bool]] = {"train": [], "generate": []}

    class Moody(Net):
        num_tokens, max_seq_len = NUM_TOKENS, LENGTH

        def forward(self, ids: Tensor) -> Tensor:
            before = self.training, self.e.training
            logits = super().forward(ids)
            name = threading.current_thread().name
            modes[name] += [*before, self.training]
            return logits

    model = NonAutoregressiveWrapper(Moody(), mask_id=MASK_ID, steps=6)
    model.net.head.eval()  # frozen by the user
    stop = threading.Event()

    def generate() -> None:
        while not stop.is_set():
            model.generate(2)

    thread = threading.Thread(target=generate, name="generate")
    main = threading.current_thread()
    main_name, main.name = main.name, "train"
    thread.start()
    try:
        for _ in range(100):
            model(IDS).loss.backward()
    finally:
        stop.set()
        thread.join()
        main.name = main_name
    assert modes["train"] and all(modes["train"])
    assert modes["generate"] and not any(modes["generate"])
    assert model.training and model.net.training and not model.net.head.training


@pytest.mark.parametrize("shared", ["net", "critic"])
def test_wrappers_that_share_a_net_take_turns(shared):
    """Though each has an adapter of its own."""
    modes: list[bool] = []

    class Moody(Net):
        def forward(self, ids: Tensor) -> Tensor:
            logits = super().forward(ids)
            if threading.current_thread() is threading.main_thread():
                modes.append(self.training)
            return logits

    common = Moody()
    critic = NetAdapter(common, num_tokens=NUM_TOKENS, max_seq_len=LENGTH)
    if shared == "net":
        one, other = (NonAutoregressiveWrapper(adapted(common), mask_id=MASK_ID) for _ in range(2))
    else:
        scores = nn.Sequential(critic, nn.Linear(NUM_TOKENS, 1))
        one, other = (
            NonAutoregressiveWrapper(adapted(Net()), mask_id=MASK_ID, token_critic=scores)
            for _ in range(2)
        )
    one(IDS)  # which looks at the head in evaluation mode
    modes.clear()
    stop = threading.Event()

    def generate() -> None:
        while not stop.is_set():
            other.generate(2)

    thread = threading.Thread(target=generate)
    thread.start()
    try:
        for _ in range(60):
            one(IDS)
    finally:
        stop.set()
        thread.join()
    assert len(modes) == 60 and all(modes)


def test_a_step_of_generation_may_train():
    """In the same thread, such as to update a net by what it generates."""
    model = NonAutoregressiveWrapper(adapted(Net()), mask_id=MASK_ID, steps=2)

    def train(logits: Tensor, rows: Tensor) -> Tensor:
        with torch.enable_grad():
            model(IDS).loss.backward()
        return logits

    model.generate(2, logits_processor=train)
    assert model.net.net.head.weight.grad is not None
