"""Collators, against those of transformers."""

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

transformers = pytest.importorskip("transformers")

from nar_kernels import InvalidTokenError  # noqa: E402
from nar_kernels.integrations.hugging_face import (  # noqa: E402
    DataCollatorForLanguageModeling,
    MaskedDiffusionCollator,
    SampleIds,
)
from tests.helpers.goodness_of_fit import chi_square_p  # noqa: E402
from tests.helpers.tiny_tokenizer import WORDS, tiny_tokenizer  # noqa: E402

Original = transformers.DataCollatorForLanguageModeling
pytestmark = pytest.mark.filterwarnings("ignore:This process.*is multi-threaded")

PAD, CLS, SEP, MASK = range(4)


def texts(n: int) -> list[str]:
    """Of words of one, two and three tokens."""
    return [
        " ".join(WORDS[(i * 7 + j) % 24] + WORDS[j % 24] * (j % 3) for j in range(1, 4 + i % 5))
        for i in range(n)
    ]


def examples(n: int, **options: Any) -> list[dict[str, Any]]:
    tokenizer = tiny_tokenizer()
    return [dict(tokenizer(text, **options)) for text in texts(n)]


def test_the_same_arguments_and_batches():
    ours, theirs = (
        inspect.signature(c).parameters for c in (DataCollatorForLanguageModeling, Original)
    )
    assert list(ours) == list(theirs)
    assert all(ours[name].default == theirs[name].default for name in ours)
    forms = [
        examples(5),
        examples(5, return_special_tokens_mask=True),
        [e["input_ids"] for e in examples(5)],
        [torch.tensor(e["input_ids"]) for e in examples(5)],
    ]
    for i, options in enumerate(
        ({}, {"pad_to_multiple_of": 8}, {"mlm": False}, {"mlm_probability": 0.0})
    ):
        tokenizer = tiny_tokenizer(padding_side=("left", "right")[i % 2])
        for form in forms:
            copies = [dict(e) if isinstance(e, dict) else e for e in form]
            mine = DataCollatorForLanguageModeling(tokenizer, **options)(form)
            other = Original(tokenizer, **options)(copies)
            assert type(mine) is type(other) and set(mine) == set(other)
            for name in mine:
                assert mine[name].dtype == other[name].dtype
                assert mine[name].shape == other[name].shape
            if i > 1:  # nothing is masked
                assert all(torch.equal(mine[name], other[name]) for name in mine)
            for name in set(mine) - {"input_ids", "labels"}:
                assert torch.equal(mine[name], other[name])


OUTCOMES = ["left", "kept", "mask", "random"]


def outcomes(collator: Any, ids: Tensor, times: int) -> Tensor:
    """How often a token that may be masked is left, kept, hidden or replaced."""
    counts = torch.zeros(4)
    for _ in range(times):
        batch = collator([{"input_ids": row} for row in ids])
        inputs, labels = batch["input_ids"], batch["labels"]
        special = ids < 4
        assert (labels[special] == -100).all() and torch.equal(inputs[special], ids[special])
        masked = labels != -100
        assert torch.equal(labels[masked], ids[masked])
        assert torch.equal(inputs[~masked], ids[~masked])
        where = masked & (inputs == MASK), masked & (inputs == ids)
        hidden, kept = (x.sum() for x in where)
        counts += torch.tensor(
            [(~special & ~masked).sum(), kept, hidden, masked.sum() - kept - hidden]
        )
    return counts


@pytest.mark.parametrize("share", [0.15, 0.6])
@pytest.mark.parametrize(
    ("mask_replace", "random_replace"), [(0.8, 0.1), (1.0, 0.0), (0.0, 1.0), (0.5, 0.0)]
)
def test_the_law_is_that_of_the_original(share, mask_replace, random_replace):
    ids = torch.randint(5, 53, (64, 128), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[:, -1] = CLS, SEP
    options = {
        "mlm_probability": share, "mask_replace_prob": mask_replace,
        "random_replace_prob": random_replace,
    }  # fmt: skip
    torch.manual_seed(1)
    tokenizer = tiny_tokenizer()
    mine = outcomes(DataCollatorForLanguageModeling(tokenizer, **options), ids, 6)
    other = outcomes(Original(tokenizer, **options), ids, 6)
    # A random token is the clean one with a chance of 1 / 52 (theirs: the mask with 1 / 53, too).
    chances = torch.tensor([
        1 - share,
        share * (1 - mask_replace - random_replace + random_replace / 52),
        share * mask_replace,
        share * random_replace * 51 / 52,
    ])  # fmt: skip
    some = chances > 0
    assert mine[~some].sum() == 0
    assert chi_square_p(mine[some], chances[some] / chances.sum() * mine.sum()) > 1e-3
    assert torch.allclose(mine / mine.sum(), other / other.sum(), atol=0.015)


def test_masks_within_the_text_stay():
    tokenizer = tiny_tokenizer()
    ids = torch.tensor([[CLS, 7, MASK, 9, MASK, SEP]])
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=1.0, seed=0)
    for special in (None, [[1, 0, 0, 0, 0, 1]]):
        inputs, labels = collator.torch_mask_tokens(ids.clone(), special)
        assert inputs[0, 2] == inputs[0, 4] == MASK
        assert labels[0].tolist() == [-100, 7, -100, 9, -100, -100]


def words_of(offsets: Tensor, special: Tensor) -> list[list[int]]:
    """Positions of each word of a row."""
    found: list[list[int]] = []
    for i, (start, _) in enumerate(offsets.tolist()):
        if special[i]:
            continue
        joins = i > 0 and not special[i - 1] and start == offsets[i - 1, 1]
        if joins:
            found[-1].append(i)
        else:
            found.append([i])
    return found


@pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) < 5, reason="transformers 4 fails where it warns"
)
def test_whole_words():
    tokenizer = tiny_tokenizer()
    # The tokenizer pads no offsets.
    options = {"padding": "max_length", "max_length": 24}
    names = {"return_offsets_mapping": True, "return_special_tokens_mask": True}
    given = examples(40, **options, **names)
    padded = tokenizer.pad([dict(e) for e in given], return_tensors="pt")
    words = [
        words_of(row, special)
        for row, special in zip(
            padded["offset_mapping"], padded["special_tokens_mask"], strict=True
        )
    ]
    counts = torch.zeros(2, 2)
    for which, kind in enumerate((DataCollatorForLanguageModeling, Original)):
        with pytest.warns(UserWarning, match="Setting mask_replace_prob to 1"):
            collator = kind(tokenizer, whole_word_mask=True, mlm_probability=0.3)
        torch.manual_seed(2)
        for _ in range(20):
            batch = collator([dict(e) for e in given])
            masked = batch["labels"] != -100
            assert (batch["input_ids"][masked] == MASK).all()
            assert masked.sum() == sum(
                int(masked[b, w].sum()) for b, ws in enumerate(words) for w in ws
            )
            for b, of_row in enumerate(words):
                for word in of_row:
                    assert masked[b, word].unique().numel() == 1
                    counts[which, int(masked[b, word[0]])] += 1
    expected = torch.tensor([0.7, 0.3])
    assert chi_square_p(counts[0], expected * counts[0].sum()) > 1e-3
    assert chi_square_p(counts[1], expected * counts[1].sum()) > 1e-3


class Examples(torch.utils.data.Dataset):
    def __init__(self, n: int = 12) -> None:
        self.examples = examples(n)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.examples[i]


def collators() -> list[Any]:
    tokenizer = tiny_tokenizer()
    return [
        DataCollatorForLanguageModeling(tokenizer, seed=5),
        MaskedDiffusionCollator(tokenizer, seed=5),
    ]


def test_masks_do_not_depend_on_padding():
    """Of the longest sequence of the batch, on either side; whole words, too."""
    tokenizer = tiny_tokenizer(padding_side="left")
    names = {"return_offsets_mapping": True, "return_special_tokens_mask": True}
    ids, longer = range(5, 25), [5] * 31
    for make in (
        lambda: DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.5, seed=5),
        lambda: MaskedDiffusionCollator(tokenizer, seed=5),
    ):
        one, other = {"input_ids": [*ids], "sample_id": 7}, {"input_ids": longer, "sample_id": 8}
        alone, left = make()([one]), make()([one, other])
        tokenizer.padding_side = "right"
        right = make()([one, other])
        tokenizer.padding_side = "left"
        for name in ("input_ids", "labels"):
            assert torch.equal(left[name][0, -20:], alone[name][0])
            assert torch.equal(right[name][0, :20], alone[name][0])
        assert (left["labels"][0, :11] == -100).all()
        assert (left["input_ids"][0, :11] == PAD).all()
    rows = []
    for length in (24, 30):
        options = {"mask_replace_prob": 1, "random_replace_prob": 0, "whole_word_mask": True}
        collator = DataCollatorForLanguageModeling(tokenizer, seed=5, **options)
        padding = {"padding": "max_length", "max_length": length, **names}
        given = [dict(tokenizer(text, **padding)) for text in texts(8)]
        rows.append(collator(given)["input_ids"][:, -24:])
    assert torch.equal(*rows)


@pytest.mark.parametrize("which", [0, 1])
def test_masks_depend_on_seed_epoch_and_index_alone(which):
    """Not on workers, batches or order, nor on where a run was resumed."""
    dataset = SampleIds(Examples())

    def masks(order: list[int], size: int, **options: Any) -> dict[int, list[int]]:
        collator, batches = collators()[which], iter(order)
        data = DataLoader(dataset, size, sampler=order, collate_fn=collator, **options)
        found = {}
        for batch in data:
            for ids, here in zip(batch["input_ids"], batch["attention_mask"], strict=True):
                found[next(batches)] = ids[here.bool()].tolist()
        return found

    order = list(range(12))
    expected = masks(order, 4)
    shuffled = torch.randperm(12).tolist()
    assert masks(shuffled, 3) == expected
    assert masks(order[8:], 2) == {i: expected[i] for i in order[8:]}
    assert masks(shuffled, 3, num_workers=2) == expected
    dataset.set_epoch(1)
    later = masks(order, 4)
    assert later != expected
    data = DataLoader(
        dataset, 12, collate_fn=collators()[which], num_workers=1, persistent_workers=True
    )
    ids = []
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        (batch,) = data
        ids.append(
            [
                i[m.bool()].tolist()
                for i, m in zip(batch["input_ids"], batch["attention_mask"], strict=True)
            ]
        )
    assert ids == [list(expected.values()), list(later.values())]


@pytest.mark.parametrize("which", [0, 1])
def test_without_numbers(which):
    given = examples(6)

    def masks(collator: Any, calls: int = 1) -> list[Tensor]:
        return [collator([dict(e) for e in given])["input_ids"] for _ in range(calls)]

    first, second = masks(collators()[which], 2)
    assert not torch.equal(first, second)
    assert torch.equal(masks(collators()[which])[0], first)  # another process begins alike
    collator = [DataCollatorForLanguageModeling, MaskedDiffusionCollator][which](tiny_tokenizer())
    torch.manual_seed(3)
    one = masks(collator)[0]
    assert not torch.equal(one, masks(collator)[0])
    torch.manual_seed(3)
    assert torch.equal(masks(collator)[0], one)


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_the_diffusion_collator_returns(side):
    tokenizer = tiny_tokenizer(padding_side=side)
    given = examples(5, return_special_tokens_mask=True)
    for e in given:
        e["labels"] = [-100, *e["input_ids"][1:]]
        e["token_type_ids"] = [1] * len(e["input_ids"])
    ids = tokenizer.pad(
        [{"input_ids": e["input_ids"]} for e in given], pad_to_multiple_of=8, return_tensors="pt"
    )
    collator = MaskedDiffusionCollator(tokenizer, pad_to_multiple_of=8, return_weights=True, seed=1)
    batch = collator(given)
    assert "special_tokens_mask" in given[0]
    assert set(batch) == {
        "input_ids", "attention_mask", "token_type_ids", "labels", "loss_weight", "num_maskable"
    }  # fmt: skip
    for name in ("attention_mask", "token_type_ids"):
        assert torch.equal(batch[name], ids["attention_mask"])
    masked = batch["labels"] != -100
    assert torch.equal(batch["input_ids"], torch.where(masked, MASK, ids["input_ids"]))
    assert torch.equal(batch["labels"][masked], ids["input_ids"][masked])
    assert not masked[ids["input_ids"] < 4].any()
    may = torch.tensor([sum(i >= 4 for i in e["input_ids"]) for e in given])
    assert torch.equal(batch["num_maskable"], may)
    assert torch.allclose(batch["loss_weight"], may / masked.sum(1))

    clean = MaskedDiffusionCollator(tokenizer, mask=False, pad_to_multiple_of=8)
    numbered = [{**e, "sample_id": 7 + i} for i, e in enumerate(given)]
    batch = clean(numbered)
    assert torch.equal(batch["input_ids"], ids["input_ids"])
    assert torch.equal(batch["labels"], ids["input_ids"].masked_fill(ids["input_ids"] < 4, -100))
    assert batch["sample_id"].tolist() == [7, 8, 9, 10, 11]


def test_clear_errors():
    tokenizer = tiny_tokenizer()
    collator = MaskedDiffusionCollator(tokenizer)
    with pytest.raises(ValueError, match=r"examples have \['text'\], which is none of"):
        collator([{"input_ids": [5], "text": "a"}])
    with pytest.raises(ValueError, match="all must have input_ids"):
        collator([{"labels": [5]}])
    with pytest.raises(ValueError, match="give it to all"):
        collator([{"input_ids": [5], "sample_id": 1}, {"input_ids": [5]}])
    tokenizer.mask_token = None
    with pytest.raises(ValueError, match="no mask token"):
        MaskedDiffusionCollator(tokenizer)
    assert MaskedDiffusionCollator(tokenizer, mask_id=53)([{"input_ids": [5, 6]}])
    with pytest.raises(ValueError, match="does not have a mask token"):
        DataCollatorForLanguageModeling(tokenizer)
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="no padding token"):
        MaskedDiffusionCollator(tokenizer, mask=False)([{"input_ids": [5]}, {"input_ids": [5, 6]}])


def test_columns_of_another_length_are_an_error():
    """They would be padded as if the rest were missing."""
    tokenizer = tiny_tokenizer()
    for name in ("token_type_ids", "attention_mask"):
        given = [{"input_ids": [5, 6, 7], name: [1]}, {"input_ids": [5], name: [1]}]
        for collator in (
            DataCollatorForLanguageModeling(tokenizer),
            MaskedDiffusionCollator(tokenizer),
        ):
            with pytest.raises(ValueError, match=f"example 0 .* 3 input_ids and 1 {name}"):
                collator([dict(e) for e in given])
    collator = MaskedDiffusionCollator(tokenizer)
    with pytest.raises(ValueError, match="3 input_ids and 2 labels"):
        collator([{"input_ids": [5, 6, 7], "labels": [5, 6]}])
    special = {"input_ids": [5], "special_tokens_mask": [1]}
    for pair in ([{"input_ids": [5]}, special], [special, {"input_ids": [5]}]):
        with pytest.raises(ValueError, match="the same others"):
            collator(pair)


def with_gaps() -> Any:
    """A tokenizer with fewer tokens than its greatest id."""
    from tokenizers import Tokenizer, models

    vocabulary = {"[PAD]": 0, "[UNK]": 1, "a": 2, "b": 40, "[MASK]": 30}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]")),
        pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]",
    )  # fmt: skip


def test_vocabularies_with_gaps_and_ids_outside():
    tokenizer = with_gaps()
    given = [{"input_ids": [2, 40]}]
    batch = DataCollatorForLanguageModeling(tokenizer, mlm_probability=1.0)(given)
    assert batch["labels"].tolist() == [[2, 40]]
    assert MaskedDiffusionCollator(tokenizer)(given)["labels"].max() in (2, 40)
    with pytest.raises(InvalidTokenError, match=r"id 41 .* outside \[0, 41\)"):
        DataCollatorForLanguageModeling(tokenizer)([{"input_ids": [41]}])


class SevenIsSpecial(transformers.PreTrainedTokenizerFast):
    def get_special_tokens_mask(self, ids, other=None, already_has_special_tokens=False):
        return [int(i == 7) for i in ids]


def test_a_tokenizer_says_itself_what_is_special():
    tokenizer = SevenIsSpecial(tokenizer_object=tiny_tokenizer()._tokenizer, mask_token="[MASK]")
    tokenizer.pad_token = "[PAD]"
    for kind in (DataCollatorForLanguageModeling, Original):
        labels = kind(tokenizer, mlm_probability=1.0)([[7, 8, 9]])["labels"]
        assert labels.tolist() == [[-100, 8, 9]]


@pytest.mark.parametrize(
    "kind", [DataCollatorForLanguageModeling, Original], ids=["ours", "theirs"]
)
def test_dtypes_and_empty_rows_are_those_of_the_original(kind):
    # Where a token is random, the original fails with int32.
    options = {"mlm_probability": 1.0, "mask_replace_prob": 1.0, "random_replace_prob": 0.0}
    collator = kind(tiny_tokenizer(), **options)
    inputs, labels = collator.torch_mask_tokens(torch.tensor([[5, 6]], dtype=torch.int32))
    assert inputs.dtype == labels.dtype == torch.int32
    batch = collator([{"input_ids": []}, {"input_ids": []}])
    assert {name: tuple(x.shape) for name, x in batch.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "labels"), (2, 0)
    )
    given = {"input_ids": [5, 6], "token_type_ids": [0, 0], "attention_mask": [1, 1]}
    assert list(collator([given])) == [*given, "labels"]


def test_options_that_would_have_no_effect_are_an_error():
    tokenizer = tiny_tokenizer()
    for options in ({"schedule": "cosine"}, {"seed": 1}, {"return_weights": True}):
        with pytest.raises(ValueError, match="mask is false"):
            MaskedDiffusionCollator(tokenizer, mask=False, **options)
    collator = DataCollatorForLanguageModeling(
        tokenizer, mask_replace_prob=1, random_replace_prob=0, whole_word_mask=True
    )
    with pytest.raises(ValueError, match="return_offsets_mapping=True"):
        collator([{"input_ids": [5, 6]}])


def test_no_padding_token_is_needed_where_none_is_used():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    rows = [[5, 6, 7], [8, 9, 10]]
    batch, other = (c(tokenizer, seed=0)(rows) for c in (DataCollatorForLanguageModeling, Original))
    assert {name: x.shape for name, x in batch.items()} == {n: x.shape for n, x in other.items()}
    kept = batch["labels"] == -100
    assert torch.equal(batch["input_ids"][kept], torch.tensor(rows)[kept])


def test_numbers_are_numbers():
    with pytest.raises(ValueError, match="the 'sample_id' 'a': it must be a number"):
        MaskedDiffusionCollator(tiny_tokenizer())([{"input_ids": [5, 6], "sample_id": "a"}])
