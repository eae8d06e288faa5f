"""`generate`: prompts, strategies, guidance, and what it asks of the net."""

import math
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from x_transformers import Encoder, TransformerWrapper

from nar_kernels import NetAdapter, NonAutoregressiveWrapper
from nar_kernels.errors import InvalidLogitsError
from nar_kernels.nets.adapter import batch_independent
from nar_kernels.ops.masking import MaskingConfig
from nar_kernels.sampling.config import ADAPTIVE, NO_REMASK, Strategy
from nar_kernels.sampling.nans import DeferredNanCheck
from nar_kernels.sampling.prompt import is_one_sequence, read_prompt
from tests.helpers.goodness_of_fit import chi_square_p

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_TOKENS, MASK_ID, LENGTH = 12, 4, 16
STRATEGIES: list[Strategy] = [name for name in get_args(Strategy) if name != "critic"]
M = MASK_ID


def make_model(net: nn.Module | None = None, **options) -> NonAutoregressiveWrapper:
    torch.manual_seed(0)
    if net is None:
        net = TransformerWrapper(
            num_tokens=NUM_TOKENS,
            max_seq_len=LENGTH,
            attn_layers=Encoder(dim=16, depth=1, heads=2, attn_dim_head=8),
        )
    return NonAutoregressiveWrapper(net, mask_id=MASK_ID, **options)


class Table(nn.Module):
    """Logits that are given, for each position. Keeps what it was asked."""

    num_tokens, max_seq_len = NUM_TOKENS, LENGTH

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits
        self.asked: list[tuple[Tensor, dict]] = []

    def forward(self, ids: Tensor, shift: float = 0.0) -> Tensor:
        self.asked.append((ids.clone(), {"shift": shift}))
        logits = self.logits.expand(*ids.shape, -1).clone()
        logits[..., 7] += shift
        return logits


# Prompts


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    "options",
    [{}, {"block_length": 5}, {"can_mask_prev_unmasked": True}, {"seed": 3, "steps": 40}],
    ids=str,
)
def test_prompts_of_all_kinds(strategy, options):
    if "can_mask_prev_unmasked" in options and strategy in NO_REMASK:
        pytest.skip("does not go with it")
    prompts = [
        [],
        [1, 2, 3],
        torch.tensor([5] * LENGTH, dtype=torch.int16),
        [0, M, 1, M, M, 2],
    ]
    model = make_model()
    ids = model.generate(prompt=prompts, strategy=strategy, **options)
    assert ids.shape == (4, LENGTH) and ids.dtype == torch.int64
    assert ((ids >= 0) & (ids < NUM_TOKENS) & (ids != MASK_ID)).all()
    assert ids[1, :3].tolist() == [1, 2, 3]
    assert ids[2].tolist() == [5] * LENGTH
    assert ids[3, [0, 2, 5]].tolist() == [0, 1, 2]


def test_the_net_sees_the_prompt():
    net = Table(torch.zeros(NUM_TOKENS))
    prompt = torch.full((2, LENGTH), MASK_ID)
    prompt[0, 3] = 9
    prompt[1, :] = 8
    make_model(net).generate(prompt=prompt, steps=2)
    for ids, _ in net.asked:
        assert ids[0, 3] == 9 and (ids[1] == 8).all()
    assert len(net.asked) == 2


def test_shapes_of_results():
    model = make_model()
    assert model.generate().shape == (LENGTH,)
    assert model.generate(prompt=[1]).shape == (LENGTH,)
    assert model.generate(prompt=torch.tensor([1, 2])).shape == (LENGTH,)
    assert model.generate(1, prompt=[1]).shape == (1, LENGTH)
    assert model.generate(3, prompt=[1]).shape == (3, LENGTH)
    assert model.generate(prompt=[[1]]).shape == (1, LENGTH)
    assert model.generate(prompt=torch.ones(2, 4, dtype=torch.int64)).shape == (2, LENGTH)
    assert (
        model.generate(prompt=torch.ones(2, LENGTH, dtype=torch.int64)).tolist()
        == [[1] * LENGTH] * 2
    )


def test_prompts_without_a_gap_ask_nothing():
    net = Table(torch.zeros(NUM_TOKENS))
    states = list(make_model(net).generate_steps(prompt=[1] * LENGTH))
    assert len(states) == 1 and not net.asked


@pytest.mark.parametrize(
    ("prompt", "batch_size", "error", "message"),
    [
        ([1] * (LENGTH + 1), None, ValueError, "a prompt has 17 ids: the net takes 16 at most"),
        ([1, NUM_TOKENS], None, ValueError, r"holds id 12: ids must be in \[0, 12\), with 4 where"),
        ([[1], [-1]], None, ValueError, "holds id -1"),
        ([[1], [2]], 3, ValueError, "batch_size is 3, but the prompt has 2 sequences"),
        (torch.zeros(3), None, TypeError, r"torch.float32 and shape \[3\]: it must be integers"),
        (torch.zeros(1, 2, 3, dtype=torch.int64), None, TypeError, r"shape \[2, 3\]"),
        (torch.ones(2, dtype=torch.bool), None, TypeError, "torch.bool"),
    ],
)
def test_mistakes_in_prompts(prompt, batch_size, error, message):
    with pytest.raises(error, match=message):
        make_model().generate(batch_size, prompt=prompt)


def test_read_prompt_pads_with_masks():
    masking = MaskingConfig(NUM_TOKENS, MASK_ID)
    ids = read_prompt([[1, 2], []], None, 4, masking)
    assert ids.tolist() == [[1, 2, M, M], [M] * 4]
    assert read_prompt(None, 2, 3, masking).tolist() == [[M] * 3] * 2
    assert read_prompt([7], 2, 2, masking).tolist() == [[7, M]] * 2


# Independence of the batch, repetition


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("self_cond", [False, True])
def test_a_sequence_is_the_same_in_any_batch(strategy, self_cond):
    # A net without products over the batch: the same rounding for any size.
    logits = torch.randn(LENGTH, NUM_TOKENS, generator=torch.Generator().manual_seed(1))
    model = make_model(Table(logits)) if not self_cond else make_model(self_cond=True)
    choice = {"choice_temperature": 1.0} if strategy in ("confidence", "margin") else {}
    prompts = [[1], [2, M, 3], [], [5] * 9]
    whole = model.generate(prompt=prompts, strategy=strategy, seed=5, **choice)
    for size in (1, 3):
        part = model.generate(prompt=prompts[:size], strategy=strategy, seed=5, **choice)
        assert torch.equal(part, whole[:size])
    assert not torch.equal(
        whole, model.generate(prompt=prompts, strategy=strategy, seed=6, **choice)
    )


@pytest.mark.parametrize(
    ("options", "batch"),
    [
        ({}, 1),
        ({"prompt": [1, 2]}, 1),
        ({"prompt": [[1], [1], [1]]}, 1),
        ({"prompt": [[1], [1], [2]]}, 3),
        ({"shift": 0.5}, 3),  # could differ by sequence
        ({"logits_processor": lambda logits, rows: logits}, 3),
        ({"prompt": [1], "guidance_scale": 2.0}, 3),
    ],
    ids=lambda value: str(list(value)) if isinstance(value, dict) else str(value),
)
def test_sequences_that_begin_alike_share_the_first_call(options, batch):
    net = Table(torch.zeros(NUM_TOKENS))
    net.batch_independent = True
    make_model(net).generate(3, steps=2, **options)
    assert len(net.asked[0][0]) == batch and len(net.asked[-1][0]) == 3


def test_whose_calls_are_shared():
    def x_transformer() -> TransformerWrapper:
        return make_model().net

    class Conditioned(TransformerWrapper):
        pass

    assert batch_independent(x_transformer())
    assert batch_independent(nn.DataParallel(x_transformer()))
    assert not batch_independent(Table(torch.zeros(NUM_TOKENS)))  # makes no promise
    attn_layers = Encoder(dim=16, depth=1)
    own = Conditioned(num_tokens=12, max_seq_len=16, attn_layers=attn_layers)
    assert not batch_independent(own)
    net = x_transformer()
    net.batch_independent = False
    assert not batch_independent(net)
    # Compiled, as a whole or in part.
    assert not batch_independent(torch.compile(x_transformer(), backend="eager"))
    for compiled in (net := x_transformer(), net.attn_layers):
        compiled.compile(backend="eager")
        assert not batch_independent(net)
        compiled._compiled_call_impl = None
    assert batch_independent(net)
    net.forward = torch.compile(net.forward, backend="eager")
    assert not batch_independent(net)


@pytest.mark.parametrize("strategy", ["confidence", "random"])
def test_shared_calls_change_nothing(strategy):
    """Different prompts behind, so that the batch as a whole does not begin alike."""
    model = make_model(self_cond=True)
    options = dict(strategy=strategy, seed=3, steps=5)
    shared = model.generate(4, **options)
    by_themselves = model.generate(prompt=[[], [], [], [], [1]], **options)[:4]
    assert torch.equal(shared, by_themselves)


def test_another_default_device():
    model = make_model()
    expected = model.generate(prompt=[[1], [], [2, 3]], seed=0)
    with torch.device("meta"):
        ids = model.generate(prompt=[[1], [], [2, 3]], seed=0)
    assert torch.equal(ids, expected)


# Steps


def test_states():
    model = make_model(steps=6)
    states = list(model.generate_steps(3, prompt=[1, 2, 3, 4]))  # 4 is a mask
    assert [state.step for state in states] == list(range(7))
    assert [state.masked.sum(1).tolist() for state in states] == [
        [n] * 3 for n in (13, 10, 8, 6, 4, 2, 0)
    ]
    assert (states[0].log_prob[:, :3] == 0).all() and states[0].log_prob[:, 3:].isnan().all()
    assert (states[-1].log_prob <= 0).all()


def test_threshold_takes_as_many_steps_as_it_needs():
    logits = torch.zeros(LENGTH, NUM_TOKENS)
    logits[:12, 7] = 9.0  # sure of these
    states = list(make_model(Table(logits)).generate_steps(strategy="threshold", seed=0))
    assert [state.masked.sum().item() for state in states] == [16, 4, 3, 2, 1, 0]
    assert states[0].num_steps == LENGTH
    states = list(make_model(Table(logits)).generate_steps(strategy="threshold", seed=0, steps=2))
    assert [state.masked.sum().item() for state in states] == [16, 4, 0]


def test_blocks_are_filled_from_left_to_right():
    for strategy in STRATEGIES:
        options = {} if strategy in ADAPTIVE else {"steps": 8}
        states = list(make_model().generate_steps(2, block_length=4, strategy=strategy, **options))
        for state in states:
            first = state.masked.float().argmax(1)
            block = first // 4 * 4 + 4
            for row, end in zip(state.masked, block, strict=True):
                assert row[int(end) :].all() or not row.any()
        assert not states[-1].masked.any()


def test_progress_bar(capsys):
    pytest.importorskip("tqdm")
    make_model().generate(2, steps=5, progress=True)
    assert "5/5" in capsys.readouterr().err


# What is drawn


def test_forbidden_ids_are_those_that_are_never_masked():
    logits = torch.zeros(NUM_TOKENS)
    logits[[0, 11]] = 50.0
    ids = make_model(Table(logits), never_mask_ids=(0, 11)).generate(64, filter_thres=None)
    assert set(ids.unique().tolist()) == set(range(NUM_TOKENS)) - {0, 11, MASK_ID}


def test_logits_processor():
    seen = []

    def only_even(logits: Tensor, rows: Tensor) -> Tensor:
        seen.append(rows)
        assert logits.shape == (len(rows), NUM_TOKENS)
        odd = torch.arange(NUM_TOKENS) % 2 == 1
        # Position 3 must be 9.
        is_third = (rows % LENGTH == 3)[:, None]
        nine = torch.arange(NUM_TOKENS) == 9
        return logits.masked_fill(torch.where(is_third, ~nine, odd), -torch.inf)

    ids = make_model().generate(5, logits_processor=only_even, strategy="random")
    assert (ids[:, 3] == 9).all()
    ids[:, 3] = 0
    assert (ids % 2 == 0).all()
    # In random order each position is asked for once.
    assert torch.cat(seen).sort().values.tolist() == list(range(5 * LENGTH))


# Guidance


def test_guidance_by_arguments_of_the_net():
    net = Table(torch.zeros(NUM_TOKENS))
    model = make_model(net)
    number, scale = 6000, 3.0
    ids = model.generate(
        number // LENGTH,
        start_temperature=1e9,  # so that annealing leaves it there: all logits count as 0 ...
        filter_thres=None,
        steps=1,
        guidance_scale=scale,
        unconditional={"shift": -0.25},
        shift=0.5,
        seed=0,
    )
    assert [kwargs for _, kwargs in net.asked] == [{"shift": 0.5}, {"shift": -0.25}]
    # ... but for the last step, at temperature 0: -0.25 + 3 * 0.75 = 2 wins.
    assert (ids == 7).all()


def test_guided_logits_have_their_probabilities():
    """-0.25 + 3 (0.5 + 0.25) = 2, at temperature 1."""
    net = Table(torch.zeros(NUM_TOKENS))
    drawn = []

    def keep(logits: Tensor, rows: Tensor) -> Tensor:
        drawn.append(logits.clone())
        return logits

    options = dict(guidance_scale=3.0, unconditional={"shift": -0.25}, shift=0.5, seed=1)
    ids = make_model(net).generate(
        400, 1e-9 + 2.0, None, strategy="random", steps=2, logits_processor=keep, **options
    )
    for logits in drawn:
        expected = torch.zeros(NUM_TOKENS)
        expected[7] = 2.0
        torch.testing.assert_close(logits, expected.expand_as(logits))
    # The first of the two steps is at temperature 1, and fills half; the other is greedy.
    counts = ids.flatten().bincount(minlength=NUM_TOKENS)
    counts[7] -= 400 * LENGTH // 2
    probs = expected.index_fill(0, torch.tensor([MASK_ID]), -torch.inf).softmax(0).double()
    allowed = probs > 0
    assert chi_square_p(counts[allowed], probs[allowed] * counts.sum()) > 1e-4


def test_guidance_by_the_prompt():
    net = Table(torch.zeros(NUM_TOKENS))
    make_model(net).generate(2, prompt=[1, 2, 3], steps=2, guidance_scale=2.0)
    assert len(net.asked) == 4
    with_prompt, without = net.asked[2][0], net.asked[3][0]
    assert (with_prompt[:, :3] == torch.tensor([1, 2, 3])).all()
    assert (without[:, :3] == MASK_ID).all()
    assert torch.equal(with_prompt[:, 3:], without[:, 3:])


@pytest.mark.parametrize("self_cond", [False, True])
@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_nets_that_overwrite_their_outputs(guidance_scale, self_cond):
    """As CUDA graphs do, such as those of ``torch.compile(mode="reduce-overhead")``."""
    model = make_model(self_cond=self_cond)
    options = dict(prompt=[[1, 2], [3]], steps=4, seed=2, guidance_scale=guidance_scale)
    expected = model.generate(**options)
    forward, outputs = model.net.forward, {}

    def overwrite(*args, **kwargs):
        new = forward(*args, **kwargs)
        return tree_map(lambda x: outputs.setdefault(x.shape, x.clone()).copy_(x), new)

    model.net.forward = overwrite
    assert torch.equal(model.generate(**options), expected)
    assert len(outputs) == 1 + self_cond  # and hidden states


def test_guidance_by_nothing():
    with pytest.raises(ValueError, match="guidance_scale is 2.0, but there is nothing"):
        make_model().generate(guidance_scale=2.0)


@pytest.mark.parametrize("self_cond", [False, True])
def test_a_scale_of_one_is_no_guidance(self_cond):
    model = make_model(self_cond=self_cond)
    guided = model.generate(2, prompt=[1, 2], seed=0, guidance_scale=1.0 + 1e-7)
    assert torch.equal(guided, model.generate(2, prompt=[1, 2], seed=0))


# Nets of other kinds


def test_strategies_with_a_net_that_cannot_be_split():
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(NUM_TOKENS, NUM_TOKENS)

        def forward(self, ids: Tensor) -> Tensor:
            return self.table(ids)

    net = NetAdapter(Plain(), num_tokens=NUM_TOKENS, max_seq_len=LENGTH)
    split = NetAdapter(
        nn.Sequential(nn.Embedding(NUM_TOKENS, 3), nn.Linear(3, NUM_TOKENS)),
        num_tokens=NUM_TOKENS,
        max_seq_len=LENGTH,
    )
    for some in (net, split):
        for strategy in STRATEGIES:
            ids = make_model(some).generate(3, strategy=strategy)
            assert ids.shape == (3, LENGTH) and (ids != MASK_ID).all()


def test_autocast():
    model = make_model()
    with torch.autocast("cpu", torch.bfloat16):
        ids = model.generate(4, seed=0)
        assert torch.is_autocast_enabled("cpu")
    assert (ids != MASK_ID).all()


def test_the_critic_is_the_default_where_there_is_one():
    scores = torch.arange(LENGTH, dtype=torch.float32)

    class Critic(nn.Module):
        def forward(self, ids: Tensor) -> Tensor:
            return scores.expand(ids.shape)[..., None]

    model = make_model(token_critic=Critic(), steps=4)
    options = dict(noise_level_scale=0.0, seed=0)
    states = list(model.generate_steps(2, **options))
    assert states[1].masked[0].tolist() == [False] * 4 + [True] * 12
    states = list(model.generate_steps(2, strategy="confidence", **options))
    assert states[1].masked[0].tolist() != [False] * 4 + [True] * 12
    with pytest.raises(ValueError, match="strategy 'critic' needs"):
        make_model().generate(strategy="critic")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, r"steps is 0: it must be in \[1, 2\*\*31\)"),
        ({"strategy": "best"}, "strategy is 'best': it must be one of confidence, "),
        ({"strategy": "halton", "grid": (3, 5)}, "grid is 3 x 5: .* with 16 cells"),
        ({"block_length": 0}, "block_length is 0"),
        ({"block_length": 1, "steps": 3}, "steps is 3: it must be at least 16"),
        ({"threshold": -0.5, "strategy": "threshold"}, "threshold is -0.5"),
        ({"choice_temperature": -1.0}, "choice_temperature is -1.0"),
        ({"start_temperature": math.nan}, "temperature is nan"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        make_model().generate(**options)


def test_no_square_for_halton():
    class Wide(Table):
        max_seq_len = 15

    with pytest.raises(ValueError, match="grid is 4 x 4: .* with 15 cells"):
        make_model(Wide(torch.zeros(NUM_TOKENS))).generate(strategy="halton")
    ids = make_model(Wide(torch.zeros(NUM_TOKENS))).generate(strategy="halton", grid=(3, 5))
    assert ids.shape == (15,)


# Prompts of any kind


PROMPTS = {
    "array": np.array([1, 2, 3]),
    "unsigned array": np.array([1, 2, 3], dtype=np.uint16),
    "backward array": np.array([3, 2, 1])[::-1],
    "array of other bytes": np.array([1, 2, 3], dtype=">i4"),
    "list of numpy integers": [np.int64(1), np.uint8(2), 3],
    "list of tensors": [torch.tensor(1), torch.tensor(2), torch.tensor(3)],
    "tuple": (1, 2, 3),
    "range": range(1, 4),
    "tensor": torch.tensor([1, 2, 3], dtype=torch.uint8),
}


@pytest.mark.parametrize("kind", PROMPTS)
def test_prompts_of_any_kind(kind):
    model, prompt = make_model(), PROMPTS[kind]
    one = model.generate(prompt=prompt, steps=2)
    assert one.shape == (LENGTH,) and one[:3].tolist() == [1, 2, 3]
    several = model.generate(prompt=[prompt, [5]], steps=2)
    assert several.shape == (2, LENGTH) and several[0, :3].tolist() == [1, 2, 3]
    assert model.generate(2, prompt=prompt, steps=2).shape == (2, LENGTH)


def test_a_matrix_of_prompts():
    ids = make_model().generate(prompt=np.array([[1, 2], [3, M]], dtype=np.uint32), steps=2)
    assert ids[:, 0].tolist() == [1, 3] and ids[0, 1] == 2


@pytest.mark.parametrize(
    "prompt", ["text", 5, {0: 1}, {1}, [None], [1.5], np.array([True]), np.zeros(2), 1j]
)
def test_what_is_no_prompt(prompt):
    with pytest.raises(TypeError, match=r"a prompt .*must be integers \[L\] or \[B, L\]"):
        make_model().generate(prompt=prompt)


NUMBERS = st.integers(-2, NUM_TOKENS + 1) | st.sampled_from([1 << 31, 1 << 63, 1 << 64])
NO_NUMBERS = st.sampled_from([None, True, 1.5, math.nan, "text", {}])
ROWS = st.lists(NUMBERS, max_size=LENGTH + 1)
KINDS = st.sampled_from([list, tuple, np.array, torch.tensor])


def made(kind, ids):
    """The same ids in another container, or as a list where that cannot hold them."""
    try:
        return kind(ids)
    except (RuntimeError, OverflowError, ValueError):
        return ids


@given(
    st.one_of(
        st.builds(made, KINDS, ROWS),
        st.lists(st.builds(made, KINDS, ROWS), max_size=3),
        st.recursive(NO_NUMBERS | NUMBERS, lambda x: st.lists(x, max_size=3), max_leaves=4),
        st.dictionaries(st.integers(0, 2), NUMBERS, max_size=2),
        st.binary(max_size=3),
        st.sets(NUMBERS, max_size=2),
        st.sampled_from([np.array(3), torch.tensor(3), [[1], 2], [[1], np.array(2)]]),
    ),
    st.none() | st.integers(-1, 3),
)
def test_any_prompt_is_read_or_refused(prompt, batch_size):
    """Everything else is a TypeError or ValueError that speaks of the prompt."""
    masking = MaskingConfig(NUM_TOKENS, M)
    try:
        ids = read_prompt(prompt, batch_size, LENGTH, masking)
    except (TypeError, ValueError) as error:
        assert "prompt" in str(error) or "batch_size" in str(error)
        return
    given_ids = [[]] if prompt is None else [prompt] if is_one_sequence(prompt) else [*prompt]
    assert len(ids) == (len(given_ids) if batch_size is None else batch_size)
    for row, sequence in zip(ids.tolist(), given_ids * len(ids), strict=False):
        wanted = [int(i) for i in sequence]
        assert row == wanted + [M] * (LENGTH - len(wanted))
        assert all(0 <= i < NUM_TOKENS for i in row)


def test_integers_of_any_kind():
    model = make_model()
    expected = model.generate(3, seed=5, steps=4, block_length=8)
    for kind in (np.int64, np.uint8, torch.tensor, lambda i: torch.tensor([i])):
        got = model.generate(kind(3), seed=kind(5), steps=kind(4), block_length=kind(8))
        assert torch.equal(got, expected)
    with pytest.raises(TypeError, match="seed is 5.0: it must be an int"):
        model.generate(3, seed=5.0)
    with pytest.raises(ValueError, match="batch_size is -1"):
        model.generate(-1)


# NaN


class Bad(Table):
    """Says NaN for the second sequence once there is something in it, or everywhere."""

    def __init__(self, everywhere: bool) -> None:
        super().__init__(torch.linspace(0, 1, NUM_TOKENS))
        self.everywhere = everywhere

    def forward(self, ids: Tensor) -> Tensor:
        logits = super().forward(ids)
        if self.everywhere:
            return logits * math.nan
        if (ids != MASK_ID).any():
            logits[1] = math.nan
        return logits


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nan_logits_are_an_error(strategy):
    remask = {"can_mask_prev_unmasked": strategy not in NO_REMASK}
    for options in ({}, remask, {"block_length": 4}):
        model = make_model(Bad(everywhere=True), steps=8)
        with pytest.raises(InvalidLogitsError, match="logits are NaN in step 1 of .*, sequence 0 "):
            model.generate(3, strategy=strategy, **options)
    model = make_model(Bad(everywhere=False), steps=8)
    with pytest.raises(InvalidLogitsError, match="NaN in step 2 of .*, sequence 1 of the batch"):
        model.generate(3, strategy=strategy)


def test_nan_by_other_ways():
    model = make_model()
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match=f"guidance_scale is {value}: it must be finite"):
            model.generate(2, prompt=[1], guidance_scale=value)
    with pytest.raises(InvalidLogitsError, match="logits are NaN in step 1"):
        model.generate(2, logits_processor=lambda logits, rows: logits * math.nan)

    def ban_most(logits: Tensor, rows: Tensor) -> Tensor:
        return torch.where(torch.arange(NUM_TOKENS) == 7, logits * math.nan, -math.inf)

    with pytest.raises(InvalidLogitsError, match="logits are NaN in step 1"):
        model.generate(2, logits_processor=ban_most)

    class Critic(nn.Module):
        def forward(self, ids: Tensor) -> Tensor:
            return torch.full((*ids.shape, 1), math.nan)

    with pytest.raises(InvalidLogitsError, match="critic's scores are NaN in step 1"):
        make_model(token_critic=Critic()).generate(2)


def test_nan_beside_other_logits_is_no_error():
    logits = torch.zeros(NUM_TOKENS)
    logits[2] = math.nan
    ids = make_model(Table(logits)).generate(20, filter_thres=None)
    assert (ids != 2).all()


def test_nan_beside_others_when_what_stands_is_judged_again():
    logits = torch.linspace(0, 3, NUM_TOKENS)
    logits[::2] = math.nan
    model = make_model(Table(logits), steps=8, can_mask_prev_unmasked=True)
    for strategy in ("confidence", "margin"):
        ids = model.generate(6, seed=0, strategy=strategy, choice_temperature=3.0)
        assert (ids % 2 == 1).all()


def test_nan_is_kept_for_the_end_where_looking_would_wait():
    check = DeferredNanCheck(num_steps=4, length=LENGTH)
    rows = torch.arange(3 * LENGTH, device="meta")
    check.record("logits", torch.zeros(3 * LENGTH, dtype=torch.bool, device="meta"), rows, 0)
    assert not check._first["logits"].is_cpu  # nobody has looked
    is_nan = torch.zeros(3 * LENGTH, dtype=torch.bool)
    check = DeferredNanCheck(num_steps=4, length=LENGTH)
    check.record("logits", is_nan, torch.arange(3 * LENGTH), 0)
    check.check()
    is_nan[2 * LENGTH] = True
    with pytest.raises(InvalidLogitsError, match="step 3 of 4, sequence 2"):
        check.record("logits", is_nan, torch.arange(3 * LENGTH), 2)


# Logits that are handed out


@pytest.mark.parametrize("split", [True, False])
def test_logits_of_a_processor_are_its_own(split):
    net = None if split else Table(torch.linspace(0, 1, NUM_TOKENS))
    kept, copies = [], []

    def keep(logits: Tensor, rows: Tensor) -> Tensor:
        kept.append(logits)
        copies.append(logits.clone())
        logits = logits.clone()
        kept[-1][:, 3] = 5.0  # and may be changed
        copies[-1][:, 3] = 5.0
        return logits

    model = make_model(net, steps=5)
    expected = model.generate(3, seed=0)
    assert torch.equal(model.generate(3, seed=0, logits_processor=keep), expected)
    assert len(kept) == 5 and all(map(torch.equal, kept, copies))
    with pytest.raises(TypeError, match="logits_processor returned NoneType: it must return"):
        model.generate(1, logits_processor=lambda logits, rows: None)


# The number of a sequence


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_parts_of_a_batch_by_the_number_of_their_first_sequence(strategy):
    options = {"seed": 3, "strategy": strategy, "prompt": [1, 2], "filter_thres": 0.0}
    if strategy in ("confidence", "margin", "entropy"):
        options["choice_temperature"] = 2.0
    model = make_model()
    whole = model.generate(6, **options)
    parts = [model.generate(2, first_sequence=first, **options) for first in (0, 2, 4)]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(whole[:2], whole[2:4])
    with pytest.raises(ValueError, match="first_sequence is -1"):
        model.generate(2, first_sequence=-1)
