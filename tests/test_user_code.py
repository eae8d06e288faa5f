"""What users hang on a net, override in it or wrap around it takes part in loss and generation:
both are those of a net whose head nobody calls by itself."""

import copy
import functools
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize
from x_transformers import Encoder, TransformerWrapper

from nar_kernels import MaskingConfig, NetAdapter, NonAutoregressiveWrapper, corrupt
from nar_kernels.nets.split import split_net
from tests.tiny import tiny_sizes

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_TOKENS, MASK_ID, LENGTH, BATCH, WIDTH = 37, 36, 16, 4, 32
RARE = 20  # ids from here on are ruled out by the users' code
IDS = torch.randint(0, RARE, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))


def rule_out(logits: Tensor) -> Tensor:
    return torch.where(torch.arange(NUM_TOKENS) >= RARE, -30.0, logits)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.e = nn.Embedding(NUM_TOKENS, WIDTH)
        self.head = nn.Linear(WIDTH, NUM_TOKENS)

    def forward(self, ids: Tensor, scale: float = 1.0) -> Tensor:
        return self.head(self.e(ids) * scale)


def adapted(net: nn.Module, head: nn.Module | None = None, knows: bool = True) -> NetAdapter:
    head = (head or net.head) if knows else None
    return NetAdapter(net, num_tokens=NUM_TOKENS, max_seq_len=LENGTH, head=head)


def transformer(cls=TransformerWrapper, **options) -> TransformerWrapper:
    torch.manual_seed(0)
    layers = Encoder(dim=WIDTH, depth=1, heads=2, attn_dim_head=8, verbose=False)
    return cls(num_tokens=NUM_TOKENS, max_seq_len=LENGTH, attn_layers=layers, **options)


class Ruled(TransformerWrapper):
    def forward(self, *args, **kwargs):
        return rule_out(super().forward(*args, **kwargs))


class Silent(nn.Module):
    """A wrapper of a user, whose ``module`` is where PyTorch's have it."""

    num_tokens, max_seq_len = NUM_TOKENS, LENGTH

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, ids: Tensor, **kwargs) -> Tensor:
        return rule_out(self.module(ids, **kwargs))


def with_forward_hook(net: nn.Module) -> nn.Module:
    net.register_forward_hook(lambda module, args, out: rule_out(out))
    return net


def with_head_hook(net: TransformerWrapper) -> TransformerWrapper:
    with_forward_hook(net.to_logits)
    return net


def with_other_forward(net: nn.Module) -> nn.Module:
    """As accelerate's ``add_hook_to_module`` replaces it, on the instance."""
    old = net.forward

    @functools.wraps(old)
    def forward(*args, **kwargs):
        return rule_out(old(*args, **kwargs))

    net.forward = forward
    return net


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def with_parametrization(net: TransformerWrapper) -> TransformerWrapper:
    parametrize.register_parametrization(net.to_logits, "weight", Halved())
    return net


class Lora(nn.Module):
    """As peft puts it in the place of a layer."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.a = nn.Linear(base_layer.in_features, 2, bias=False)
        self.b = nn.Linear(2, base_layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.b(self.a(x))


def with_lora(net: TransformerWrapper) -> TransformerWrapper:
    net.to_logits = Lora(net.to_logits)
    return net


class Positional(nn.Module):
    """A head that looks at other positions."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv1d(WIDTH, NUM_TOKENS, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x.transpose(1, 2)).transpose(1, 2)


NETS = {
    "a subclass": lambda: transformer(Ruled),
    "a hook": lambda: with_forward_hook(transformer()),
    "a hook of the head": lambda: with_head_hook(transformer()),
    "another forward": lambda: with_other_forward(transformer()),
    "another forward of the head": lambda: _with_head(transformer(), with_other_forward),
    "a parametrization": lambda: with_parametrization(transformer()),
    "LoRA": lambda: with_lora(transformer()),
    "a head that looks around": lambda: transformer(to_logits=Positional()),
    "a wrapper": lambda: Silent(transformer()),
    "a hook in DataParallel": lambda: nn.DataParallel(with_forward_hook(transformer())),
    "a hook on DataParallel": lambda: with_forward_hook(nn.DataParallel(transformer())),
    "a tied copy": lambda: _tied_copy(),
}


def _with_head(net, change):
    change(net.to_logits)
    return net


_ORIGINALS = []


def _tied_copy() -> TransformerWrapper:
    """x-transformers' tied head is a closure, which a deep copy shares with the original."""
    net = transformer(tie_embedding=True)
    _ORIGINALS.append(net)
    copied = copy.deepcopy(net)
    with torch.no_grad():
        copied.token_emb.emb.weight.mul_(3)
    return copied


def whole_loss(net: nn.Module, model: NonAutoregressiveWrapper, seed: int, **kwargs) -> Tensor:
    """The likelihood bound of logits at all positions."""
    batch = corrupt(IDS, model.masking, seed=seed)
    logits = net(batch.input_ids, **kwargs)
    nll = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none")
    return (nll.view(IDS.shape) * batch.loss_weight[:, None]).sum() / batch.num_maskable.sum()


@pytest.mark.parametrize("name", NETS)
def test_what_users_changed_is_in_the_loss(name):
    net = NETS[name]()
    model = NonAutoregressiveWrapper(net, mask_id=MASK_ID)
    wanted = whole_loss(net, model, 3)
    got = model(IDS, seed=3).loss
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    parameters = [p for p in net.parameters() if p.requires_grad]
    for a, b in zip(
        torch.autograd.grad(got, parameters, allow_unused=True),
        torch.autograd.grad(wanted, parameters, allow_unused=True),
        strict=True,
    ):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["a subclass", "a hook", "another forward", "a wrapper"])
def test_what_users_rule_out_is_not_generated(name):
    model = NonAutoregressiveWrapper(NETS[name](), mask_id=MASK_ID)
    for strategy in ("confidence", "random"):
        ids = model.generate(100, seed=0, filter_thres=None, strategy=strategy)
        assert ids.max() < RARE


def test_global_hooks():
    model = NonAutoregressiveWrapper(transformer(), mask_id=MASK_ID)
    assert split_net(model.net) is not None

    def hook(module, args, out):
        return rule_out(out) if module is model.net else None

    handle = register_module_forward_hook(hook)
    try:
        torch.testing.assert_close(model(IDS, seed=0).loss, whole_loss(model.net, model, 0))
        assert model.generate(50, seed=0, filter_thres=None).max() < RARE
    finally:
        handle.remove()
    assert model.generate(50, seed=0, filter_thres=None).max() >= RARE


@pytest.mark.parametrize("owner", [TransformerWrapper, nn.Linear])
def test_another_forward_of_the_class(owner, monkeypatch):
    original = owner.forward
    monkeypatch.setattr(
        owner, "forward", lambda self, *args, **kwargs: original(self, *args, **kwargs) / 2
    )
    model = NonAutoregressiveWrapper(transformer(), mask_id=MASK_ID)
    torch.testing.assert_close(model(IDS, seed=0).loss, whole_loss(model.net, model, 0))


def test_arguments_for_what_is_behind_the_hidden_states():
    model = NonAutoregressiveWrapper(transformer(), mask_id=MASK_ID)
    options = {"prepend_embeds": torch.randn(BATCH, 3, WIDTH), "excise_prepend_embeds": True}
    wanted = whole_loss(model.net, model, 0, **options)
    torch.testing.assert_close(model(IDS, seed=0, **options).loss, wanted)
    with pytest.raises(TypeError, match="unknown argument 'return_embeddings'"):
        model(IDS, return_embeddings=True)


@pytest.mark.parametrize("place", ["net", "head"])
def test_hooks_see_logits_and_not_hidden_states(place):
    net, seen = transformer(), []
    where = net if place == "net" else net.to_logits
    where.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    model = NonAutoregressiveWrapper(net, mask_id=MASK_ID)
    model(IDS)
    model.generate(2, steps=2)
    assert set(seen) == {(BATCH, LENGTH, NUM_TOKENS), (2, LENGTH, NUM_TOKENS)}


def test_a_subclass_of_a_net_that_promised_its_head():
    class Promising(Net):
        num_tokens, max_seq_len = NUM_TOKENS, LENGTH

        @property
        def output_head(self) -> nn.Module:
            return self.head

        def forward(self, ids: Tensor, return_embeddings: bool = False) -> Tensor:
            hidden = self.e(ids)
            return hidden if return_embeddings else self.head(hidden)

    class Breaking(Promising):
        def forward(self, ids: Tensor, **kwargs) -> Tensor:
            return rule_out(super().forward(ids, **kwargs))

    assert split_net(Promising()) is not None
    net = Breaking()
    model = NonAutoregressiveWrapper(net, mask_id=MASK_ID)
    torch.testing.assert_close(model(IDS, seed=0).loss, whole_loss(net, model, 0))


# Adapters


class Scaled(Net):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) / 2


class InPlace(Net):
    def forward(self, ids: Tensor) -> Tensor:
        logits = super().forward(ids)
        logits[..., RARE:] = -30.0
        return logits


class Filled(Net):
    """By a method that writes where elements share their memory."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids).masked_fill_(torch.arange(NUM_TOKENS) >= RARE, -30.0)


class Sliced(Net):
    def forward(self, ids: Tensor) -> Tensor:
        logits = super().forward(ids)
        logits[..., RARE:].fill_(-30.0)
        return logits


class Looking(Net):
    """What it does depends on the values."""

    def forward(self, ids: Tensor) -> Tensor:
        logits = super().forward(ids)
        if logits.abs().max() > 0.5:
            logits = logits / 2
        return logits


class Viewed(Net):
    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.e(ids).flatten(0, 1)).view(*ids.shape, NUM_TOKENS)


class Twice(Net):
    def forward(self, ids: Tensor) -> Tensor:
        first = super().forward(ids)
        return super().forward(first.argmax(-1).clamp(max=MASK_ID - 1))


CLASSES = [Scaled, InPlace, Filled, Sliced, Viewed, Twice]


@pytest.mark.parametrize(
    ("cls", "mode"),
    [
        *((c, mode) for c in CLASSES for mode in ("train", "no_grad", "inference", "compiled")),
        *((Looking, mode) for mode in ("train", "no_grad", "inference")),  # compiled: not noticed
    ],
)
def test_an_adapter_notices_that_its_head_is_not_the_last(cls, mode):
    net = cls()
    inner = torch.compile(net, backend="eager") if mode == "compiled" else net
    model = NonAutoregressiveWrapper(adapted(inner, net.head), mask_id=MASK_ID)
    plain = NonAutoregressiveWrapper(adapted(net, knows=False), mask_id=MASK_ID)
    contexts = {"no_grad": torch.no_grad, "inference": torch.inference_mode}
    with contexts.get(mode, torch.enable_grad)(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?!NetAdapter)")  # of dynamo
        with pytest.warns(UserWarning, match="does more than return the output of its head"):
            got = model(IDS, seed=0).loss
        torch.testing.assert_close(got, plain(IDS, seed=0).loss)
        again = model(IDS, seed=1).loss  # without another warning
        torch.testing.assert_close(again, plain(IDS, seed=1).loss)
        assert torch.equal(model.generate(3, seed=0), plain.generate(3, seed=0))


def test_an_adapter_raises_what_the_net_raises():
    class Failing(Net):
        def forward(self, ids: Tensor) -> Tensor:
            super().forward(ids)
            raise LookupError("of the net itself")

    model = NonAutoregressiveWrapper(adapted(Failing()), mask_id=MASK_ID)
    with pytest.raises(LookupError, match="of the net itself"):
        model(IDS)
    assert model.net.output_head is model.net.net.head  # no judgement on the head


ADAPTED = {
    "a hook of the head": lambda net: with_forward_hook(net.head),
    "a hook of the net": with_forward_hook,
    "another forward of the head": lambda net: with_other_forward(net.head),
    "another forward of the net": with_other_forward,
    "a parametrization": lambda net: parametrize.register_parametrization(
        net.head, "weight", Halved()
    ),
}


@pytest.mark.parametrize("name", ADAPTED)
@pytest.mark.parametrize("before", [True, False])
def test_what_users_change_in_an_adapted_net(name, before):
    """Before it is adapted or later; without a warning, since nothing was promised wrongly."""
    net = Net()
    if before:
        ADAPTED[name](net)
    model = NonAutoregressiveWrapper(adapted(net), mask_id=MASK_ID)
    if not before:
        ADAPTED[name](net)
    torch.testing.assert_close(model(IDS, seed=0).loss, whole_loss(net, model, 0))
    plain = NonAutoregressiveWrapper(adapted(net, knows=False), mask_id=MASK_ID)
    assert torch.equal(model.generate(8, seed=0), plain.generate(8, seed=0))


def test_one_call_that_uses_logits_says_nothing_of_others():
    class Judging(Net):
        def forward(self, ids: Tensor, labels: Tensor | None = None) -> Tensor:
            logits = super().forward(ids)
            if labels is not None:
                F.cross_entropy(logits.flatten(0, 1), labels.flatten())
            return logits

    model = NonAutoregressiveWrapper(adapted(Judging()), mask_id=MASK_ID)
    with pytest.warns(UserWarning, match="called like this, the net does more"):
        model(IDS, labels=IDS)
    assert model.net.head_is_last(()) is None and model.net.head_is_last(["labels"]) is False
    model(IDS)
    assert model.net.head_is_last(()) is True


def test_lora_in_the_place_of_the_adapted_head():
    net = Net()
    model = NonAutoregressiveWrapper(adapted(net), mask_id=MASK_ID)
    net.head = Lora(net.head)
    torch.testing.assert_close(model(IDS, seed=0).loss, whole_loss(net, model, 0))


def test_the_adapted_head_runs_at_the_masked_rows_only():
    """What all the checks above must not cost."""
    net, rows = Net(), []
    model = NonAutoregressiveWrapper(adapted(net), mask_id=MASK_ID)
    original = nn.functional.linear

    class Counting(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is original:
                rows.append(args[0].shape)
            return func(*args, **(kwargs or {}))

    with Counting():
        model(IDS)
    assert {shape[:-1] for shape in rows} == {(1, LENGTH)}  # looks once at one sequence
    rows.clear()
    with Counting():
        model(IDS)
    assert rows == []


# Threads


def in_threads(number: int, work) -> list:
    results: list = [None] * number
    errors: list[BaseException] = []

    def run(i: int) -> None:
        try:
            results[i] = work(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


THREADED = {
    "adapter": lambda: adapted(Net()),
    "transformer": transformer,
    "mixture of softmaxes": lambda: transformer(mixture_of_softmax=True),
    "sigsoftmax": lambda: transformer(sigsoftmax_logits=True),
}


@pytest.mark.parametrize("name", THREADED)
def test_generation_side_by_side(name):
    net = THREADED[name]()
    model = NonAutoregressiveWrapper(net, mask_id=MASK_ID, steps=4)
    attributes = {n: dict(vars(m)) for n, m in net.named_modules()}
    expected = [model.generate(2, seed=seed) for seed in range(40)]
    got = in_threads(4, lambda i: [model.generate(2, seed=seed) for seed in range(i, 40, 4)])
    for i in range(4):
        assert all(map(torch.equal, got[i], expected[i::4]))
    assert net(IDS).shape == (BATCH, LENGTH, NUM_TOKENS)
    assert {n: dict(vars(m)) for n, m in net.named_modules()} == attributes


@pytest.mark.parametrize("name", THREADED)
def test_losses_side_by_side(name):
    net = THREADED[name]()
    model = NonAutoregressiveWrapper(net, mask_id=MASK_ID)
    expected = [model(IDS, seed=seed).loss for seed in range(40)]
    got = in_threads(4, lambda i: [model(IDS, seed=seed).loss for seed in range(i, 40, 4)])
    for i in range(4):
        torch.testing.assert_close(got[i], expected[i::4])


def test_training_beside_generation_keeps_its_mode():
    modes: dict[str, list[bool]] = {"train": [], "generate": []}

    class Moody(Net):
        num_tokens, max_seq_len = NUM_TOKENS, LENGTH

        def forward(self, ids: Tensor) -> Tensor:
            before = self.training, self.e.training
            logits = super().forward(ids)
            name = threading.current_thread().name
            modes[name] += [*before, self.training]
            return logits

    model = NonAutoregressiveWrapper(Moody(), mask_id=MASK_ID, steps=6)
    model.net.head.eval()  # frozen by the user
    stop = threading.Event()

    def generate() -> None:
        while not stop.is_set():
            model.generate(2)

    thread = threading.Thread(target=generate, name="generate")
    main = threading.current_thread()
    main_name, main.name = main.name, "train"
    thread.start()
    try:
        for _ in range(100):
            model(IDS).loss.backward()
    finally:
        stop.set()
        thread.join()
        main.name = main_name
    assert modes["train"] and all(modes["train"])
    assert modes["generate"] and not any(modes["generate"])
    assert model.training and model.net.training and not model.net.head.training


@pytest.mark.parametrize("shared", ["net", "critic"])
def test_wrappers_that_share_a_net_take_turns(shared):
    """Though each has an adapter of its own."""
    modes: list[bool] = []

    class Moody(Net):
        def forward(self, ids: Tensor) -> Tensor:
            logits = super().forward(ids)
            if threading.current_thread() is threading.main_thread():
                modes.append(self.training)
            return logits

    common = Moody()
    critic = NetAdapter(common, num_tokens=NUM_TOKENS, max_seq_len=LENGTH)
    if shared == "net":
        one, other = (NonAutoregressiveWrapper(adapted(common), mask_id=MASK_ID) for _ in range(2))
    else:
        scores = nn.Sequential(critic, nn.Linear(NUM_TOKENS, 1))
        one, other = (
            NonAutoregressiveWrapper(adapted(Net()), mask_id=MASK_ID, token_critic=scores)
            for _ in range(2)
        )
    one(IDS)  # which looks at the head in evaluation mode
    modes.clear()
    stop = threading.Event()

    def generate() -> None:
        while not stop.is_set():
            other.generate(2)

    thread = threading.Thread(target=generate)
    thread.start()
    try:
        for _ in range(60):
            one(IDS)
    finally:
        stop.set()
        thread.join()
    assert len(modes) == 60 and all(modes)


def test_a_step_of_generation_may_train():
    """In the same thread, such as to update a net by what it generates."""
    model = NonAutoregressiveWrapper(adapted(Net()), mask_id=MASK_ID, steps=2)

    def train(logits: Tensor, rows: Tensor) -> Tensor:
        with torch.enable_grad():
            model(IDS).loss.backward()
        return logits

    model.generate(2, logits_processor=train)
    assert model.net.net.head.weight.grad is not None


# Compilation


def compiled_whole(backend):
    return torch.compile(NonAutoregressiveWrapper(adapted(Net()), mask_id=MASK_ID), backend=backend)


def compiled_method(backend):
    model = NonAutoregressiveWrapper(adapted(Net()), mask_id=MASK_ID)
    model.compile(backend=backend)
    return model


def compiled_adapter_method(backend):
    model = NonAutoregressiveWrapper(adapted(Net()), mask_id=MASK_ID)
    model.net.compile(backend=backend)
    return model


def compiled_net_method(backend):
    model = NonAutoregressiveWrapper(adapted(Net()), mask_id=MASK_ID)
    model.net.net.compile(backend=backend)
    return model


def compiled_adapter(backend):
    net = torch.compile(adapted(Net()), backend=backend)
    return NonAutoregressiveWrapper(net, mask_id=MASK_ID)


def compiled_net(backend):
    net = Net()
    inner = torch.compile(net, backend=backend)
    return NonAutoregressiveWrapper(adapted(inner, net.head), mask_id=MASK_ID)


def compiled_forward(backend):
    net = Net()
    net.forward = torch.compile(net.forward, backend=backend)
    return NonAutoregressiveWrapper(adapted(net), mask_id=MASK_ID)


def compiled_transformer(backend):
    return NonAutoregressiveWrapper(torch.compile(transformer(), backend=backend), mask_id=MASK_ID)


def compiled_around_a_transformer(backend):
    return torch.compile(NonAutoregressiveWrapper(transformer(), mask_id=MASK_ID), backend=backend)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    "make",
    [
        *(compiled_whole, compiled_method, compiled_adapter_method, compiled_net_method),
        *(compiled_adapter, compiled_net, compiled_forward, compiled_transformer),
        compiled_around_a_transformer,
    ],
    ids=lambda make: make.__name__,
)
def test_any_order_of_wrapping_and_compiling(make, backend):
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of dynamo
        model = make(backend)
        is_transformer = "transformer" in make.__name__
        plain = NonAutoregressiveWrapper(
            transformer() if is_transformer else adapted(Net()), mask_id=MASK_ID
        )
        for seed in range(3):
            losses, expected = model(IDS, seed=seed), plain(IDS, seed=seed)
            torch.testing.assert_close(losses.loss, expected.loss)
            losses.loss.backward()
            expected.loss.backward()
        for a, b in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)
        assert torch.equal(model.generate(3, seed=0), plain.generate(3, seed=0))


# Causal nets


def test_a_causal_net_is_remarked_upon():
    from transformers import LlamaConfig, LlamaForCausalLM
    from x_transformers import Decoder

    config = LlamaConfig(**tiny_sizes(NUM_TOKENS, LENGTH))
    llama = LlamaForCausalLM(config)
    net = adapted(llama, llama.lm_head)
    with pytest.warns(UserWarning, match="holds a LlamaAttention that is causal"):
        NonAutoregressiveWrapper(net, mask_id=MASK_ID)
    layers = Decoder(dim=16, depth=1, heads=2, verbose=False)
    decoder = TransformerWrapper(num_tokens=NUM_TOKENS, max_seq_len=LENGTH, attn_layers=layers)
    with pytest.warns(UserWarning, match="that is causal"):
        NonAutoregressiveWrapper(decoder, mask_id=MASK_ID)
    for module in llama.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False
    NonAutoregressiveWrapper(net, mask_id=MASK_ID)  # warnings are errors here


def test_masks_are_those_of_the_configuration():
    """A check of this file: the loss above is one of masks that `corrupt` draws by itself."""
    model = NonAutoregressiveWrapper(transformer(), mask_id=MASK_ID, no_replace_prob=0.0)
    masking = MaskingConfig(NUM_TOKENS, MASK_ID, random_token_prob=0.1, corruption_prob=0.5)
    assert model.masking == masking
