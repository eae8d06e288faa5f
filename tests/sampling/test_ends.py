"""Where answers end: `eos_id`, and what becomes of it, `eos`."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from nar_kernels import SamplingConfig
from nar_kernels.sampling.config import BY_CONFIDENCE
from nar_kernels.sampling.ends import Ends
from tests.helpers.modes import MODES, PLAIN, STRATEGIES
from tests.helpers.neighbours import LENGTH, MASK_ID, NUM_TOKENS, Neighbours, neighbours

pytestmark = pytest.mark.usefixtures("one_thread")

M, EOS = MASK_ID, 5


class Sure(nn.Module):
    """Says what is wanted, by the first id, and is surer of it to the left."""

    num_tokens, max_seq_len = NUM_TOKENS, LENGTH

    def __init__(self, *wanted: list[int]) -> None:
        super().__init__()
        self.asked: list[Tensor] = []
        self.wanted = torch.tensor(wanted)

    def forward(self, ids: Tensor) -> Tensor:
        self.asked.append(ids)
        wanted = self.wanted[ids[:, 0], : ids.shape[1]]
        sureness = 8 - 0.4 * torch.arange(ids.shape[1])
        one = torch.nn.functional.one_hot(wanted, NUM_TOKENS)
        return one * sureness[:, None]


LATE = [0, 1, 2, 3, 4, 6, 7, 1, 2, 3, 4, 6, 7, EOS, 2, 3]
SOON = [1, 2, EOS, 3, EOS, 6, 7, 1, 2, 3, 4, 6, 7, 1, 2, 3]
GREEDY = {"start_temperature": 0.0, "strategy": "confidence", "seed": 0}


def cut(ids: Tensor, prompts: list[list[int]], eos_ids: tuple[int, ...]) -> Tensor:
    ids = ids.clone()
    for row, prompt in zip(ids, prompts, strict=True):
        start = max((i + 1 for i, id_ in enumerate(prompt) if id_ != M), default=0)
        found = [i for i in range(start, len(row)) if row[i] in eos_ids]
        if found:
            row[found[0] + 1 :] = eos_ids[0]
    return ids


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("options", [{}, {"block_length": 4}])
@pytest.mark.parametrize("eos_id", [EOS, [EOS], (7, EOS)])
def test_an_answer_ends_with_its_first_eos(mode, options, eos_id):
    """It is what it would be without, up to there."""
    prompts = [[], [EOS, 1, 2], [1, M, M, 3], [EOS] * 16, [2] * 12, [7], [3, 3]]
    options = {**mode, "prompt": prompts, "seed": 2, "steps": 16, **options}
    model = neighbours()
    whole, ended = model.generate(**options), model.generate(eos_id=eos_id, **options)
    expected = cut(whole, prompts, (EOS,) if eos_id in (EOS, [EOS]) else (7, EOS))
    assert torch.equal(ended, expected)
    assert not torch.equal(ended, whole)


def test_decoding_stops_when_all_answers_have_ended():
    net = Sure(LATE, SOON)
    model = neighbours(net, steps=15)
    model.generate(prompt=[1], **GREEDY)
    without = len(net.asked)
    assert without > 10
    net.asked.clear()
    assert model.generate(prompt=[1], eos_id=EOS, **GREEDY).tolist() == [1, 2] + [EOS] * 14
    assert len(net.asked) == 8  # it looks at every eighth
    net.asked.clear()
    ids = model.generate(prompt=[[1], [0]], eos_id=EOS, **GREEDY)
    assert ids.tolist() == [[1, 2] + [EOS] * 14, LATE[:13] + [EOS] * 3]
    assert len(net.asked) == without
    net.asked.clear()
    # An end that may be masked again is none yet.
    model.generate(prompt=[1], eos_id=EOS, can_mask_prev_unmasked=True, **GREEDY)
    assert len(net.asked) >= without


@pytest.mark.parametrize("remask", [False, True])
def test_later_blocks_of_an_answer_that_has_ended_are_not_decoded(remask):
    net = Sure(LATE, SOON)
    model = neighbours(net, steps=16, can_mask_prev_unmasked=remask)
    options = {"eos_id": EOS, "block_length": 4, **GREEDY}
    states = list(model.generate_steps(prompt=[[1], [0], [1]], **options))
    assert [len(ids) for ids in net.asked] == [3] * 3 + [1] * 12
    assert states[3].ids.tolist() == [SOON[:4] + [M] * 12, LATE[:4] + [M] * 12, SOON[:4] + [M] * 12]
    assert states[-2].ids[0].tolist() == SOON[:4] + [M] * 12
    last = states[-1]
    assert last.ids.tolist() == [[1, 2] + [EOS] * 14, LATE[:13] + [EOS] * 3, [1, 2] + [EOS] * 14]
    assert not last.masked.any() and (last.log_prob[0, 3:] == 0).all()
    assert (last.log_prob[0, 1:3] < 0).all()
    net.asked.clear()
    assert model.generate(prompt=[1], **options).tolist() == [1, 2] + [EOS] * 14
    assert len(net.asked) == 3


def test_the_batch_of_a_compiled_net_stays():
    net = Sure(LATE, SOON)
    forward, net.forward = net.forward, lambda ids: forward(ids)  # perhaps a compiled one
    model = neighbours(net, steps=16)
    ids = model.generate(prompt=[[1], [0]], eos_id=EOS, block_length=4, **GREEDY)
    assert ids.tolist() == [[1, 2] + [EOS] * 14, LATE[:13] + [EOS] * 3]
    assert {len(ids) for ids in net.asked} == {2}


@pytest.mark.parametrize(
    "mode",
    [mode for mode in PLAIN if mode["strategy"] in BY_CONFIDENCE]
    + [{"strategy": "threshold", "editing_threshold": 0.0}],
    ids=str,
)
def test_eos_is_filled_last(mode):
    """Where the net is sure of it first."""
    wanted = [1, 2, EOS, 3, 7, 6, EOS, 1, 2, 3, 4, 6, 7, 1, 2, 3]
    model = neighbours(Sure(wanted, wanted), steps=15)
    options = {**GREEDY, "prompt": [1], **mode, "threshold": 0.9}
    states = list(model.generate_steps(eos_id=[EOS, 7], eos="last", **options))
    is_end = torch.tensor(wanted) == EOS
    is_end |= torch.tensor(wanted) == 7
    for state in states[:-1]:
        assert state.masked[0, is_end].all() or not state.masked[0, ~is_end].any()
    assert states[-1].ids[0].tolist() == [1, 2] + [EOS] * 14
    assert states[-1].log_prob[0, 2] < 0
    plain = list(model.generate_steps(eos_id=[EOS, 7], **options))
    assert any(state.masked[0, ~is_end].any() and not state.masked[0, 2] for state in plain[:-1])


def test_the_first_of_the_last_is_filled_first_so_the_others_are_not():
    wanted = [1, 2, 3, EOS] + [EOS] * 12
    net = Sure(wanted, wanted)
    ids = neighbours(net, steps=15).generate(prompt=[1], eos_id=EOS, eos="last", **GREEDY)
    assert ids.tolist() == wanted and len(net.asked) == 8


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_eos_is_never_drawn(strategy):
    model = neighbours(Sure(LATE, [EOS] * 16))
    options = {"prompt": [[1], [1, EOS]], "strategy": strategy, "filter_thres": None}
    ids = model.generate(eos_id=[EOS, 7], eos="never", **options)
    assert ids[1, 1] == EOS
    ids[1, 1] = 1
    assert not torch.isin(ids, torch.tensor([EOS, 7, M])).any()
    ids = model.generate(prompt=[[1], [1]], length=[4, 6], eos_id=EOS, eos="never")
    assert (ids[0, :4] != EOS).all() and ids[0, 4:].tolist() == [EOS] * 2


def test_an_end_in_a_gap_is_none():
    model = neighbours(Sure(LATE, SOON), steps=15)
    prompt = [1, M, M, M, 9, 9]
    ids = model.generate(prompt=prompt, eos_id=EOS, **GREEDY)
    assert ids.tolist() == [*SOON[:4], 9, 9, *SOON[6:]]
    # Masks that a user has put behind the prompt are the answer.
    ids = model.generate(prompt=[1] + [M] * 15, eos_id=EOS, **GREEDY)
    assert ids.tolist() == [1, 2] + [EOS] * 14


def test_which_answers_are_unfinished():
    begin = torch.tensor([[EOS, M, M, M, M]] * 5)
    ends = Ends([EOS, 7], begin, M)
    ids = [
        [EOS, M, M, M, M],
        [EOS, 1, M, EOS, M],
        [EOS, 1, 2, 7, M],
        [EOS, EOS, M, M, M],
        [EOS, 1, 2, 3, 4],
    ]
    ids = torch.tensor(ids)
    assert ends.unfinished(ids).tolist() == [True, True, False, False, False]
    behind = [[False] * 5, [False] * 4 + [True], [False] * 4 + [True], [False] * 2 + [True] * 3]
    assert ends.behind(ids).tolist() == [*behind, [False] * 5]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"eos_id": NUM_TOKENS}, ValueError, r"eos_id is 12: it must be in \[0, 12\) and not 8"),
        ({"eos_id": -1}, ValueError, "eos_id is -1: it must be in"),
        (
            {"eos_id": [1, M]},
            ValueError,
            r"eos_id is 8: it must be in \[0, 12\) and not 8, the mask",
        ),
        ({"eos_id": "end"}, TypeError, "eos_id is 'end': it must be an int"),
        ({"eos_id": [1, None]}, TypeError, "eos_id is None: it must be an int"),
        ({"eos_id": []}, ValueError, "no eos_id says which id ends an answer"),
        ({"eos": "never"}, ValueError, "eos is 'never', but no eos_id says"),
        (
            {"eos_id": 1, "eos": "first"},
            ValueError,
            "eos is 'first': it must be one of allow, last",
        ),
        (
            {"eos_id": 1, "eos": "last", "strategy": "random"},
            ValueError,
            "eos is 'last', but strategy 'random' does not go by the confidence",
        ),
        (
            {"eos_id": [i for i in range(12) if i != M], "eos": "never"},
            ValueError,
            "mask_id and forbidden_ids leave none",
        ),
    ],
)
def test_mistakes(options, error, message):
    with pytest.raises(error, match=message):
        neighbours().generate(**options)


def test_all_of_it_by_a_config():
    model = neighbours(Sure(LATE, SOON))
    config = SamplingConfig(
        strategy="confidence", max_new_tokens=9, temperature=0.0, eos="last", steps=9
    )
    ids = model.sample(config, prompt=[[0], [1]], eos_id=EOS).last().ids
    assert ids.tolist() == [LATE[:10], [1, 2] + [EOS] * 8]


@pytest.mark.seconds
@given(
    st.lists(st.lists(st.sampled_from([1, 2, 5, M]), max_size=16), min_size=1, max_size=4),
    st.sampled_from(MODES),
    st.sampled_from([None, 2, 5]),
    st.sampled_from([(5,), (7, 2)]),
    st.sampled_from([16, 31]),
)
def test_any_answer_is_cut(prompts, mode, block_length, eos_ids, steps):
    model = neighbours(Neighbours())
    options = dict(block_length=block_length, steps=steps, seed=1, prompt=prompts, **mode)
    options["length"] = LENGTH
    expected = cut(model.generate(**options), prompts, eos_ids)
    assert torch.equal(model.generate(eos_id=eos_ids, **options), expected)
