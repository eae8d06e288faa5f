"""`generate` with the arguments of LLaDA's (github.com/ML-GSAI/LLaDA, generate.py)."""

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.neighbours import MASK_ID, Neighbours, neighbours

pytestmark = pytest.mark.usefixtures("one_thread")

EOS = 5


def llada(
    net: nn.Module,
    prompt: Tensor,
    steps: int,
    gen_length: int,
    block_length: int,
    cfg_scale: float = 0.0,
    logits_eos_inf: bool = False,
    confidence_eos_eot_inf: bool = False,
) -> Tensor:
    """Its loop at temperature 0, one sequence, with steps that fill equally many positions. Equal
    confidences go from left to right, and ends rank above what is filled."""
    start = prompt.shape[1]
    x = torch.full((1, start + gen_length), MASK_ID)
    x[:, :start] = prompt
    prompt_index = x != MASK_ID
    blocks = gen_length // block_length
    for block in range(blocks):
        stop = start + (block + 1) * block_length
        for _ in range(steps // blocks):
            logits = net(x).double()
            if cfg_scale > 0:
                un_logits = net(x.masked_fill(prompt_index, MASK_ID)).double()
                logits = un_logits + (cfg_scale + 1) * (logits - un_logits)
            logits[..., MASK_ID] = -torch.inf  # which LLaDA does not predict
            if logits_eos_inf:
                logits[..., EOS] = -torch.inf
            x0 = logits.argmax(-1)
            x0_p = logits.softmax(-1).gather(-1, x0[..., None])[..., 0]
            if confidence_eos_eot_inf:
                x0_p[x0 == EOS] = -1.0
            x0_p[:, stop:] = -torch.inf
            confidence = x0_p.where(x == MASK_ID, -torch.inf)
            order = confidence[0].argsort(descending=True, stable=True)
            chosen = order[: gen_length // steps]
            x[0, chosen] = x0[0, chosen]
    return x


@pytest.mark.parametrize("block_length", [2, 4, 8])
@pytest.mark.parametrize("steps", [8, 4])
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({}, {}),
        ({"cfg_scale": 1.5}, {"guidance_scale": 2.5}),
        ({"logits_eos_inf": True}, {"eos_id": EOS, "eos": "never"}),
        ({"confidence_eos_eot_inf": True}, {"eos_id": EOS, "eos": "last"}),
    ],
    ids=["plain", "guided", "never", "last"],
)
def test_answers_are_those_of_llada(block_length, steps, theirs, ours):
    net = Neighbours()
    net.table[:, EOS] += 2.0  # which is drawn now and then
    prompts = [[1], [2, 3, 4], [7] * 8, [3, 1], [EOS, 2, 9]]
    shared = {"steps": steps, "block_length": block_length}
    expected = [llada(net, torch.tensor([p]), gen_length=8, **shared, **theirs)[0] for p in prompts]
    ids = neighbours(net).generate(
        prompt=prompts,
        max_new_tokens=8,
        strategy="confidence",
        start_temperature=0.0,
        filter_thres=None,
        **shared,
        **ours,
    )
    has_end = 0
    for row, prompt, wanted in zip(ids, prompts, expected, strict=True):
        answer, wanted = row[len(prompt) : len(prompt) + 8].tolist(), wanted[len(prompt) :].tolist()
        if EOS in wanted and "eos_id" in ours:  # LLaDA cuts when it decodes text
            has_end += 1
            end = wanted.index(EOS)
            wanted[end:] = [EOS] * (8 - end)
        assert answer == wanted
    assert has_end > 0 or ours.get("eos") != "last"
