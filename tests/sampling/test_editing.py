"""Ids that are replaced once the net holds others more probable. Step by step, against those of
LLaDA 2.1: test_diffusers.py."""

import math

import pytest
import torch
from torch import Tensor, nn

from nar_kernels.errors import InvalidLogitsError
from nar_kernels.sampling.decode import _split
from tests.helpers.neighbours import LENGTH, MASK_ID, NUM_TOKENS, neighbours

pytestmark = pytest.mark.usefixtures("one_thread")

M = MASK_ID
GREEDY = {"start_temperature": 0.0, "filter_thres": None, "seed": 0}


class Changing(nn.Module):
    """Says 1 while anything is masked, then 2, then 3, and so on up to a last id."""

    num_tokens, max_seq_len = NUM_TOKENS, LENGTH

    def __init__(self, last: int, share: float = 0.7) -> None:
        super().__init__()
        self.last, self.asked = last, 0
        # Of two ids.
        self.logit = math.log(share / (1 - share))

    def forward(self, ids: Tensor) -> Tensor:
        self.asked += 1
        is_open = (ids == M).any(1, keepdim=True)
        wanted = torch.where(ids == M, 1, ids.where(is_open, (ids + 1).clamp(max=self.last)))
        one_hot = nn.functional.one_hot(wanted, NUM_TOKENS).float()
        logits = (self.logit * one_hot).masked_fill(one_hot == 0, -torch.inf)
        return logits.index_fill(2, torch.tensor([0]), 0.0)


@pytest.mark.parametrize(("last", "expected"), [(1, 1), (3, 3), (7, 7)])
def test_until_nothing_changes(last, expected):
    """In the steps of the block that are left: 16, of which one fills all."""
    net = Changing(last)
    options = {"strategy": "threshold", "threshold": 0.6, "editing_threshold": 0.6, **GREEDY}
    states = list(neighbours(net).generate_steps(**options))
    assert states[-1].ids.tolist() == [[expected] * LENGTH]
    assert net.asked == len(states) - 1 == last + 1  # the last finds nothing
    assert [int(state.ids[0, 3]) for state in states[1:]] == [*range(1, last + 1), last]
    log_prob = math.log(0.7)
    assert states[-1].log_prob[0].tolist() == pytest.approx([log_prob] * LENGTH)


def test_no_more_than_the_steps_of_a_block():
    net = Changing(7)
    options = {"strategy": "threshold", "threshold": 0.6, "editing_threshold": 0.6, **GREEDY}
    ids = neighbours(net).generate(block_length=8, steps=6, **options)
    # In the first block something is masked all along; its second step finds nothing to change.
    assert ids.tolist() == [1] * 8 + [3] * 8
    assert net.asked == 2 + 3


@pytest.mark.parametrize("threshold", [0.69, 0.71])
def test_only_above_the_threshold(threshold):
    options = {"strategy": "threshold", "threshold": 0.6, "editing_threshold": threshold}
    ids = neighbours(Changing(3)).generate(**options, **GREEDY)
    assert ids.tolist() == [3 if threshold < 0.7 else 1] * LENGTH


def test_the_prompt_and_earlier_blocks_stay():
    prompt = [1, 1, 1, M, 1, 1]
    options = {"strategy": "quota", "threshold": 0.6, "editing_threshold": 0.6, **GREEDY}
    net = Changing(3)
    states = list(neighbours(net).generate_steps(prompt=prompt, block_length=4, **options))
    for state in states:
        assert (state.ids[0, [0, 1, 2, 4, 5]] == 1).all()
        assert (state.log_prob[0, [0, 1, 2, 4, 5]] == 0).all()
    # Earlier blocks were filled while later ones were masked.
    assert states[-1].ids[0].tolist() == [1] * 12 + [3] * 4


def test_no_id_becomes_an_end_with_eos_last():
    options = {"strategy": "threshold", "threshold": 0.6, "editing_threshold": 0.6, **GREEDY}
    model = neighbours(Changing(3))
    ids = model.generate(eos_id=2, **options)
    assert ids.tolist() == [3] * LENGTH  # which was 2 on the way
    assert model.generate(eos_id=2, eos="last", **options).tolist() == [1] * LENGTH
    assert model.generate(eos_id=3, **options).tolist() == [3] * LENGTH
    # Ids that are not drawn are not put in place either.
    assert model.generate(eos_id=2, eos="never", **options).tolist() != [2] * LENGTH


def test_nan_of_an_id_that_is_there():
    class Bad(Changing):
        def forward(self, ids: Tensor) -> Tensor:
            logits = super().forward(ids)
            return logits.masked_fill((ids == 1)[..., None], math.nan)

    options = {"strategy": "confidence", "editing_threshold": 0.9, "steps": 4, **GREEDY}
    with pytest.raises(InvalidLogitsError, match="logits are NaN in step 2 of 4, sequence 0"):
        neighbours(Bad(1)).generate(**options)


@pytest.mark.parametrize("sizes", [[], [5], [2, 3], [1, 1, 3], [3, 2]])
@pytest.mark.parametrize("number", range(6))
def test_chunks_are_read_in_two_parts(sizes, number):
    """Each before the next is made, which may take its memory."""
    total = sum(sizes)
    number = min(number, total)
    buffer = torch.empty(5, 1)

    def chunks():
        first = 0
        for size in sizes:
            part = buffer[:size]
            part[:, 0] = torch.arange(first, first + size)
            yield part
            first += size

    first, rest = _split(chunks(), number)
    assert [x for part in first for x in part[:, 0].tolist()] == list(range(number))
    assert [x for part in rest for x in part[:, 0].tolist()] == list(range(number, total))
