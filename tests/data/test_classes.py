"""Classes of windows: the batches of a loader have them, dropped by (seed, slot) alone."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor

from nar_kernels.data.classes import Classes
from nar_kernels.data.loader import MaskedLoader
from nar_kernels.data.windows.mixture import Mixture
from nar_kernels.ops.corrupt import corrupt
from nar_kernels.ops.corrupted import Corrupted
from nar_kernels.ops.mask_tokens import drop_classes
from nar_kernels.spec.philox import Stream, words
from tests.helpers.goodness_of_fit import FAMILY_ERROR
from tests.helpers.windows import MASKING, make_dataset, tensors

C = 5


def labels() -> Tensor:
    return torch.randint(0, C, (len(make_dataset()),), generator=torch.Generator().manual_seed(1))


def make_loader(batch_size: int = 6, **options) -> MaskedLoader:
    options = {
        "classes": labels(),
        "num_classes": C,
        "class_dropout_prob": 0.3,
        "seed": 2,
    } | options
    return MaskedLoader(make_dataset(), MASKING, batch_size, **options)


def test_the_class_of_a_sample_is_that_of_its_window_or_dropped_by_its_slot() -> None:
    loader = make_loader()
    for step in (0, 3, 40):  # over several epochs
        slots = loader.sample_ids(step)
        of_windows = labels()[loader.window_indices(step)]
        coin = words(2, Stream.CLASS_DROPOUT, slots, torch.zeros_like(slots))
        expected = torch.where(coin.double() < 0.3 * 2**32, C, of_windows)
        assert torch.equal(loader.batch(step).class_ids, expected)
    assert (torch.cat([loader.batch(step).class_ids for step in range(20)]) == C).any()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_classes_do_not_depend_on_ranks_or_microbatches(world_size: int) -> None:
    whole = make_loader(6)
    ranks = [
        make_loader(6 // world_size, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    for step in (0, 7):
        expected = whole.batch(step).class_ids
        batches = [loader.batch(step) for loader in ranks]
        assert torch.equal(torch.cat([b.class_ids for b in batches]), expected)
        parts = [part for batch in batches for part in batch.microbatches(2)]
        assert torch.equal(torch.cat([part.class_ids for part in parts]), expected)
        assert torch.equal(Corrupted.cat(parts).class_ids, expected)


def test_a_run_goes_on_with_the_same_classes() -> None:
    loader = make_loader()
    for _ in range(3):
        next(loader)
    resumed = make_loader()
    resumed.load_state_dict(loader.state_dict())
    copied = pickle.loads(pickle.dumps(loader))
    expected = next(loader)
    for other in (resumed, copied):
        assert torch.equal(next(other).class_ids, expected.class_ids)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"classes": labels().flip(0)}, "classes_digest"),
        ({"num_classes": C + 1}, "num_classes"),
        ({"class_dropout_prob": 0.2}, "class_dropout_prob"),
        ({"classes": None, "num_classes": None}, "classes_digest"),
    ],
)
def test_a_state_of_other_classes_is_refused(options: dict, name: str) -> None:
    state = make_loader(**options).state_dict()
    with pytest.raises(ValueError, match=f"cannot continue: {name}"):
        make_loader().load_state_dict(state)
    if options.get("classes", ()) is None:
        with pytest.raises(ValueError, match="cannot continue: classes_digest is"):
            make_loader(**options).load_state_dict(make_loader().state_dict())


def test_older_states_are_of_loaders_without_classes() -> None:
    loader = make_loader(classes=None, num_classes=None)
    next(loader)
    state = loader.state_dict() | {"version": 5}
    for name in ("classes_digest", "num_classes", "class_dropout_prob"):
        del state[name]
    loader.load_state_dict(state)
    with pytest.raises(ValueError, match="classes_digest is None in the state"):
        make_loader().load_state_dict(state)


def test_masks_are_those_without_classes() -> None:
    with_classes, without = (
        make_loader().batch(4),
        make_loader(classes=None, num_classes=None).batch(4),
    )
    assert without.class_ids is None
    for name, value in tensors(without).items():
        assert torch.equal(tensors(with_classes)[name], value), name


@pytest.mark.parametrize("prob", [0.1, 0.5])
def test_the_share_that_is_dropped(prob: float) -> None:
    n = 20_000
    dropped = drop_classes(torch.zeros(n).long(), C, prob, seed=7, sample_ids=torch.arange(n)) == C
    z = (int(dropped.sum()) - n * prob) / math.sqrt(n * prob * (1 - prob))
    assert math.erfc(abs(z) / math.sqrt(2)) > FAMILY_ERROR / 2


def test_none_and_all_are_dropped() -> None:
    classes = labels()
    slots = torch.arange(len(classes))
    for prob, expected in ((0.0, classes), (1.0, torch.full_like(classes, C))):
        made = Classes(classes, C, prob, num_windows=len(classes))
        assert torch.equal(made.of(slots, slots, seed=0), expected)


def test_views_and_cut_windows_have_the_class_of_their_sample() -> None:
    expected = make_loader().batch(2).class_ids
    assert torch.equal(make_loader(views=3).batch(2).class_ids, expected.repeat(3))
    cut = make_loader(random_length_prob=0.5).batch(2)
    assert torch.equal(cut.class_ids, expected)
    assert torch.equal(cut[[3, 1]].class_ids, expected[[3, 1]])


def test_parts_and_copies_of_a_batch_keep_their_classes() -> None:
    batch = make_loader().batch(1)
    ids = batch.class_ids
    for part, expected in (
        (batch[2:4], ids[2:4]),
        (batch[[5, 0, 5]], ids[[5, 0, 5]]),
        (batch[::-1], ids.flip(0)),
        (batch.to("cpu"), ids),
        (copy.copy(batch), ids),
        (pickle.loads(pickle.dumps(batch[1:2])), ids[1:2]),
    ):
        assert torch.equal(part.class_ids, expected) and part.num_classes == C
    assert make_loader(class_dropout_prob=0).batch(1).num_classes is None
    clean = torch.zeros(1, make_dataset().seq_len).long()
    with pytest.raises(ValueError, match="with classes or without"):
        Corrupted.cat([batch, corrupt(clean, batch.masking, seed=0)])


@pytest.mark.filterwarnings("error")
def test_classes_may_be_any_array() -> None:
    expected = make_loader().batch(0).class_ids
    locked = labels().numpy().copy()
    locked.flags.writeable = False
    for given in (locked, labels().flip(0).numpy()[::-1], labels().numpy().astype(">i4")):
        assert torch.equal(make_loader(classes=given).batch(0).class_ids, expected)


def test_errors() -> None:
    n = len(make_dataset())
    for options, error, message in (
        ({"classes": labels()[1:]}, ValueError, rf"shape \[{n - 1}\]: it must be \[{n}\]"),
        ({"classes": labels() - 1}, ValueError, "holds -1"),
        ({"classes": labels().float()}, TypeError, "classes are integers"),
        ({"num_classes": C - 1}, ValueError, f"num_classes is {C - 1}"),
        ({"class_dropout_prob": 1.5}, ValueError, "class_dropout_prob is 1.5"),
        ({"classes": None}, ValueError, "there are no classes"),
        ({"shift_epochs": True}, ValueError, "shift_epochs"),
    ):
        with pytest.raises(error, match=message):
            make_loader(**options)
    with pytest.raises(ValueError, match="this is a mixture"):
        MaskedLoader(Mixture([make_dataset()], [1.0]), MASKING, 2, classes=np.zeros(n, int))
    with pytest.raises(ValueError, match="looked up on the host"):
        make_loader().batch(torch.zeros(1).long())


def test_the_classes_of_a_loader_are_its_own() -> None:
    """Who fills an array anew does not change them."""
    given = labels()
    loader = make_loader(classes=given)
    expected, state = loader.batch(0).class_ids, loader.state_dict()
    given.fill_(0)
    assert torch.equal(loader.batch(0).class_ids, expected) and loader.state_dict() == state
