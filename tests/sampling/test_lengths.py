"""Sequences of any length: `length` and `max_new_tokens`."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from nar_kernels import NonAutoregressiveWrapper, SamplingConfig
from tests.helpers.modes import MODES, STRATEGIES
from tests.helpers.neighbours import LENGTH, MASK_ID, NUM_TOKENS, Neighbours, neighbours

pytestmark = pytest.mark.usefixtures("one_thread")

M = MASK_ID
PROMPTS = [[1], [], [2, 3, M, 5], [1] * 7, [7]]
LENGTHS = [6, 16, 9, 9, 6]


class Table(nn.Module):
    """Logits of a position by itself."""

    num_tokens = NUM_TOKENS

    def __init__(self, max_seq_len: int = LENGTH) -> None:
        super().__init__()
        self.max_seq_len = max_seq_len
        self.table = torch.randn(LENGTH, NUM_TOKENS, generator=torch.Generator().manual_seed(3))

    def forward(self, ids: Tensor) -> Tensor:
        return self.table[: ids.shape[1]].expand(*ids.shape, -1)


class Critic(nn.Module):
    def forward(self, ids: Tensor) -> Tensor:
        return ((ids * 7 + ids.roll(1, 1)) % 5).float()[..., None]


def alone(model: NonAutoregressiveWrapper, i: int, **options) -> Tensor:
    return model.generate(1, first_sequence=i, **options)[0]


@pytest.mark.parametrize("mode", [*MODES, {"strategy": "halton"}], ids=str)
@pytest.mark.parametrize("options", [{}, {"block_length": 4}])
def test_the_whole_length_is_the_default(mode, options):
    model = neighbours()
    options = {"prompt": [1, 2], "seed": 3, **mode, **options}
    expected = model.generate(3, **options)
    assert torch.equal(model.generate(3, length=LENGTH, **options), expected)
    assert torch.equal(model.generate(length=[LENGTH] * 3, **options), expected)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_length_is_a_sequence_whose_rest_is_given(strategy):
    """The noise of a position is that of the whole length."""
    model = neighbours(Table())
    options = {"strategy": strategy, "seed": 1, "steps": 5}
    whole = model.generate(4, prompt=[2] + [M] * 8 + [1] * 7, **options)
    assert torch.equal(model.generate(4, prompt=[2], length=9, **options), whole[:, :9])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_length_is_the_net_of_that_length(strategy):
    """But for the noise of ids."""
    options = {"strategy": strategy, "seed": 1, "steps": 5, "start_temperature": 0.0, "prompt": [2]}
    short = neighbours(Table(9)).generate(4, **options)
    assert torch.equal(neighbours(Table()).generate(4, length=9, **options), short)


OPTIONS = {
    "plain": {},
    "noise": {"choice_temperature": 2.0, "strategy": "margin"},
    "random": {"strategy": "random"},
    "threshold": {"strategy": "threshold", "threshold": 0.3, "steps": None},
    "quota": {"strategy": "quota", "threshold": 0.3},
    "editing": {"strategy": "quota", "editing_threshold": 0.3, "block_length": 4},
    "masked again": {"strategy": "remdm_rescale", "eta": 0.8, "block_length": 4},
    "blocks": {"block_length": 4},
    "remask": {"can_mask_prev_unmasked": True, "block_length": 5},
    "guidance": {"guidance_scale": 1.5, "unconditional": {"shift": 3}},
    "guided by the prompt": {"guidance_scale": 1.5},
    "critic": {"strategy": "critic"},
    "end": {"eos_id": [5, 2], "block_length": 4},
    "end last": {"eos_id": 5, "eos": "last"},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("lengths", [{"length": LENGTHS}, {"max_new_tokens": 6}])
def test_a_sequence_of_any_length_does_not_depend_on_the_others(name, lengths):
    model = neighbours(token_critic=Critic())
    options = {"strategy": "confidence", "seed": 3, "steps": 8, **OPTIONS[name]}
    together = model.generate(prompt=PROMPTS, **lengths, **options)
    ends = LENGTHS if "length" in lengths else [len(prompt) + 6 for prompt in PROMPTS]
    assert together.shape == (5, max(ends))
    padding = np.ravel(options.get("eos_id", -1))[0]
    for i, (prompt, end) in enumerate(zip(PROMPTS, ends, strict=True)):
        own = {name: [end] if name == "length" else value for name, value in lengths.items()}
        if name == "guided by the prompt" and not prompt:
            own["guidance_scale"] = 1.0  # by nothing
        assert torch.equal(
            alone(model, i, prompt=[prompt], **{**options, **own}), together[i, :end]
        )
        assert (together[i, end:] == padding).all() and (together[i, :end] != MASK_ID).all()
        is_given = torch.tensor(prompt) != MASK_ID
        assert together[i, : len(prompt)][is_given].tolist() == [id_ for id_ in prompt if id_ != M]
    parts = [
        model.generate(
            prompt=PROMPTS[part],
            first_sequence=part.start,
            **{k: v[part] if k == "length" else v for k, v in lengths.items()},
            **options,
        )
        for part in (slice(0, 2), slice(2, 5))
    ]
    for i, row in enumerate(row for part in parts for row in part):
        assert torch.equal(row[: ends[i]], together[i, : ends[i]])


@pytest.mark.seconds
def test_self_conditioning_of_a_group_is_its_own():
    from x_transformers import Encoder, TransformerWrapper

    torch.manual_seed(0)
    net = TransformerWrapper(
        num_tokens=NUM_TOKENS, max_seq_len=LENGTH, attn_layers=Encoder(dim=16, depth=1, heads=2)
    )
    model = NonAutoregressiveWrapper(net, mask_id=MASK_ID, self_cond=True).double()
    for options in ({}, {"guidance_scale": 1.5}, {"eos_id": 2, "block_length": 4, "steps": 8}):
        options = {"seed": 0, "start_temperature": 0.5, "steps": 6, **options}
        prompts = [[1, 2], [3], [4, M, 5], [6]]
        ends = [8, 12, 8, 16]
        together = model.generate(prompt=prompts, length=ends, **options)
        for i, (prompt, end) in enumerate(zip(prompts, ends, strict=True)):
            own = alone(model, i, prompt=[prompt], length=end, **options)
            assert torch.equal(own, together[i, :end])


def test_the_net_is_called_with_what_is_decoded():
    model = neighbours(steps=3)
    model.generate(2, length=5)
    assert {tuple(ids.shape) for ids in model.net.asked} == {(2, 5)}
    model.net.asked.clear()
    model.generate(prompt=PROMPTS, length=LENGTHS)
    assert [tuple(ids.shape) for ids in model.net.asked] == 3 * [(2, 6), (1, 16), (2, 9)]
    assert all((ids >= 0).all() for ids in model.net.asked)
    model.net.asked.clear()
    model.generate(2)
    assert {tuple(ids.shape) for ids in model.net.asked} == {(2, LENGTH)}


def test_sequences_of_different_lengths_share_no_noise():
    """As sequence 1 of length 16 and sequence 2 of length 8 would, if slots went by their own."""
    model = neighbours(Table())
    model.net.table.zero_()  # all ids are alike, and the first positions are kept
    options = {"strategy": "confidence", "filter_thres": None, "steps": 2}
    agree = 0
    for seed in range(100):
        states = model.generate_steps(length=[4, 16, 8], seed=seed, **options)
        next(states)
        ids = next(states).ids
        assert (ids[1:, :4] != MASK_ID).all()
        agree += (ids[1, :4] == ids[2, :4]).sum().item()
    assert agree < 70  # of 400, where 1 in 11 is expected


@pytest.mark.parametrize("on", ["kwargs", "net_kwargs"])
def test_arguments_of_the_net_by_sequence(on):
    model = neighbours()
    shift = torch.tensor([[1], [2], [3], [4], [5]])
    options = {"seed": 2, "steps": 4}

    def given_as(value: Tensor) -> dict:
        return {"shift": value} if on == "kwargs" else {"net_kwargs": {"shift": value}}

    together = model.generate(prompt=PROMPTS, length=LENGTHS, **given_as(shift), **options)
    for i, (prompt, end) in enumerate(zip(PROMPTS, LENGTHS, strict=True)):
        own = alone(model, i, prompt=[prompt], length=end, **given_as(shift[i : i + 1]), **options)
        assert torch.equal(own, together[i, :end])


def test_places_of_logits_are_those_of_the_result():
    seen = []

    def forced(logits: Tensor, rows: Tensor) -> Tensor:
        seen.append(rows)
        wanted = rows // 16 + rows % 16  # sequence + position
        return torch.full_like(logits, -math.inf).scatter(1, (wanted % M)[:, None], 0.0)

    ids = neighbours().generate(
        prompt=[[]] * 3, length=[5, 16, 3], strategy="random", logits_processor=forced
    )
    expected = (torch.arange(3)[:, None] + torch.arange(16)) % M
    for i, end in enumerate((5, 16, 3)):
        assert torch.equal(ids[i, :end], expected[i, :end])
    places = torch.cat(seen).sort().values.tolist()
    assert places == [*range(5), *range(16, 32), *range(32, 35)]


def test_states_of_a_ragged_batch():
    states = list(neighbours().generate_steps(prompt=[[1], [2], [3]], length=[3, 9, 5], steps=4))
    assert [state.step for state in states] == list(range(5))
    assert {state.num_steps for state in states} == {4}
    left = [state.masked.sum(1).tolist() for state in states]
    assert left == [[2, 8, 4], [1, 6, 3], [0, 4, 2], [0, 2, 1], [0, 0, 0]]
    for state in states:
        assert state.ids.shape == state.masked.shape == state.log_prob.shape == (3, 9)
        assert (state.ids[0, 3:] == -1).all() and (state.ids[2, 5:] == -1).all()
        assert torch.equal(state.ids == MASK_ID, state.masked)
        assert torch.equal(state.log_prob.isnan(), state.masked)
        assert (state.log_prob[0, 3:] == 0).all()
    first = states[1].ids.clone()
    states[-1].ids.fill_(0)
    assert torch.equal(states[1].ids, first)


def test_blocks_begin_after_the_prompt():
    options = {"block_length": 4, "steps": 8, "max_new_tokens": 8}
    for state in neighbours().generate_steps(prompt=[[1] * 3, [1] * 6], **options):
        for row, start in zip(state.masked, (3, 6), strict=True):
            answer = row[start : start + 8]
            assert answer[4:].all() or not answer[:4].any()
        assert state.masked.sum(1).tolist() == [8 - state.step] * 2


def test_shapes():
    model = neighbours(steps=2)
    assert model.generate(length=5).shape == (5,)
    assert model.generate(prompt=[1, 2], max_new_tokens=5).shape == (7,)
    assert model.generate(prompt=[[1, 2], []], max_new_tokens=5).shape == (2, 7)
    assert model.generate(3, length=np.int64(5)).shape == (3, 5)
    assert model.generate(length=[5]).shape == (1, 5)
    assert model.generate(length=torch.tensor([5, 6])).shape == (2, 6)
    assert model.generate(0, length=5).shape == (0, 5)
    assert model.generate(prompt=[1] * 5, length=5).tolist() == [1] * 5
    grid = {"strategy": "halton", "grid": (2, 3)}
    assert model.generate(2, length=6, **grid).shape == (2, 6)
    assert model.generate(length=[4, 9], strategy="halton").shape == (2, 9)
    states = model.sample(SamplingConfig(length=range(2, 5), steps=2), seed=0)
    assert states.last().ids.shape == (3, 4)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"length": 17}, ValueError, "length is 17: the net takes 16 at most"),
        ({"length": [3, 17]}, ValueError, "length is 17: the net takes 16 at most"),
        ({"length": 0}, ValueError, r"length is 0: it must be in \[1, "),
        ({"length": [4, -1]}, ValueError, r"length is -1: it must be in \[1, "),
        ({"length": "all"}, TypeError, "length is 'all': it must be an int"),
        ({"length": [4, 2.5]}, TypeError, "length is 2.5: it must be an int"),
        (
            {"length": 3, "prompt": [1] * 4},
            ValueError,
            "a prompt has 4 ids, but length is 3, which",
        ),
        ({"length": [3, 4], "prompt": [[1]] * 3}, ValueError, "length has 2 numbers for 3 sequenc"),
        ({"length": [3, 4], "batch_size": 3}, ValueError, "length has 2 numbers for 3 sequences"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens is 0: it must be in"),
        ({"max_new_tokens": [3]}, TypeError, r"max_new_tokens is \[3\]: it must be an int"),
        (
            {"max_new_tokens": 9, "prompt": [[1], [1] * 8]},
            ValueError,
            "max_new_tokens is 9, after a prompt of 8 ids: the net takes 16 in all",
        ),
        (
            {"max_new_tokens": 9, "length": 9},
            ValueError,
            "length is 9 and max_new_tokens is 9: give one of them",
        ),
        ({"length": 9, "strategy": "halton", "grid": (4, 4)}, ValueError, "with 9 cells"),
    ],
)
def test_mistakes(options, error, message):
    with pytest.raises(error, match=message):
        neighbours().generate(**options)


SEQUENCES = st.lists(
    st.tuples(st.lists(st.sampled_from([1, 2, 3, M]), max_size=LENGTH), st.integers(0, LENGTH)).map(
        lambda x: (x[0], min(max(len(x[0]) + x[1], 1), LENGTH))
    ),
    min_size=1,
    max_size=5,
)


@pytest.mark.seconds
@given(
    SEQUENCES,
    st.sampled_from(MODES),
    st.sampled_from([None, 1, 3, 5, 16]),
    st.sampled_from([None, 5, (2, 7)]),
    st.sampled_from([16, 20]),
)
def test_any_batch_is_its_sequences(sequences, mode, block_length, eos_id, steps):
    model = neighbours(Neighbours())
    options = dict(block_length=block_length, seed=1, eos_id=eos_id, steps=steps, **mode)
    prompts, lengths = zip(*sequences, strict=True)
    together = model.generate(prompt=list(prompts), length=lengths, **options)
    assert not (together == MASK_ID).any()
    for i, (prompt, end) in enumerate(sequences):
        own = alone(model, i, prompt=[prompt], length=end, **options)
        assert torch.equal(own, together[i, :end])
