"""Where a GPU finds the corpus: the choice, and the windows that a thread fetches ahead."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nar_kernels.data.staging import Stager, choose_memory
from nar_kernels.data.stream import TokenStream

CORPUS = torch.arange(1000, dtype=torch.int32).to(torch.uint16)


def starts_of(step: int) -> Tensor:
    return torch.tensor([step, 10 * step, 1000 - 7])


def make_stager(starts_of: Callable[[int], Tensor] = starts_of) -> Stager:
    return Stager(TokenStream.of_array(CORPUS), starts_of, 3, 7, torch.device("cpu"))


def expected(step: int) -> list[list[int]]:
    return [list(range(start, start + 7)) for start in starts_of(step).tolist()]


@pytest.mark.parametrize(
    ("num_bytes", "memory"), [(10, "device"), (11, "pinned"), (25, "pinned"), (26, "mapped")]
)
def test_the_first_that_fits(num_bytes: int, memory: str) -> None:
    assert choose_memory(num_bytes, free_on_device=80, free_on_host=100) == memory


def test_without_free_memory_it_stays_in_its_file() -> None:
    assert choose_memory(1, 0, 0) == "mapped"


def test_windows_in_their_own_type() -> None:
    windows = make_stager().windows(4)
    assert windows.dtype == torch.uint16 and windows.tolist() == expected(4)


def test_windows_ahead_or_not_are_the_same() -> None:
    stager = make_stager()
    kept = []
    for step in (0, 1, 2, 3, 9, 4, 5):  # 9 is not what was fetched ahead
        kept.append((step, stager.windows(step)))
        stager.prefetch(step + 1)
    for step, windows in kept:  # no buffer was filled again while it was in use
        assert windows.tolist() == expected(step), step


def test_what_goes_wrong_in_the_thread_is_raised() -> None:
    def broken(step: int) -> Tensor:
        if step == 1:
            raise OSError("the disk is gone")
        return starts_of(step)

    stager = make_stager(broken)
    assert stager.windows(0).tolist() == expected(0)
    stager.prefetch(1)
    with pytest.raises(OSError, match="the disk is gone"):
        stager.windows(1)
    assert stager.windows(2).tolist() == expected(2)
