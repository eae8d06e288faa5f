"""Blocks with keys and values of those before: as without, by fewer tokens."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nar_kernels import NonAutoregressiveWrapper, SamplingConfig
from nar_kernels.sampling.decode import DecodeState
from nar_kernels.sampling.states import Blocks
from tests.helpers.block_causal import (
    BLOCK,
    LENGTH,
    MASK_ID,
    NETS,
    NUM_TOKENS,
    Masked,
    absolute,
    llama,
    model_of,
    own,
    rotary,
    whole_mask,
)
from tests.helpers.modes import MODES

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # Of transformers, whose masks are replaced.
    pytest.mark.filterwarnings("ignore:.*that is causal.*:UserWarning"),
]

M = MASK_ID
PROMPTS: dict[str, Any] = {
    "none": None,
    "one": [1, 2, 3, 4, 5, 6],
    "blocks": [1, 2, 3, 4] * 3,
    "ragged": [[1] * 9, [], [2, 3], [3] * 21],
    # The third block has nothing to fill.
    "gaps": [[1, M, 3, 4] + [5] * 8 + [M, 2], [1, 2, M, M] + [3] * 9],
}


def states(net: nn.Module, **options: Any) -> list[DecodeState]:
    return list(model_of(net).generate_steps(**{"seed": 1, **options}))


def reference(net: nn.Module, **options: Any) -> list[DecodeState]:
    """By calls for the whole sequence with a mask that the caller gives."""
    model = NonAutoregressiveWrapper(net, mask_id=MASK_ID, steps=12)
    how = {"seed": 1, "block_length": BLOCK, "net_kwargs": whole_mask(net), **options}
    return list(model.generate_steps(**how))


def assert_same(got: list[DecodeState], expected: list[DecodeState]) -> None:
    assert len(got) == len(expected) > 1
    for state, other in zip(got, expected, strict=True):
        assert torch.equal(state.ids, other.ids)
        assert torch.allclose(state.log_prob, other.log_prob, rtol=0, atol=2e-5, equal_nan=True)


def batch(name: str) -> dict[str, Any]:
    return {"prompt": PROMPTS[name], "batch_size": None if name in ("ragged", "gaps") else 3}


def test_what_is_said_of_the_blocks():
    model = model_of(rotary())
    assert model.generate_steps(2).blocks == Blocks(BLOCK, [0, 0], cached=True)
    assert model.generate_steps(2, cache=False).blocks == Blocks(BLOCK, [0, 0], cached=False)
    whole = NonAutoregressiveWrapper(rotary(), mask_id=MASK_ID, steps=12)
    assert whole.generate_steps(2).blocks is None
    # Blocks of other nets begin behind the prompt.
    ragged = {"prompt": [[1] * 9, [2] * 6], "max_new_tokens": 8, "block_length": 4}
    assert whole.generate_steps(**ragged).blocks == Blocks(4, [9, 6], cached=False)


@pytest.mark.parametrize(
    ("prompt", "temperature"), [*((prompt, 1.0) for prompt in PROMPTS), ("ragged", 0.0)]
)
@pytest.mark.parametrize("name", NETS)
def test_same_as_the_whole_sequence(name, prompt, temperature):
    net = NETS[name]()
    options = {**batch(prompt), "start_temperature": temperature}
    expected = reference(net, **options)
    assert_same(states(net, cache=True, **options), expected)
    assert_same(states(net, cache=False, **options), expected)
    if temperature > 0:  # it matters what a net looks at
        bidirectional = NonAutoregressiveWrapper(net, mask_id=MASK_ID, steps=12)
        other = bidirectional.generate_steps(seed=1, block_length=BLOCK, **options).last()
        assert name in ("llama", "qwen3") or not torch.equal(other.ids, expected[-1].ids)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_every_strategy(mode):
    net = own()
    options = {**batch("ragged"), **mode}
    assert_same(states(net, cache=True, **options), reference(net, **options))


@pytest.mark.parametrize("net", [rotary, absolute])
def test_float32_to_rounding(net):
    net = net().float()
    options = batch("ragged")
    got, expected = states(net, cache=True, **options)[-1], reference(net, **options)[-1]
    assert torch.equal(got.ids, expected.ids)
    assert torch.allclose(got.log_prob, expected.log_prob, rtol=0, atol=1e-3)


def test_the_option_alone_says_that_the_net_is_block_causal():
    net = rotary()
    model = NonAutoregressiveWrapper(net, mask_id=MASK_ID, steps=12)
    got = list(model.generate_steps(2, seed=1, block_length=BLOCK, cache=True))
    assert_same(got, reference(net, batch_size=2))


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize(
    "lengths",
    [{"length": [9, 22, 9, 22]}, {"max_new_tokens": 6}],
)
def test_sequences_of_different_lengths(name, lengths):
    prompts = [[1] * 9, [1, 2], [2, 3], [3] * 16]
    if "length" in lengths:
        prompts[0] = []
    net = NETS[name]()
    options = {"prompt": prompts, **lengths}
    got = states(net, cache=True, **options)
    assert_same(got, states(net, cache=False, **options))
    model = model_of(net)
    for i, prompt in enumerate(prompts):
        length = lengths.get("length", [len(p) + 6 for p in prompts])[i]
        alone = model.generate(1, seed=1, first_sequence=i, prompt=[prompt], length=length)
        assert torch.equal(got[-1].ids[i, :length], alone[0])  # blocks begin at position 0


@pytest.mark.parametrize("name", ["rotary", "llama", "own"])
@pytest.mark.parametrize("mode", [{}, {"strategy": "quota", "threshold": 0.3}])
def test_answers_that_end(name, mode):
    net = NETS[name]()

    def ends(logits: Tensor, rows: Tensor) -> Tensor:
        """Sequence i ends at position 3 i."""
        logits[:, 1] = torch.where(rows % LENGTH == rows // LENGTH * 3, 100.0, -torch.inf)
        return logits

    options = {**batch("none"), "batch_size": 6, "eos_id": 1, "logits_processor": ends, **mode}
    sizes = batch_sizes(net, name)
    got = states(net, cache=True, **options)
    assert {6, 4, 3, 2} <= {*sizes}  # fewer and fewer
    expected = reference(net, **options)
    assert len(got) == len(expected)
    assert torch.equal(got[-1].ids, expected[-1].ids)
    assert (got[-1].ids == 1).sum(1).tolist() == [LENGTH - 3 * i for i in range(6)]
    options |= {"prompt": [[3], [4] * 6] * 3, "max_new_tokens": 10, "batch_size": None}
    assert_same(states(net, cache=True, **options), states(net, cache=False, **options))


def batch_sizes(net: nn.Module, name: str) -> list[int]:
    """Of the calls from now on."""
    sizes: list[int] = []
    embedding = {
        "rotary": lambda: net.token_emb,
        "llama": lambda: net.net.model.embed_tokens,
        "own": lambda: net.embed,
    }[name]()
    embedding.register_forward_hook(lambda _, args, __: sizes.append(len(args[0])))
    return sizes


@pytest.mark.parametrize("name", ["absolute", "qwen3", "own"])
def test_guidance_has_a_cache_of_its_own(name):
    net = NETS[name]()
    options = {**batch("ragged"), "guidance_scale": 1.7}
    got = states(net, cache=True, **options)
    assert_same(got, reference(net, **options))
    assert not torch.equal(got[-1].ids, states(net, **batch("ragged"))[-1].ids)


def test_arguments_of_the_net():
    """One for each sequence, also where others have ended, and without the condition."""
    net = own()
    options = {
        **batch("none"),
        "batch_size": 6,
        "net_kwargs": {"shift": torch.linspace(-1, 1, 6, dtype=torch.float64)},
        "unconditional": {"shift": torch.zeros(6, dtype=torch.float64)},
        "guidance_scale": 2.0,
        "eos_id": 1,
    }
    got = states(net, cache=True, **options)[-1]
    options["net_kwargs"] = options["net_kwargs"] | whole_mask(net)
    assert torch.equal(got.ids, reference(net, **options)[-1].ids)


def test_a_logits_processor_gets_positions_of_the_sequence():
    net = rotary()
    seen: list[Tensor] = []

    def processor(logits: Tensor, rows: Tensor) -> Tensor:
        seen.append(rows)
        return logits.index_fill(1, torch.tensor([0, 1, 2, 3]), -torch.inf)

    options = {**batch("one"), "logits_processor": processor}
    got = states(net, cache=True, **options)
    rows, seen = seen, []
    assert_same(got, reference(net, **options))
    assert [r.tolist() for r in rows] == [r.tolist() for r in seen]


def test_what_the_net_is_called_for():
    """Block by block, the given ones at once, and the last one never to be kept."""
    net = own()
    model_of(net).generate(cache=True)
    net.fed.clear()
    model_of(net).generate(2, prompt=[1] * 10, cache=True, steps=8, seed=0)
    block, short = ((2, BLOCK), False), ((2, LENGTH % BLOCK), False)
    kept = ((2, BLOCK), True)
    expected = [((2, 8), True), *[block] * 2, kept, *[block] * 2, kept, *[block] * 2, kept]
    assert net.fed == [*expected, *[short] * 2]
    net.fed.clear()
    model_of(net).generate(2, prompt=[1] * 10, cache=False, steps=8, seed=0)
    ends = [12, 12, 16, 16, 20, 20, 22, 22]
    assert net.fed == [((2, end), False) for end in ends]


def test_where_nothing_is_to_fill_the_net_is_not_called():
    net = own()
    model_of(net).generate(1)
    net.fed.clear()
    assert model_of(net).generate(1, prompt=[1] * LENGTH, cache=True).tolist() == [[1] * LENGTH]
    assert model_of(net).generate(0, cache=True).shape == (0, LENGTH)
    assert net.fed == []


def test_by_default_the_net_keeps_what_it_can():
    net = own()
    model = model_of(net)
    expected = model.generate(2, seed=0, cache=False)
    net.fed.clear()
    assert torch.equal(model.generate(2, seed=0), expected)
    assert any(store for _, store in net.fed)
    masked = Masked()
    masked.inner = net
    net.fed.clear()
    assert torch.equal(model_of(masked).generate(2, seed=0), expected)
    assert not any(store for _, store in net.fed)
    with pytest.raises(ValueError, match="Masked is neither of x-transformers"):
        model_of(masked).generate(2, cache=True)


def test_a_config_has_the_option():
    net = rotary()
    config = SamplingConfig(cache=True, steps=12)
    expected = model_of(net).sample(SamplingConfig(cache=False, steps=12), 2, seed=1).last()
    assert torch.equal(model_of(net).sample(config, 2, seed=1).last().ids, expected.ids)


def test_by_default_each_block_has_a_step():
    model = NonAutoregressiveWrapper(rotary(), mask_id=MASK_ID, block_length=1)
    assert len(list(model.sample(SamplingConfig(), 2))) == 1 + LENGTH > 1 + 18


def test_a_net_that_looks_across_blocks():
    net = absolute(shift_tokens=1)
    with pytest.raises(ValueError, match=r"logits of TransformerWrapper differ by .* cache=False"):
        model_of(net).generate(2, cache=True)
    with pytest.warns(UserWarning, match="without a cache, since the logits"):
        model_of(net).generate(2)
    model_of(net).generate(2, cache=False)
    with pytest.raises(ValueError, match="TransformerWrapper fails with one"):
        model_of(absolute(alibi_pos_bias=True)).generate(2, cache=True)


def test_a_compiled_net():
    net = torch.compile(rotary(), backend="eager")
    with pytest.raises(ValueError, match="is compiled"):
        model_of(net).generate(2, cache=True)


def test_eager_attention_of_hugging_face():
    options = batch("ragged")
    net = llama("eager")
    assert_same(states(net, cache=True, **options), reference(llama(), **options))
    assert_same(states(net, cache=False, **options), reference(llama(), **options))


def test_what_does_not_go_with_it():
    net = absolute()
    model = model_of(net)
    with pytest.raises(ValueError, match="block_length is 8, but the net has blocks of 4"):
        model.generate(block_length=8)
    with pytest.raises(ValueError, match="nothing says in which blocks"):
        NonAutoregressiveWrapper(net, mask_id=MASK_ID).generate(cache=True)
    with pytest.raises(ValueError, match="attn_mask was given for the net"):
        model.generate(attn_mask=torch.ones(LENGTH, LENGTH, dtype=torch.bool))
    blocks = {"block_length": BLOCK, "cache": True, "steps": 12}
    with pytest.raises(ValueError, match="strategy is 'critic'"):
        NonAutoregressiveWrapper(net, mask_id=MASK_ID, self_token_critic=True).generate(**blocks)
    with pytest.raises(ValueError, match="self_cond gives each call"):
        NonAutoregressiveWrapper(net, mask_id=MASK_ID, self_cond=True).generate(**blocks)
    with pytest.raises(TypeError, match="cache is 1"):
        model.generate(cache=1)


class NoMask(nn.Module):
    num_tokens, max_seq_len = NUM_TOKENS, LENGTH

    def forward(self, ids: Tensor) -> Tensor:
        return torch.zeros(*ids.shape, NUM_TOKENS)


def test_a_net_without_a_mask():
    with pytest.raises(ValueError, match="NoMask declares none of block_mask, attn_mask"):
        model_of(NoMask()).generate()
