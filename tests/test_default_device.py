"""Other defaults of PyTorch, of a device or of a type, change nothing in the package."""

import ast
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils._device import _device_constructors

from nar_kernels import MaskingConfig, NetAdapter, NonAutoregressiveWrapper, corrupt, unmask
from tests.helpers.paths import ROOT

PACKAGE = ROOT / "nar_kernels"

FACTORIES = {f.__name__ for f in _device_constructors()}
FLOATING = {"empty", "zeros", "ones", "rand", "randn", "linspace"}  # if nobody says


def factories(source: str) -> list[tuple[int, str, set[str]]]:
    """Calls of ``torch.<factory>``: line, name, and the keywords."""
    return [
        (node.lineno, node.func.attr, {k.arg for k in node.keywords if k.arg})
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "torch"
        and node.func.attr in FACTORIES
    ]


def nameless(source: str) -> list[str]:
    """Those that leave the device, or the type of what would be floating, to the default."""
    return [
        f"line {line}: torch.{name}"
        for line, name, keywords in factories(source)
        if "device" not in keywords or (name in FLOATING and "dtype" not in keywords)
    ]


# Of a module that is made here, device and type are the user's affair.
WANTED_DEFAULTS = {"wrapper.py": ["torch.randn"]}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.name)
def test_every_tensor_is_made_on_a_device_that_is_named(path):
    wanted = WANTED_DEFAULTS.get(path.name, [])
    found = nameless(path.read_text())
    assert [line.split(": ")[1] for line in found] == wanted, found


def test_the_check_sees_a_factory():
    assert nameless("x = torch.arange(3)") == ["line 1: torch.arange"]
    assert nameless("x = torch.rand(3, device='cpu')") == ["line 1: torch.rand"]
    assert nameless("torch.arange(3, device=d); torch.ones(1, dtype=t, device=d)") == []


SUITE = [
    *(f"ops/test_{name}.py" for name in ("corrupt", "unmask", "masked_nll", "nll", "head_nll")),
    *("data/windows/test_dataset.py", "data/test_loader.py", "spec/test_schedules.py"),
    *(f"sampling/test_{name}.py" for name in ("generation", "generate", "plan")),
    *("nets/test_prediction.py", "nets/test_hugging_face.py"),
    *("test_wrapper.py", "test_critic.py", "test_seeds.py"),
]


LEFT_OUT = ("reference", "triton", "cuda", "generic", "avx2", "compile")


@pytest.mark.slow
@pytest.mark.minutes
def test_the_suite_under_other_defaults():
    """A good part of it, on the C++ backend, which a tensor without memory would crash."""
    command = [
        *(sys.executable, "-m", "pytest", "-q", "-x"),
        *("-p", "tests.helpers.on_meta", "-p", "no:cacheprovider"),
        *("-k", " and ".join(f"not {word}" for word in LEFT_OUT)),
        *("-m", "not triton and not cuda and not slow"),
        *(f"tests/{name}" for name in SUITE),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


V, L = 37, 16


@pytest.fixture(params=["context", "default"])
def meta(request):
    if request.param == "context":
        with torch.device("meta"):
            yield
        return
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def ids() -> torch.Tensor:
    return torch.arange(4 * L, device="cpu").view(4, L) % (V - 1)


def test_operations(meta):
    masking = MaskingConfig(V, V - 1, never_mask_ids=range(V - 1))
    assert corrupt(ids(), masking, seed=0).num_maskable.tolist() == [0] * 4
    for backend in ("auto", "reference"):
        batch = corrupt(ids(), MaskingConfig(V, V - 1), seed=0, backend=backend)
        assert batch.input_ids.is_cpu and (batch.input_ids == V - 1).any()
    logits = torch.zeros(4, V, device="cpu")
    slots = torch.arange(4, device="cpu")
    assert unmask(logits, mask_id=V - 1, seed=0, noise_slots=slots).tokens.is_cpu


def test_tensors_on_meta(meta):
    batch = corrupt(ids().to("meta"), MaskingConfig(V, V - 1), seed=0)
    assert batch.input_ids.is_meta and batch.input_ids.shape == (4, L)
    with pytest.raises(ValueError, match="backend 'cpp' runs on CPU tensors, but these are on me"):
        corrupt(ids().to("meta"), MaskingConfig(V, V - 1), seed=0, backend="cpp")


def make_model(**options) -> NonAutoregressiveWrapper:
    body = nn.Sequential(nn.Embedding(V, 8), nn.Linear(8, V))
    net = NetAdapter(body, num_tokens=V, max_seq_len=L, head=body[1])
    net.emb_dim = 8
    return NonAutoregressiveWrapper(net, mask_id=V - 1, **options)


def test_a_wrapper_is_made_on_meta_and_filled_later(meta):
    with torch.device("cpu"):
        torch.manual_seed(0)
        expected = make_model(self_cond=True, self_cond_train_prob=0.0)
    model = make_model(self_cond=True, self_cond_train_prob=0.0)
    assert all(p.is_meta for p in model.parameters())
    with pytest.raises(ValueError, match="parameters are on the device meta: give them memory"):
        model.generate(2)
    with pytest.raises(ValueError, match="x is on the device meta, which holds no ids"):
        model(ids().to("meta"))
    model.to_empty(device="cpu")
    model.load_state_dict(expected.state_dict())
    model.self_cond = expected.self_cond = False  # the adapter has no such argument
    assert model(ids(), seed=0).loss == expected(ids(), seed=0).loss
    assert torch.equal(model.generate(3, seed=0), expected.generate(3, seed=0))


@pytest.mark.seconds
def test_importing_under_another_default():
    script = (
        "import torch; torch.set_default_device('meta'); import nar_kernels, nar_kernels.train\n"
        "ids = torch.zeros(2, 8, dtype=torch.int64, device='cpu')\n"
        "print(nar_kernels.corrupt(ids, nar_kernels.MaskingConfig(9, 8), seed=0).input_ids.device)"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ}, capture_output=True, text=True)
    assert done.stdout.strip() == "cpu", done.stderr
