"""Pinned memory of a corpus: what is registered with CUDA, and when it is released. A stand-in for
CUDA's runtime records the calls."""

import gc
import mmap
import pickle
import resource
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import Tensor

from nar_kernels import MaskedLoader, MaskingConfig, PinnedMemoryError, TokenDataset
from nar_kernels.data import loader as loader_module
from nar_kernels.data import pinned as pinned_module
from nar_kernels.data import placement
from nar_kernels.data.pinned import pin_exactly, pinned_bytes
from nar_kernels.data.stream import TokenStream

DEVICE = torch.device("cuda", 0)
PAGE = mmap.PAGESIZE


class Runtime:
    """What ``torch.cuda.cudart()`` returns."""

    def __init__(self) -> None:
        self.registered: dict[int, int] = {}
        self.log: list[str] = []
        self.result = 0

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        self.log.append("register")
        assert address % PAGE == size % PAGE == 0 and flags == 3
        if self.result == 0:
            self.registered[address] = size
        return self.result

    def cudaHostUnregister(self, address: int) -> int:
        self.log.append("unregister")
        del self.registered[address]
        return 0

    def cudaGetErrorString(self, error: int) -> str:
        return "out of memory"

    def is_pinned(self, tensor: Tensor) -> bool:
        """As the driver sees it: where the memory begins that the tensor is a view of."""
        at = tensor.untyped_storage().data_ptr()
        return any(first <= at < first + size for first, size in self.registered.items())


@pytest.fixture
def runtime(monkeypatch):
    runtime = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(
        torch.cuda, "synchronize", lambda device: runtime.log.append(f"wait {device}")
    )
    monkeypatch.setattr(Tensor, "is_pinned", lambda self: runtime.is_pinned(self))
    monkeypatch.setattr(
        pinned_module, "_forget_last_error", lambda device: runtime.log.append("forget")
    )
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    yield runtime
    gc.collect()
    assert runtime.registered == {}, "memory stays registered"


@pytest.fixture
def fake_loader(monkeypatch, runtime):
    """Makes a loader for a GPU that is not there."""
    monkeypatch.setattr(loader_module, "check_device", lambda device: DEVICE)
    monkeypatch.setattr(loader_module, "resolve_backend", lambda backend, device: "triton")

    def make(tokens: object = np.arange(3000, dtype=np.uint16) % 99, memory: str = "pinned"):
        data = TokenDataset(tokens, 64, num_tokens=100, mask_id=99)
        return MaskedLoader(data, MaskingConfig(100, 99), 4, device="cuda", corpus_memory=memory)

    return make


def test_whole_pages_and_no_more():
    assert [pinned_bytes(n) for n in (1, PAGE - 1, PAGE, PAGE + 1)] == [PAGE, PAGE, PAGE, 2 * PAGE]
    assert pinned_bytes(40 * 10**9) - 40 * 10**9 < PAGE  # not the 64 GiB of a power of two


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int32, torch.int64])
@pytest.mark.parametrize("number", [1, PAGE, PAGE + 3])
def test_a_copy_in_registered_memory(runtime, dtype, number):
    tokens = (torch.arange(number) % 100).to(dtype)
    pinned = pin_exactly(TokenStream.of_array(tokens), DEVICE)
    assert pinned.dtype == dtype and torch.equal(pinned.long(), tokens.long())
    assert runtime.registered == {pinned.data_ptr(): pinned_bytes(tokens.nbytes)}
    assert pinned.is_pinned() and pinned.is_contiguous() and not tokens.is_pinned()


def test_released_with_the_last_view_after_the_device_is_done(runtime):
    pinned = pin_exactly(TokenStream.of_array(torch.arange(1000)), DEVICE)
    view = pinned[10:20]
    del pinned
    assert runtime.log == ["register"] and view.is_pinned()
    del view
    assert runtime.log == ["register", "wait cuda:0", "unregister"]


def test_a_failure_says_how_much_and_what_to_do(runtime, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda which: (65536, 65536))
    runtime.result = 2
    message = (
        r"the corpus cannot be pinned for the GPU, 802816 bytes \(0\.000803 GB\): out of memory "
        r"\(2\); this process may lock 65536 bytes \(`ulimit -l` is 64\); use "
        r"corpus_memory='mapped', which leaves it where it is, or 'device' if"
    )
    with pytest.raises(PinnedMemoryError, match=message):
        pin_exactly(TokenStream.of_array(torch.zeros(100_000, dtype=torch.int64)), DEVICE)
    gc.collect()
    assert runtime.log == ["register", "forget"]  # and nothing is unregistered


@pytest.mark.parametrize("limit", [resource.RLIM_INFINITY, 10**9])
def test_a_limit_that_is_not_the_reason_is_not_mentioned(runtime, monkeypatch, limit):
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limit, limit))
    runtime.result = 801
    with pytest.raises(PinnedMemoryError, match=r"out of memory \(801\); use corpus_memory"):
        pin_exactly(TokenStream.of_array(torch.zeros(10)), DEVICE)


def test_no_memory_at_all(runtime, monkeypatch):
    def empty(size: int, dtype: object) -> np.ndarray:
        raise MemoryError(f"Unable to allocate {size}")

    monkeypatch.setattr(pinned_module.np, "empty", empty)
    with pytest.raises(PinnedMemoryError, match=f"Unable to allocate {2 * PAGE}"):
        pin_exactly(TokenStream.of_array(torch.zeros(10)), DEVICE)
    assert runtime.log == []


def test_registered_memory_that_is_not_pinned(runtime, monkeypatch):
    """The driver is asked, as `corrupt` asks it of a user's tokens."""
    monkeypatch.setattr(Tensor, "is_pinned", lambda self: False)
    with pytest.raises(PinnedMemoryError, match="registered memory is not pinned on this system"):
        pin_exactly(TokenStream.of_array(torch.zeros(10)), DEVICE)
    gc.collect()
    assert runtime.log[-1] == "unregister"


def test_a_loader_has_one_copy_and_gives_it_back(runtime, fake_loader):
    loader = fake_loader()
    assert loader.corpus_memory == "pinned"
    assert list(runtime.registered.values()) == [pinned_bytes(6000)]
    assert loader._place.tokens.is_pinned()
    copied = pickle.loads(pickle.dumps(loader))  # which has memory of its own
    assert len(runtime.registered) == 2 and torch.equal(copied._place.tokens, loader._place.tokens)
    del loader
    assert len(runtime.registered) == 1
    del copied
    assert runtime.registered == {}


def test_a_loader_that_was_asked_to_pin_does_or_raises(runtime, fake_loader):
    runtime.result = 2
    with pytest.raises(PinnedMemoryError, match="8192 bytes"):
        fake_loader()


def test_a_loader_that_chooses_warns_and_leaves_the_corpus_where_it_is(
    runtime, fake_loader, monkeypatch
):
    monkeypatch.setattr(placement, "choose_memory_here", lambda *arguments: "pinned")
    monkeypatch.setattr(loader_module, "Stager", lambda *arguments: "stager")
    assert fake_loader(memory="auto").corpus_memory == "pinned"
    runtime.result = 2
    with pytest.warns(UserWarning, match="out of memory .*corpus_memory is 'mapped' now"):
        loader = fake_loader(memory="auto")
    assert loader.corpus_memory == "mapped" and loader._stager == "stager"
