"""The unmasking loop, on nets that are plain functions."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nar_kernels.sampling.decode import DecodeState, decode
from nar_kernels.sampling.halton import halton_order
from nar_kernels.sampling.plan import Block, Plan, Step, make_plan
from nar_kernels.sampling.strategies import UnmaskingPolicy
from nar_kernels.spec.schedules import linear

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_TOKENS, MASK_ID = 6, 3
Net = Callable[[Tensor], Tensor]  # from ids [B, L] to logits [B, L, V]


def noise(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def plan_of(num_left: list[int], batch: int, length: int) -> Plan:
    """A plan of one block, open everywhere, with the same counts for all sequences."""
    number = len(num_left)
    steps = [
        Step(i, 1 - (i + 1) / number, torch.full((batch,), left)) for i, left in enumerate(num_left)
    ]
    rows = torch.arange(batch * length)
    block = Block(torch.full((batch,), length), rows, steps, slice(0, length))
    return Plan([block], number)


def states_of(
    net: Net,
    plan: Plan | list[int],
    shape: tuple[int, int] = (2, 8),
    policy: UnmaskingPolicy = UnmaskingPolicy(),  # noqa: B008
    prompt: Tensor | None = None,
    seed: int = 0,
    **options,
) -> list[DecodeState]:
    if isinstance(plan, list):
        plan = plan_of(plan, *shape)
    asked = []

    def predict(ids: Tensor, rows: Tensor) -> list[Tensor]:
        asked.append(rows)
        logits = net(ids).flatten(0, 1)[rows]
        return list(logits.split(3)) if len(rows) else [logits]  # in chunks

    prompt = torch.full(shape, MASK_ID) if prompt is None else prompt
    states = list(decode(predict, prompt, plan, policy, mask_id=MASK_ID, seed=seed, **options))
    states_of.asked = asked
    return states


def confident_from_the_left(ids: Tensor) -> Tensor:
    """Id 5 everywhere, with less confidence to the right."""
    logits = torch.zeros(*ids.shape, NUM_TOKENS)
    logits[..., 5] = 20 - torch.arange(ids.shape[1])
    return logits


def random_net(seed: int = 1) -> Net:
    generator = noise(seed)
    return lambda ids: torch.randn(*ids.shape, NUM_TOKENS, generator=generator)


def without_mask(logits: Tensor) -> Tensor:
    return logits.index_fill(-1, torch.tensor([MASK_ID]), -torch.inf)


def test_most_confident_positions_come_first():
    states = states_of(confident_from_the_left, [6, 3, 0], temperature=0.0)
    assert (states[-1].ids == 5).all()
    for state, num_left in zip(states, [8, 6, 3, 0], strict=True):
        position = torch.arange(8).expand(2, 8)
        assert torch.equal(state.masked, position >= 8 - num_left), state.step
        assert torch.equal(state.masked, state.ids == MASK_ID)
        assert torch.equal(state.log_prob.isnan(), state.masked)
    assert [(state.step, state.num_steps) for state in states] == [(i, 3) for i in range(4)]
    log_prob = without_mask(confident_from_the_left(states[0].ids)).log_softmax(-1)[..., 5]
    torch.testing.assert_close(states[-1].log_prob, log_prob)


@pytest.mark.parametrize(
    "policy", [UnmaskingPolicy(), UnmaskingPolicy("random"), UnmaskingPolicy(temperature=3.0)]
)
def test_only_masked_positions_change(policy):
    states = states_of(random_net(), [9, 9, 4, 2, 0], (3, 11), policy)
    for state, following in zip(states, states[1:], strict=False):
        assert torch.equal(state.ids[~state.masked], following.ids[~state.masked])
        assert not (following.masked & ~state.masked).any()
    assert [s.masked.sum(1).tolist() for s in states] == [[n] * 3 for n in (11, 9, 9, 4, 2, 0)]


def test_logits_are_asked_for_where_they_are_needed():
    for policy, expected in (
        (UnmaskingPolicy(), [22, 8, 4]),
        (UnmaskingPolicy("random"), [14, 4, 4]),  # only what is filled
        (UnmaskingPolicy("halton", order=torch.arange(11)), [14, 4, 4]),
    ):
        states_of(random_net(), [4, 2, 0], (2, 11), policy)
        assert [len(rows) for rows in states_of.asked] == expected


def test_remask_judges_the_id_in_place():
    """The first guess becomes improbable once its neighbours are there; it must be masked again."""

    def net(ids):
        logits = torch.zeros(*ids.shape, NUM_TOKENS)
        if (ids == MASK_ID).all():
            logits[:, 0, 1] = 20.0  # position 0 first, with id 1
            logits[..., 2] += 3.0
        else:
            logits[:, 0, 2] = 20.0  # which was wrong
            logits[:, 1:, 2] = 10.0
        return logits

    states = states_of(net, [3, 1, 0], (1, 4), temperature=0.0, remask=True)
    assert not states[1].masked[0, 0] and states[1].ids[0, 0] == 1
    assert states[2].masked[0].tolist() == [True, False, False, False]
    assert states[3].ids.tolist() == [[2, 2, 2, 2]]
    states = states_of(net, [3, 1, 0], (1, 4), temperature=0.0)
    assert states[3].ids.tolist() == [[1, 2, 2, 2]]


def test_the_prompt_is_never_masked_again():
    prompt = torch.full((2, 8), MASK_ID)
    prompt[0, 2:5] = torch.tensor([0, 1, 2])
    prompt[1, :] = 4
    plan = make_plan(prompt == MASK_ID, linear, 4, every_step=True)
    for remask in (False, True):
        states = states_of(random_net(), plan, prompt=prompt, remask=remask)
        for state in states:
            given = prompt != MASK_ID
            assert torch.equal(state.ids[given], prompt[given])
            assert (state.log_prob[given] == 0).all()
        assert not states[-1].masked.any()
        assert [s.masked[0].sum().item() for s in states] == [5, 3, 2, 1, 0]


@pytest.mark.parametrize("remask", [False, True])
def test_critic_chooses_what_to_mask_again(remask):
    def critic(ids):
        assert (ids != MASK_ID).all()  # it judges complete sequences
        return torch.arange(8.0).expand(2, 8)

    policy = UnmaskingPolicy("critic", critic=critic)
    states = states_of(confident_from_the_left, [5, 2, 0], policy=policy, remask=remask)
    assert states[1].masked[0].nonzero().flatten().tolist() == [3, 4, 5, 6, 7]
    assert states[2].masked[0].nonzero().flatten().tolist() == [6, 7]


@pytest.mark.parametrize("strategy", ["critic", "confidence"])
def test_noise_shuffles_the_choice_less_and_less(strategy):
    def net(ids):
        return confident_from_the_left(ids) / 2 - torch.eye(NUM_TOKENS)[5] * 6  # 4, 3.5, 3, ...

    def first_masked(scale):
        policy = UnmaskingPolicy(
            strategy, scale, critic=lambda ids: torch.arange(8.0).expand(64, 8) / 8
        )
        return states_of(net, [4, 0], (64, 8), policy, temperature=0.0)[1].masked.unique(dim=0)

    assert len(first_masked(0.0)) == 1
    assert len(first_masked(8.0)) > 30

    scale = {"critic": 3.0, "confidence": 0.5}[strategy]
    policy = UnmaskingPolicy(strategy, scale, critic=lambda ids: torch.arange(8.0).expand(200, 8))
    states = states_of(net, [4] * 9 + [0], (200, 8), policy, remask=True, temperature=0.0)
    last = torch.arange(8) >= 4
    share = [(state.masked == last).all(1).float().mean().item() for state in states]
    assert share[1] < 0.3 and share[9] > 0.8


def test_margin_and_entropy_choose_by_all_logits():
    logits = torch.full((1, 3, NUM_TOKENS), -50.0)
    logits[0, 0, :2] = 0.0  # two alike: margin 0, entropy ln 2
    logits[0, 1, :2] = torch.tensor([0.1, 0.0])
    logits[0, 1, 2:] = -1.0  # a small margin, the largest entropy
    logits[0, 2, 0] = 0.0  # certain
    for strategy, order in (("margin", [2, 1, 0]), ("entropy", [2, 0, 1])):
        states = states_of(lambda ids: logits, [2, 1, 0], (1, 3), UnmaskingPolicy(strategy))
        filled = [
            (a.masked & ~b.masked)[0].nonzero().item()
            for a, b in zip(states, states[1:], strict=False)
        ]
        assert filled == order


def test_threshold_fills_what_is_sure_and_at_least_one():
    def net(ids):
        logits = torch.zeros(*ids.shape, NUM_TOKENS)
        known = (ids != MASK_ID).sum(1, keepdim=True)
        # Each sequence becomes surer of what is right of what it knows.
        sure = (torch.arange(8) < 2 * known + torch.tensor([[0], [3]])).float()
        logits[..., 5] = 1 + 6 * sure
        return logits

    slow = plan_of([8] * 19 + [0], 2, 8)
    states = states_of(net, slow, policy=UnmaskingPolicy("threshold"), temperature=0.0)
    assert [s.masked.sum(1).tolist() for s in states] == [[8, 8], [7, 5], [6, 0], [4, 0], [0, 0]]
    # The plan is the slowest that is allowed.
    states = states_of(
        net, plan_of([5, 4, 2, 0], 2, 8), policy=UnmaskingPolicy("threshold", threshold=1.0)
    )
    assert [s.masked.sum(1).tolist() for s in states] == [[n] * 2 for n in (8, 5, 4, 2, 0)]


def test_random_order_is_uniform():
    states = states_of(
        confident_from_the_left, [3, 0], (6000, 5), UnmaskingPolicy("random"), temperature=0.0
    )
    masked = states[1].masked
    counts = (masked.long() * 2 ** torch.arange(5)).sum(1).bincount(minlength=32)
    counts = counts[counts > 0]
    assert len(counts) == 10 and ((counts - 600) ** 2 / 600).sum() < 34  # p = 1e-4


def test_halton_order_is_followed():
    order = halton_order(2, 4)
    policy = UnmaskingPolicy("halton", order=order)
    for state, left in zip(
        states_of(random_net(), [6, 3, 0], policy=policy), [8, 6, 3, 0], strict=True
    ):
        assert torch.equal(state.masked, (order >= 8 - left).expand(2, 8))


def test_stops_once_nothing_is_masked():
    assert len(states_of(confident_from_the_left, [3, 0, 0, 0])) == 3


def test_top_k_of_one_is_greedy_at_any_temperature():
    logits = torch.randn(2, 8, NUM_TOKENS, generator=noise(2))
    states = states_of(lambda _: logits, [4, 0], temperature=50.0, top_k=1)
    assert torch.equal(states[-1].ids, without_mask(logits).argmax(-1))


def test_a_nucleus_of_one_is_greedy_at_any_temperature():
    logits = torch.randn(2, 8, NUM_TOKENS, generator=noise(2))
    states = states_of(lambda _: logits, [4, 0], temperature=50.0, top_p=1e-6)
    assert torch.equal(states[-1].ids, without_mask(logits).argmax(-1))


def test_temperature_falls_to_zero():
    """The last step is greedy, the first is not."""
    logits = torch.randn(1, 1, NUM_TOKENS, generator=noise(3)).expand(200, 8, -1)
    greedy = without_mask(logits).argmax(-1)
    states = states_of(lambda _: logits, [4, 0], (200, 8), temperature=4.0)
    last = states[1].masked
    assert torch.equal(states[-1].ids[last], greedy[last])
    assert (states[-1].ids[~last] != greedy[~last]).float().mean() > 0.2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_any_float_type_of_logits(dtype):
    logits = torch.randn(2, 8, NUM_TOKENS, generator=noise(4)).to(dtype)
    ours = states_of(lambda _: logits, [4, 0])[-1]
    theirs = states_of(lambda _: logits.float(), [4, 0])[-1]
    assert torch.equal(ours.ids, theirs.ids)


def test_chain_of_single_steps_samples_the_joint_distribution():
    """Two positions, always equal: once one is known, the other follows."""

    def net(ids):
        logits = torch.zeros(*ids.shape, NUM_TOKENS)
        other = ids.flip(1)
        known = torch.full_like(logits, -20.0).scatter(2, other[..., None], 20.0)
        return torch.where((other == MASK_ID)[..., None], logits, known)

    ids = states_of(net, [1, 0], (500, 2), temperature=2.0)[-1].ids
    assert torch.equal(ids[:, 0], ids[:, 1])
    assert ids.unique().tolist() == [0, 1, 2, 4, 5]
    at_once = states_of(net, [0, 0], (500, 2), temperature=2.0)[-1].ids
    assert not torch.equal(at_once[:, 0], at_once[:, 1])


@pytest.mark.parametrize(
    "policy",
    [
        UnmaskingPolicy(),
        UnmaskingPolicy(temperature=2.0),
        UnmaskingPolicy("random"),
        UnmaskingPolicy("threshold"),
    ],
)
def test_a_sequence_does_not_depend_on_the_batch(policy):
    logits = torch.randn(1, 12, NUM_TOKENS, generator=noise(5))
    prompt = torch.full((4, 12), MASK_ID)
    prompt[1, :5] = 0
    prompt[3, 7:] = 1

    def ids_of(prompt):
        plan = make_plan(prompt == MASK_ID, linear, 7)
        return states_of(
            lambda ids: logits.expand(len(ids), -1, -1), plan, policy=policy, prompt=prompt
        )[-1].ids

    together = ids_of(prompt)
    for batch in (1, 2, 3):
        assert torch.equal(ids_of(prompt[:batch]), together[:batch])
    if policy.temperature > 0 or policy.order_is_fixed:
        assert not torch.equal(together[0], together[2])


@pytest.mark.parametrize("shape", [(1, 8), (3, 8)])
@pytest.mark.parametrize(
    "policy",
    [
        UnmaskingPolicy(),
        UnmaskingPolicy("margin", temperature=2.0),
        UnmaskingPolicy("threshold", threshold=0.3),
        UnmaskingPolicy("random"),
        UnmaskingPolicy("halton", order=torch.arange(8)),
    ],
    ids=lambda policy: policy.strategy,
)
@pytest.mark.parametrize("remask", [False, True])
def test_one_sequence_stands_for_all_that_begin_alike(policy, shape, remask):
    table = torch.randn(8, NUM_TOKENS, NUM_TOKENS, generator=noise(4))

    def net(ids):  # of a position and the id of its neighbour
        asked_batches.append(len(ids))
        return table[torch.arange(8), ids.roll(1, 1)]

    asked_batches = []
    prompt = torch.full(shape, MASK_ID)
    prompt[:, 2] = 1
    plan = make_plan(prompt == MASK_ID, linear, 6, block_length=5)
    options = dict(plan=plan, policy=policy, prompt=prompt, remask=remask, temperature=3.0)
    by_themselves = states_of(net, **options)
    assert set(asked_batches) == {shape[0]}
    asked_batches.clear()
    together = states_of(net, **options, share_first_step=True)
    assert asked_batches == [1] + (len(together) - 2) * [shape[0]]
    for ours, expected in zip(together, by_themselves, strict=True):
        assert torch.equal(ours.ids, expected.ids)
        assert torch.equal(ours.log_prob.nan_to_num(9), expected.log_prob.nan_to_num(9))
    if shape[0] > 1:
        assert not torch.equal(ours.ids[0], ours.ids[1])


def test_states_are_not_changed_afterwards():
    seen, copies = [], []
    plan = plan_of([4, 2, 0], 2, 8)
    net = random_net()
    for state in decode(
        lambda ids, rows: [net(ids).flatten(0, 1)[rows]],
        torch.full((2, 8), MASK_ID),
        plan,
        UnmaskingPolicy(),
        mask_id=MASK_ID,
        seed=0,
    ):
        seen.append(state)
        copies.append(DecodeState(*state[:2], *(tensor.clone() for tensor in state[2:])))
    for ours, theirs in zip(seen, copies, strict=True):
        assert torch.equal(ours.ids, theirs.ids) and torch.equal(ours.masked, theirs.masked)
        assert torch.equal(ours.log_prob.nan_to_num(9), theirs.log_prob.nan_to_num(9))


def test_changing_a_state_changes_nothing_else():
    prompt = torch.full((2, 8), MASK_ID)
    expected = states_of(confident_from_the_left, [4, 2, 0], prompt=prompt)[-1].ids
    changed = decode(
        lambda ids, rows: [confident_from_the_left(ids).flatten(0, 1)[rows]],
        prompt,
        plan_of([4, 2, 0], 2, 8),
        UnmaskingPolicy(),
        mask_id=MASK_ID,
        seed=0,
    )
    for state in changed:
        last = state.ids.clone()
        state.ids.zero_()
        state.log_prob.zero_()
    assert torch.equal(last, expected) and (prompt == MASK_ID).all()


@pytest.mark.parametrize(
    "policy", [UnmaskingPolicy(), UnmaskingPolicy("random")], ids=lambda c: c.strategy
)
@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (3, 1)])
def test_small_shapes(shape, policy):
    ids = states_of(confident_from_the_left, [0], shape, policy)[-1].ids
    assert ids.shape == shape and (ids != MASK_ID).all()
