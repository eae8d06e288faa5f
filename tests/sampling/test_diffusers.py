"""Steps of decoding are those of the schedulers of diffusers, on the same logits."""

from typing import Any

import pytest
from torch import Tensor

from tests.helpers.neighbours import MASK_ID
from tests.helpers.stepwise import LENGTHS, assert_by_rule

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.seconds]


@pytest.fixture(scope="module")
def diffusers() -> Any:  # whose import takes seconds
    return pytest.importorskip("diffusers", minversion="0.42")


class BlockRefinement:
    """LLaDA 2's, and the editing of 2.1."""

    def __init__(self, diffusers: Any, steps: int, **options: Any) -> None:
        self.edits = options["editing_threshold"] is not None
        self.num_edited = self.num_sure = 0
        self.scheduler = diffusers.BlockRefinementScheduler(**options)
        self.scheduler.set_timesteps(steps)
        self.quotas = self.scheduler.get_num_transfer_tokens(options["block_length"], steps)

    def __call__(
        self, number: int, ids: Tensor, logits: Tensor, is_prompt: Tensor
    ) -> tuple[Tensor, bool]:
        out = self.scheduler.step(
            logits[None], number, ids[None], mask_token_id=MASK_ID, prompt_mask=is_prompt
        )
        self.num_sure += int(out.transfer_index.sum() > self.quotas[number])
        num_edited = int(out.editing_transfer_index.sum())
        self.num_edited += num_edited
        return out.prev_sample[0], num_edited > 0


class EntropyBound:
    """Which positions it accepts among the masked ones. (It knows no mask; others hold noise.)"""

    edits = False

    def __init__(self, diffusers: Any, bound: float) -> None:
        # Entropies are those of the logits, whatever the temperature.
        self.scheduler = diffusers.EntropyBoundScheduler(bound, t_max=1.0, t_min=1.0)
        self.num_sure = 0

    def __call__(
        self, number: int, ids: Tensor, logits: Tensor, is_prompt: Tensor
    ) -> tuple[Tensor, bool]:
        masked = (ids == MASK_ID).nonzero()[:, 0]
        out = self.scheduler.step(logits[None, masked], number, ids[None, masked])
        accepted = masked[out.accepted_index[0]]
        self.num_sure += int(len(accepted) > 1)
        ids[accepted] = logits[accepted].argmax(1)
        return ids, False


@pytest.mark.parametrize("guidance_scale", [1.0, 1.5])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("block_length", "steps"), [(4, 4), (8, 3), (8, 11)])
@pytest.mark.parametrize("threshold", [0.5, 0.9])
@pytest.mark.parametrize("editing_threshold", [None, 0.4, 0.8])
def test_quotas_and_editing(
    diffusers, block_length, steps, threshold, editing_threshold, lengths, guidance_scale
):
    options = dict(
        threshold=threshold, editing_threshold=editing_threshold, block_length=block_length
    )
    rules = assert_by_rule(
        lambda: BlockRefinement(diffusers, steps, **options),
        steps,
        strategy="quota",
        lengths=lengths,
        guidance_scale=guidance_scale,
        **options,
    )
    assert sum(rule.num_sure for rule in rules) > 0
    assert (sum(rule.num_edited for rule in rules) > 0) == (editing_threshold is not None)


@pytest.mark.parametrize("guidance_scale", [1.0, 1.5])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("block_length", [4, 8])
@pytest.mark.parametrize("bound", [0.1, 1.0])
def test_entropy_bound(diffusers, block_length, bound, lengths, guidance_scale):
    rules = assert_by_rule(
        lambda: EntropyBound(diffusers, bound),
        block_length,
        strategy="entropy_bound",
        entropy_bound=bound,
        block_length=block_length,
        lengths=lengths,
        guidance_scale=guidance_scale,
    )
    assert sum(rule.num_sure for rule in rules) > 0
