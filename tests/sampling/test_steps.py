"""What a step of decoding costs: torch operations beside the net's, and no waiting for a GPU."""

from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from nar_kernels import NonAutoregressiveWrapper, SamplingConfig
from nar_kernels.sampling import decode
from nar_kernels.sampling.config import ADAPTIVE, BLIND, NO_REMASK, REMASKING, Strategy
from nar_kernels.sampling.ends import Ends
from nar_kernels.sampling.plan import Block, make_plan
from nar_kernels.sampling.remasking import with_remasking
from nar_kernels.sampling.strategies import Candidates, Counts, UnmaskingPolicy
from nar_kernels.spec.schedules import linear

pytestmark = pytest.mark.usefixtures("one_thread")

BATCH, LENGTH, NUM_TOKENS, MASK_ID, STEPS = 3, 16, 12, 11, 6
PROMPT = torch.full((BATCH, LENGTH), MASK_ID)
RAGGED = PROMPT.clone()
RAGGED[0, :5], RAGGED[1, 3:9] = 1, 2


aten = torch.ops.aten


class Operations(TorchDispatchMode):
    """Records the operations that torch dispatches, views among them, unless it is paused; and
    refuses to move a tensor from one device to another, which may be a sync."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.paused = False

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = operation(*args, **(kwargs or {}))
        if operation is aten.slice.Tensor and result.shape == args[0].shape:
            return result  # of all: PyTorch 2.6 has more of them
        if not self.paused and operation.namespace != "prim":  # questions of fake tensors
            self.names.append(operation.overloadpacket.__name__)
            tensors = [x for x in (*args, result) if isinstance(x, Tensor) and x.dim() > 0]
            devices = {x.device.type for x in tensors}
            assert len(devices) < 2, f"{operation} has tensors on {devices}"
        return result


class Net(nn.Module):
    """Hidden states from a table, in no operations that count."""

    num_tokens, max_seq_len, emb_dim = NUM_TOKENS, LENGTH, 8
    batch_independent = True

    def __init__(self, operations: Operations) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.output_head = nn.Embedding(NUM_TOKENS, 8), nn.Linear(8, NUM_TOKENS)
        self.operations = operations

    def forward(self, ids: Tensor, return_embeddings: bool = False) -> Tensor:
        self.operations.paused = True
        hidden = self.table(ids) + self.table(ids).roll(1, 1)
        self.operations.paused = False
        return hidden if return_embeddings else self.output_head(hidden)


class Critic(nn.Module):
    def __init__(self, operations: Operations) -> None:
        super().__init__()
        self.operations = operations

    def forward(self, ids: Tensor) -> Tensor:
        self.operations.paused = True
        score = (ids * 7 % 5).float()
        self.operations.paused = False
        return score


STRATEGIES = get_args(Strategy)
OPTIONS = {
    "plain": {},
    "prompts": {"prompt": RAGGED},
    "blocks": {"block_length": 8},
    "remask": {"remask": True},
    "all": {"prompt": RAGGED, "block_length": 8, "remask": True},
}
# Hidden states at the masked rows, and their logits, seven operations and a buffer that may have to
# grow; a second time for guidance, which is four more.
HEAD, GUIDANCE = 8, 13
OURS = ["linear_", "unmask", "choose"]


def operations_of_steps(strategy: str, **options: Any) -> list[list[str]]:
    operations = Operations()
    critic = Critic(operations) if strategy == "critic" else None
    model = NonAutoregressiveWrapper(Net(operations), mask_id=MASK_ID, token_critic=critic)
    prompt, eos_id = options.pop("prompt", None), options.pop("eos_id", None)
    options = {"steps": STEPS, "strategy": strategy, "top_k": 4, **options}
    config, given = SamplingConfig(**options), {"prompt": prompt, "eos_id": eos_id}
    found = []
    with operations:
        states = model.sample(config, BATCH, seed=3, **given)
        next(states)
        while True:
            operations.names.clear()
            if next(states, None) is None:
                return found
            found.append(list(operations.names))


@pytest.mark.cpp
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("noise", [0.0, 4.5])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_operations_of_a_step(strategy, noise, options):
    """At most 20 beside those of the head, and three more where ids in place are judged by a critic
    or a threshold. The first step may share the net's call, which takes a few more."""
    if noise and strategy in (*ADAPTIVE, *BLIND):
        pytest.skip("has no choice_temperature")
    remask = "remask" in OPTIONS[options]
    if remask and strategy in NO_REMASK:
        pytest.skip("has no remask")
    given = {"choice_temperature": noise, "eta": 0.5, **OPTIONS[options]}
    for own in operations_of_steps(strategy, **given)[1:]:
        most = 23 if remask and strategy in (*ADAPTIVE, "critic") else 20
        assert len(own) <= most + HEAD, own


@pytest.mark.cpp
@pytest.mark.parametrize("strategy", ["confidence", "entropy", *ADAPTIVE])
def test_operations_of_editing(strategy):
    """15 more: another call of `unmask`, and what is replaced."""
    for options in ({}, {"prompt": RAGGED}, {"block_length": 8}):
        for own in operations_of_steps(strategy, editing_threshold=0.2, **options)[1:]:
            assert len(own) <= 20 + 15 + HEAD, own


@pytest.mark.cpp
@pytest.mark.parametrize("strategy", ["confidence", "threshold", "random"])
def test_operations_of_ends(strategy):
    """Whether all answers have ended is looked at after every eighth step: 9 operations, and 6 to
    cut what is behind the ends. To rank the ends that are drawn is 2 a step."""
    options = {"prompt": RAGGED, "steps": 12, "eos_id": 1}
    plain = list(map(len, operations_of_steps(strategy, prompt=RAGGED, steps=12)))
    ended = list(map(len, operations_of_steps(strategy, **options)))
    assert ended[:7] == plain[:7] and len(ended) > 7
    assert all(b <= a + 15 for a, b in zip(plain, ended, strict=False))
    if strategy != "random":
        last = list(map(len, operations_of_steps(strategy, eos="last", **options)))
        assert last[:7] == [n + 2 for n in plain[:7]]


@pytest.mark.cpp
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_operations_of_each_length(strategy):
    """Those of a batch, 5 to pick its sequences (4 more for a critic), and 9 to put their states
    into that of the batch, which is 3."""
    if strategy == "halton":
        pytest.skip("these are no grids")
    plain = max(map(len, operations_of_steps(strategy)[1:]))
    more = 5 + 4 * (strategy == "critic") + 9
    found = operations_of_steps(strategy, length=[9, 16, 9])
    assert all(len(own) <= 2 * (plain + more) + 3 for own in found[1:]), found


@pytest.mark.cpp
def test_what_a_plain_step_does():
    plain = operations_of_steps("confidence")[2]
    assert operations_of_steps("confidence", choice_temperature=4.5)[2] == plain
    assert [name for name in plain if name in OURS] == OURS
    random = operations_of_steps("random")[2]
    assert len(random) < len(plain) < 13 + HEAD
    # Nothing is left after the last step.
    assert "choose" not in operations_of_steps("random")[-1]


@pytest.mark.cpp
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_guidance_is_a_second_head_and_a_sum(strategy):
    plain = operations_of_steps(strategy, prompt=RAGGED)[2]
    guided = operations_of_steps(strategy, prompt=RAGGED, guidance_scale=2.0)[2]
    assert len(guided) <= len(plain) + GUIDANCE


@pytest.fixture
def decoded(monkeypatch):
    """Decodes on a GPU that computes nothing: reading a value is an error, as there is none.

    Counts of the plan are real, and reach the device before the first step.
    """
    device, fake = torch.device("cuda:0"), FakeTensorMode(allow_non_fake_inputs=True)

    def decoded(strategy: str, noise: float = 0.0, **options: Any) -> tuple[Any, Operations]:
        prompt, remask = options.pop("prompt", PROMPT), options.pop("remask", False)
        ended = options.pop("ended", False)
        remasks = strategy in REMASKING
        plan = make_plan(prompt == MASK_ID, linear, STEPS, every_step=remask or remasks, **options)
        if remasks:
            plan = with_remasking(plan, strategy, 0.5, seed=1, sequences=range(BATCH))
        blocks = {id(block): decode._on_device(block, torch.device("cpu")) for block in plan.blocks}
        fake.__enter__()

        def to_gpu(x: Tensor) -> Tensor:
            return fake.from_tensor(x).to(device)

        def moved(counts: Counts) -> Counts:
            return counts._replace(bounds=to_gpu(counts.bounds))

        def on_device(block: Block, _: torch.device) -> Any:
            (rows, counts), steps = blocks[id(block)]
            candidates = Candidates(to_gpu(rows), moved(counts))
            return candidates, [
                step._replace(
                    left=moved(step.left),
                    again=step.again and decode._Again(*map(moved, step.again)),
                )
                for step in steps
            ]

        monkeypatch.setattr(decode, "_on_device", on_device)
        operations = Operations()

        def predict(ids: Tensor, rows: Tensor) -> list[Tensor]:
            operations.paused = True
            logits = torch.zeros(len(rows), NUM_TOKENS, device=device)
            operations.paused = False
            return [logits]

        order = torch.arange(LENGTH, dtype=torch.float32).to(device)
        policy = UnmaskingPolicy(strategy, noise, order=order, critic=lambda ids: ids.float())
        options = dict(mask_id=MASK_ID, seed=1, top_k=4, remask=remask)
        if ended:
            options["ends"] = Ends([1, 3], to_gpu(prompt), MASK_ID, filled_last=True)
        return decode.decode(predict, to_gpu(prompt), plan, policy, **options), operations

    yield decoded
    fake.__exit__(None, None, None)


@pytest.mark.parametrize("options", ["plain", "prompts", "all"])
@pytest.mark.parametrize("noise", [0.0, 4.5])
@pytest.mark.parametrize("strategy", [s for s in STRATEGIES if s not in ADAPTIVE])
def test_steps_do_not_wait_for_the_device(strategy, noise, options, decoded):
    """No value is read, and nothing is copied between devices, from the first step to the last;
    then it is asked for NaN, once."""
    given = OPTIONS[options] | ({"remask": False} if strategy in REMASKING else {})
    states, operations = decoded(strategy, noise, **given)
    state = next(states)
    with operations:
        while state.step < state.num_steps:
            operations.names.clear()
            state = next(states)
            # A NaN is recorded on the device, which takes more than looking for it on the CPU.
            most = 20 + 9 * ("remask" in OPTIONS[options]) + 9 * (strategy == "critic")
            most += 5 * (strategy in REMASKING)
            assert len(operations.names) <= most, operations.names
        with pytest.raises(DataDependentOutputException):
            next(states)


@pytest.mark.parametrize("strategy", ["confidence", "random"])
def test_ends_wait_for_the_device_after_a_block(strategy, decoded):
    states, operations = decoded(strategy, ended=True, block_length=LENGTH // 2)
    next(states)
    with operations:
        for _ in range(STEPS // 2 - 1):
            next(states)
        with pytest.raises(AssertionError, match="_to_copy.default has tensors on"):
            next(states)


@pytest.mark.parametrize("strategy", ["confidence", "random"])
def test_ends_wait_for_nothing_between_two_looks(strategy, decoded):
    states, operations = decoded(strategy, ended=True)
    state = next(states)
    with operations:
        while state.step < STEPS:
            state = next(states)


@pytest.mark.parametrize("strategy", ADAPTIVE)
def test_adaptive_strategies_wait_once_a_step(strategy, decoded):
    states, operations = decoded(strategy)
    next(states)
    with operations, pytest.raises(AssertionError, match="_to_copy.default has tensors on"):
        next(states)
