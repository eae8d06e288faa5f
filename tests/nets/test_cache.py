"""What block-causal nets keep of a block, each kind of net in its own way."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nar_kernels import dense_block_mask
from nar_kernels.nets.cache import Span, can_keep, keep_nothing_yet
from nar_kernels.nets.prediction import TrunkAndHead
from tests.helpers.block_causal import BLOCK, LENGTH, NETS, NUM_TOKENS, Masked, Own, llama, own

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


def span(begin: int, end: int) -> Span:
    return Span(begin, end, BLOCK, CPU)


def logits_of(net: nn.Module, ids: Tensor, arguments: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        prediction = TrunkAndHead(net)(ids, arguments)
        logits = torch.cat([*prediction.logits_at(torch.arange(ids.numel()))]).clone()
    return logits.view(*ids.shape, -1)


def test_masks_of_a_span():
    whole = dense_block_mask(LENGTH, BLOCK, noisy=False)[0, 0]
    for begin in range(0, LENGTH, BLOCK):
        for end in [*range(begin + BLOCK, LENGTH, BLOCK), LENGTH]:
            mask, expected = span(begin, end).mask(), whole[begin:end, :end]
            assert expected.all() if mask is None else torch.equal(mask, expected)
            assert (mask is None) == (end <= begin + BLOCK)
            assert span(begin, end).positions().tolist() == [*range(begin, end)]


@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_a_call_keeps_nothing_but_what_it_is_to_store(name):
    net = NETS[name]().eval()
    ids = torch.randint(NUM_TOKENS, (3, LENGTH))
    expected = logits_of(net, ids, keep_nothing_yet(net).arguments(span(0, LENGTH)))
    kept = keep_nothing_yet(net)
    assert kept.arguments(span(0, 4)).keys() <= kept.names
    kept.store(ids[:, :8], span(0, 8), {})
    for begin, end in [(8, 12), (8, 20), (8, 12)]:
        arguments = kept.arguments(span(begin, end))
        assert arguments.keys() <= kept.names
        for _ in range(2):
            got = logits_of(net, ids[:, begin:end], arguments)
            assert torch.allclose(got, expected[:, begin:end], rtol=0, atol=2e-6)
    kept.store(ids[:, 8:12], span(8, 12), {})
    index = torch.tensor([2, 0])
    kept.select(index)
    kept.store(ids[index, 12:20], span(12, 20), {})
    got = logits_of(net, ids[index, 20:], kept.arguments(span(20, LENGTH)))
    assert torch.allclose(got, expected[index, 20:], rtol=0, atol=2e-6)


class ByBlocks(Own):
    """By FlexAttention."""

    def forward(self, ids: Tensor, block_mask: Any) -> Tensor:  # type: ignore[override]
        from torch.nn.attention.flex_attention import flex_attention

        x = (self.embed(ids) + self.place(torch.arange(ids.shape[1])))[:, None]
        return self.output_head((x + flex_attention(x, x, x, block_mask=block_mask))[:, 0])

    new_cache = property()  # type: ignore[assignment]  # it has none


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("end", [2, 4, 16, LENGTH])
def test_nets_that_keep_nothing_take_a_mask(end):
    """Also where the block of the net is longer than what is there."""
    net, by_blocks, masked = own().eval(), ByBlocks().double().eval(), Masked()
    by_blocks.load_state_dict(net.state_dict())
    masked.inner = net
    ids = torch.randint(NUM_TOKENS, (2, end))
    expected = logits_of(net, ids, keep_nothing_yet(net).arguments(span(0, end)))
    for other in (by_blocks, masked):
        assert not can_keep(other) and can_keep(net)
        with torch.no_grad():
            got = other(ids, **keep_nothing_yet(other).arguments(span(0, end)))
        assert torch.allclose(got, expected, rtol=0, atol=1e-12)


def test_what_is_stored_needs_no_logits():
    net = llama().eval()
    kept = keep_nothing_yet(net)
    rows = []
    net.net.lm_head.register_forward_hook(lambda _, args, __: rows.append(args[0].shape[1]))
    kept.store(torch.zeros(2, 8, dtype=torch.int64), span(0, 8), {})
    assert rows == [1]
