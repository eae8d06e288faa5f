"""Decoding step by step, against a rule that is written for one block of one sequence."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from tests.helpers.neighbours import LENGTH, MASK_ID, NUM_TOKENS, Neighbours, neighbours

EOS = 5
# Of prompts that end in the middle of a block, too.
PROMPTS = [[], [1], [2, 3, 4], [7, 1, 2, 3], [3, 1, 9, 9, 9, 2, 0], [2] * 8]
LENGTHS = [{"max_new_tokens": 8}, {"length": LENGTH}]


class Rule(Protocol):
    """A step of decoding at temperature 0."""

    edits: bool  # whether ids that are there may be replaced

    def __call__(
        self, number: int, ids: Tensor, logits: Tensor, is_prompt: Tensor
    ) -> tuple[Tensor, bool]:
        """New ids of a block ``[n]``, and whether any was replaced, from the number of the step in
        its block, ids ``[n]``, logits ``[n, V]`` and whether ids are of the prompt, ``[n]``."""
        ...


class Distinct(Neighbours):
    """Has no two equal rows of logits, which a peer may take in any order, and is sure of some."""

    def __init__(self) -> None:
        super().__init__()
        noise = torch.Generator().manual_seed(1)
        self.table *= 5 * torch.rand(97, 1, generator=noise)
        self.places = 0.05 * torch.randn(LENGTH, NUM_TOKENS, generator=noise)

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) + self.places[: ids.shape[1]]


def _guided(net: Neighbours, ids: Tensor, prompt_length: int, scale: float) -> Tensor:
    """``[L, V]``; the mask is never drawn."""
    logits = net(ids[None])[0]
    if scale != 1:
        masked = ids.clone()
        masked[:prompt_length] = MASK_ID
        unguided = net(masked[None])[0]
        logits = unguided + scale * (logits - unguided)
    return logits.index_fill(1, torch.tensor([MASK_ID]), -torch.inf)


def _by_rule(
    rule: Rule,
    predict: Callable[[Tensor], Tensor],
    prompt: list[int],
    blocks: list[range],
    steps: int,
) -> Iterator[list[int]]:
    """The ids before the first step and after each."""
    end = blocks[-1].stop
    ids = torch.tensor(prompt + [MASK_ID] * (end - len(prompt)))
    is_prompt = torch.arange(end) < len(prompt)
    yield ids.tolist()
    for block in blocks:
        part = slice(block.start, block.stop)
        for number in range(steps):
            was_filled = bool((ids[part] != MASK_ID).all())
            new, is_edited = rule(number, ids[part].clone(), predict(ids)[part], is_prompt[part])
            ids[part] = new
            yield ids.tolist()
            is_filled = bool((new != MASK_ID).all())
            if is_filled and (not rule.edits or (was_filled and not is_edited)):
                break


def _changes(rows: list[list[int]]) -> list[list[int]]:
    """Without repeats: a sequence waits for others of its batch."""
    return [row for row, last in zip(rows, [None, *rows], strict=False) if row != last]


def _cut(ids: list[int], first: int) -> list[int]:
    """With an end behind the prompt."""
    end = ids.index(EOS, first) if EOS in ids[first:] else len(ids)
    return ids[:end] + [EOS] * (len(ids) - end)


def assert_by_rule(
    make_rule: Callable[[], Rule],
    steps: int,
    *,
    block_length: int,
    lengths: dict[str, int],
    guidance_scale: float = 1.0,
    **options: Any,
) -> Sequence[Any]:
    """All steps of :data:`PROMPTS` are those of a rule, each prompt alone and all in a batch, and
    what remains with ``eos_id``.

    Args:
        make_rule: for each prompt.
        steps: of a block.
        lengths: one of :data:`LENGTHS`.
        options: of ``generate``.

    Returns:
        The rules, after use.
    """
    net, rules, expected = Distinct(), [], []
    model = neighbours(net)
    options |= {"start_temperature": 0.0, "filter_thres": None, "block_length": block_length}
    options |= {"guidance_scale": guidance_scale, **lengths}
    prompts = PROMPTS if guidance_scale == 1 else PROMPTS[1:]  # by which it is guided
    for prompt in prompts:
        given, first = len(prompt), 0
        if "max_new_tokens" in lengths:
            first = given
        end = lengths.get("length", given + 8)
        blocks = [range(a, min(a + block_length, end)) for a in range(first, end, block_length)]
        blocks = [block for block in blocks if block.stop > given]
        rules.append(make_rule())
        predict = lambda ids, given=given: _guided(net, ids, given, guidance_scale)  # noqa: E731
        rows = list(_by_rule(rules[-1], predict, prompt, blocks, steps))
        expected.append(rows)
        own = {"prompt": [prompt], "steps": steps * len(blocks), **options}
        assert [state.ids[0].tolist() for state in model.generate_steps(**own)] == rows
        assert model.generate(eos_id=EOS, **own)[0].tolist() == _cut(rows[-1], given)
    if "max_new_tokens" in lengths:  # else they have different numbers of blocks
        shared = {"prompt": prompts, "steps": steps * len(blocks), **options}
        together = list(model.generate_steps(**shared))
        ended = model.generate(eos_id=EOS, **shared).tolist()
        for i, (prompt, rows) in enumerate(zip(prompts, expected, strict=True)):
            end = len(rows[0])
            found = [state.ids[i, :end].tolist() for state in together]
            assert _changes(found) == _changes(rows)
            assert ended[i][:end] == _cut(rows[-1], len(prompt))
    return rules
