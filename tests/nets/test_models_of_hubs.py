"""`NetAdapter(net)` of models of Hugging Face: what it finds out by itself."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nar_kernels import (
    Corrupted,
    MaskingConfig,
    NetAdapter,
    NonAutoregressiveWrapper,
    block_diffusion_inputs,
    corrupt,
    dense_block_mask,
)
from nar_kernels.nets import hugging_face
from nar_kernels.nets.packed import block_keywords, packed_keywords
from tests.helpers.nets_of_hubs import (
    LENGTH,
    MASK_ID,
    NUM_TOKENS,
    HiddenStates,
    LikeDream,
    LikeLlada,
    LikeSdar,
    Odd,
    SdarModel,
    config_of,
    model_of,
)

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")

IS_5 = int(transformers.__version__.split(".")[0]) >= 5

ENCODERS = ["Bert", "Roberta", "ModernBert", "Esm", *(["EuroBert"] if IS_5 else [])]
DECODERS = ["Llama", "Qwen2", "Qwen3"]
CHANGED: dict[str, tuple[str, dict[str, Any], str]] = {
    "Cohere": ("Cohere", {"logit_scale": 0.3}, "scale 0.3"),
    "Granite": ("Granite", {"logits_scaling": 4.0}, "scale 0.25"),
    "Esm": ("Esm", {}, "bias lm_head.bias"),
}
if IS_5:  # with sliding windows
    capped = {"final_logit_softcapping": 0.2, "sliding_window": 4}
    CHANGED["Gemma 2"] = ("Gemma2", {**capped, "attn_implementation": "eager"}, "cap 0.2")
    CHANGED["Gemma 3"] = ("Gemma3Text", capped, "cap 0.2")

IDS = torch.randint(1, MASK_ID, (4, LENGTH), generator=torch.Generator().manual_seed(0))


def wrapped(net: nn.Module, **options: Any) -> NonAutoregressiveWrapper:
    options = {"no_replace_prob": 0.0, "random_token_prob": 0.0, **options}
    return NonAutoregressiveWrapper(net, mask_id=MASK_ID, **options)


def loss_of(logits: Tensor, batch: Corrupted) -> Tensor:
    """The likelihood bound, of logits at all positions."""
    nll = F.cross_entropy(logits.float().mT, batch.labels, reduction="none")
    weight = batch.loss_weight.view(len(nll), -1)  # of each sequence, or each block
    weight = weight.repeat_interleave(LENGTH // weight.shape[1], 1)
    return (nll * weight).sum() / batch.num_maskable.sum()


class Linears(torch.overrides.TorchFunctionMode):
    """Counts the rows that are multiplied with a weight of V rows."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.linear and args[1].shape[0] == NUM_TOKENS:
            self.rows += args[0].numel() // args[0].shape[-1]
        return func(*args, **(kwargs or {}))


def check_masked_rows_only(
    net: NetAdapter, form: str = "as they are", whole: nn.Module | None = None
) -> None:
    """Loss and gradients are those of logits at all positions, which are not computed; and so is
    what is generated."""
    model, whole = wrapped(net), whole or copy.deepcopy(net.net)
    batch = corrupt(IDS, model.masking, seed=1)
    plain = NetAdapter(whole, max_seq_len=net.max_seq_len, head=None, shift_logits=net.shift_logits)
    expected = loss_of(plain(batch.input_ids), batch)
    expected.backward()
    model(batch)  # looks once at one sequence
    with Linears() as linears:
        loss = model(batch).loss
    assert linears.rows in (0, len(batch.masked_rows))  # masked_nll multiplies by itself
    assert str(net.logit_form(())) == form and net.head_is_last(()) is True
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    for p, q in zip(net.net.parameters(), whole.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-6)
    assert torch.equal(model.generate(2, seed=0), wrapped(plain).generate(2, seed=0))


@pytest.mark.parametrize("family", [*ENCODERS, *DECODERS])
def test_sizes_and_head_are_found(family: str) -> None:
    net = NetAdapter(model_of(family))
    assert (net.num_tokens, net.max_seq_len) == (NUM_TOKENS, LENGTH)
    check_masked_rows_only(net, "bias lm_head.bias" if family == "Esm" else "as they are")


@pytest.mark.parametrize("name", CHANGED)
def test_what_is_done_to_logits_is_done_at_masked_rows(name: str) -> None:
    family, options, form = CHANGED[name]
    check_masked_rows_only(NetAdapter(model_of(family, **options)), form)


def test_nets_with_code_of_their_own() -> None:
    check_masked_rows_only(NetAdapter(LikeLlada()), "scale 0.25")
    check_masked_rows_only(NetAdapter(LikeDream(), shift_logits=True))
    check_masked_rows_only(NetAdapter(LikeDream().bfloat16().float()))
    check_masked_rows_only(NetAdapter(HiddenStates()), whole=LikeDream())  # of the same weights


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention"])
def test_sdar(attention: str) -> None:
    """Logits in place of its own loss, masks of bools whatever its configuration says, and a cache
    that grows on request."""
    net = NetAdapter(LikeSdar(attention)).train()
    assert net.training and not any(module.training for module in net.net.modules())
    assert gradient_at_embeddings(net).all()
    everywhere = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool)
    assert torch.equal(net(IDS), net.net(IDS, attention_mask=everywhere).logits)
    model = wrapped(net)
    batch = corrupt(IDS, model.masking, seed=1)
    whole = loss_of(net(batch.input_ids), batch).item()
    assert model.train()(batch).loss.item() == pytest.approx(whole, rel=1e-5)
    assert net.head_is_last(()) is True

    blocks = wrapped(net, block_length=4)
    batch = corrupt(IDS, blocks.masking, seed=1)
    inputs, mask = block_diffusion_inputs(batch), dense_block_mask(LENGTH, 4)
    out = net.net(inputs.input_ids, attention_mask=mask, position_ids=inputs.position_ids)
    expected = loss_of(out.logits[:, :LENGTH], batch).item()
    assert blocks(batch).loss.item() == pytest.approx(expected, rel=1e-5)
    assert blocks.generate_steps(2).blocks.cached
    without = blocks.generate(2, seed=0, cache=False)
    assert torch.equal(blocks.generate(2, seed=0), without)


def test_sdar_is_not_called_before_it_is_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels run on a GPU only."""
    monkeypatch.setattr(SdarModel, "forward", None)
    assert NetAdapter(LikeSdar()).looks_both_ways


def test_hidden_states_are_those_of_the_head() -> None:
    net = HiddenStates()
    logits = NetAdapter(net)(IDS)
    assert torch.equal(logits, net.ff_out(net.trunk(IDS)))
    with pytest.raises(TypeError, match="returned hidden states, and its head is unknown"):
        NetAdapter(net, head=None)(IDS)


def test_shifted_logits() -> None:
    """Row i is what the net says at i - 1; the first, its own. So are packed documents."""
    net = NetAdapter(LikeDream(), shift_logits=True)
    logits = net.net(IDS).logits
    assert torch.equal(net(IDS), torch.cat([logits[:, :1], logits[:, :-1]], 1))
    model = wrapped(NetAdapter(model_of("Llama"), shift_logits=True))
    lengths = torch.tensor([5, 7])
    how: dict[str, Any] = {"seed": 1, "max_length": LENGTH, "global_batch": 2}
    starts = torch.tensor([0, 5])
    rows: dict[str, Any] = {"seq_len": LENGTH, "num_rows": 1, "places": starts}
    batch = corrupt(IDS[0], model.masking, starts=starts, lengths=lengths, **how, **rows)
    alone = 0.0
    for i in range(2):
        one = corrupt(
            IDS[0], model.masking, starts=starts[i : i + 1], lengths=lengths[i : i + 1],
            sample_ids=torch.tensor([i]), **how,
        )  # fmt: skip
        alone += model(one, normalizer=12).loss.item()
    assert model(batch).loss.item() == pytest.approx(alone, rel=1e-5)
    with pytest.raises(ValueError, match="shift_logits, with which block diffusion does not go"):
        wrapped(model.net, block_length=4)(IDS)
    with pytest.raises(ValueError, match="shift_logits, with which decoding block by block"):
        wrapped(model.net, block_length=4).generate(1)


def test_what_nothing_says_is_done_at_all_positions() -> None:
    net = Odd()
    model = wrapped(NetAdapter(net))
    batch = corrupt(IDS, model.masking, seed=1)
    with pytest.warns(UserWarning, match="something else with the output of its head"):
        loss = model(batch).loss
    assert loss.item() == pytest.approx(loss_of(net(batch.input_ids).logits, batch).item())


def test_the_closest_form_counts() -> None:
    """In bfloat16 scales of 0.98 and of 1 are within the tolerance."""
    net = NetAdapter(model_of("Cohere", logit_scale=0.98).bfloat16())
    wrapped(net)(IDS)
    assert str(net.logit_form(())) == "scale 0.98"


def test_another_dtype_later() -> None:
    """Where a cast to float32 was none before: without a warning."""
    model = wrapped(NetAdapter(LikeDream()))
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        model.to(dtype)(IDS)
        assert model.net.head_is_last(()) is True


@pytest.mark.skipif(not IS_5, reason="transformers 4: encoders take no masks of pairs")
@pytest.mark.parametrize("family", ["Bert", "Roberta"])
def test_positions_of_packed_documents(family: str) -> None:
    """RoBERTa's begin behind its padding, whose embedding is 0."""
    net = NetAdapter(model_of(family).eval())
    ids, lengths = IDS[0].clamp(min=2), torch.tensor([5, 7])
    starts = torch.tensor([0, 5])
    rows: dict[str, Any] = {"seq_len": LENGTH, "num_rows": 1, "places": starts}
    masking = MaskingConfig(NUM_TOKENS, MASK_ID)
    batch = corrupt(ids, masking, seed=1, starts=starts, lengths=lengths, **rows)
    row = batch.input_ids.view(1, -1)
    alone = torch.cat([net(row[:, :5]), net(row[:, 5:])], 1)
    assert torch.allclose(net(row, **packed_keywords(net, batch, {})), alone, atol=1e-6)
    blocks = wrapped(net, block_length=LENGTH)
    of_blocks = block_keywords(net, corrupt(IDS, blocks.masking, seed=1), LENGTH, {})
    inputs = torch.cat([IDS, IDS], 1).clamp(min=2)
    both = net(inputs, **of_blocks)
    assert torch.allclose(both[:, :LENGTH], net(inputs[:, :LENGTH]), atol=1e-6)


def gradient_at_embeddings(net: NetAdapter, **given: Any) -> Tensor:
    """Of the output at position 0, whether each position ``[B, L]`` has any."""
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: Any, out: Tensor) -> None:
        out.retain_grad()
        kept.append(out)

    hook = net.net.get_input_embeddings().register_forward_hook(keep)
    net(IDS, **given)[:, 0].square().sum().backward()
    hook.remove()
    return kept[0].grad.abs().amax(-1) > 0


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", DECODERS)
def test_decoders_look_both_ways(family: str, attention: str) -> None:
    model = model_of(family, attn_implementation=attention).eval()
    before, causal = model.config.to_dict(), model(IDS).logits
    net = NetAdapter(model)
    assert gradient_at_embeddings(net).all()
    everywhere = torch.ones(4, 1, LENGTH, LENGTH, dtype=torch.bool)
    expected = model(IDS, attention_mask=hugging_face.mask_for(model, everywhere)).logits
    assert torch.allclose(net(IDS), expected, atol=1e-6)
    padding = torch.ones_like(IDS)
    padding[0, 7:] = 0
    assert torch.equal(gradient_at_embeddings(net, attention_mask=padding), padding.bool())
    short = net(IDS[:1, :7])
    assert torch.allclose(net(IDS, attention_mask=padding)[:1, :7], short, atol=1e-6)
    wrapped(net)  # without a warning
    # The model itself is as it was.
    assert model.config.to_dict() == before and torch.equal(model(IDS).logits, causal)
    assert torch.equal(NetAdapter(model, bidirectional=False)(IDS), causal)


@pytest.mark.skipif(not IS_5, reason="transformers 4 makes no other masks of windows")
def test_windows_look_both_ways() -> None:
    net = NetAdapter(model_of("Mistral", sliding_window=3, num_hidden_layers=1).eval())
    seen = gradient_at_embeddings(net)
    assert seen[:, :3].all() and not seen[:, 4:].any()


def test_a_net_that_forgets_the_argument_gets_a_mask() -> None:
    """StableLM's layers do not pass it on, to attention that looks back only without a mask."""
    net = NetAdapter(model_of("StableLm").eval())
    assert gradient_at_embeddings(net).all()


def test_weights_of_zero_show_no_way() -> None:
    """As of a projection that begins at 0: a mask works for all."""
    model = model_of("StableLm").eval()
    projections = [layer.self_attn.o_proj.weight for layer in model.model.layers]
    for weight in projections:
        nn.init.zeros_(weight)
    net = NetAdapter(model)
    for weight in projections:
        nn.init.normal_(weight)
    assert gradient_at_embeddings(net).all()


def test_a_net_compiled_before() -> None:
    model = model_of("Llama")
    expected = wrapped(NetAdapter(model))(IDS, seed=1).loss.item()
    net = NetAdapter(torch.compile(model, backend="eager"))
    assert net.looks_both_ways
    assert wrapped(net)(IDS, seed=1).loss.item() == pytest.approx(expected, rel=1e-5)


def gpt_neo() -> Any:
    """Which has a mask of its own."""
    config = transformers.GPTNeoConfig(
        vocab_size=NUM_TOKENS, hidden_size=16, num_layers=1, num_heads=2,
        attention_types=[[["global"], 1]], max_position_embeddings=LENGTH,
    )  # fmt: skip
    return transformers.GPTNeoForCausalLM(config)


def test_nets_that_cannot_look_both_ways() -> None:
    model = gpt_neo()
    assert model.training
    with pytest.raises(ValueError, match="GPTNeoForCausalLM cannot be made to look both ways"):
        NetAdapter(model)
    assert all(module.training for module in model.modules())
    NetAdapter(model, bidirectional=False)
    with torch.device("meta"):
        assert NetAdapter(model_of("Llama")).looks_both_ways


def test_what_is_not_said_must_be_given() -> None:
    with pytest.raises(TypeError, match="Linear does not say its num_tokens: wrap it as"):
        NetAdapter(nn.Linear(2, 2))
    bloom = transformers.BloomConfig(vocab_size=NUM_TOKENS, hidden_size=16, n_layer=1, n_head=2)
    with pytest.raises(TypeError, match="does not say its max_seq_len: wrap it as"):
        NetAdapter(transformers.BloomForCausalLM(bloom))


def test_a_resized_embedding() -> None:
    model = model_of("Bert")
    model.resize_token_embeddings(NUM_TOKENS + 7)
    assert NetAdapter(model).num_tokens == NUM_TOKENS + 7


def test_bfloat16_weights() -> None:
    model = model_of("Llama", tie_word_embeddings=True)
    batch = corrupt(IDS, wrapped(NetAdapter(model)).masking, seed=1)
    expected = wrapped(NetAdapter(model))(batch).loss.item()
    half = wrapped(NetAdapter(copy.deepcopy(model).bfloat16()))
    loss = half(batch).loss
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected, rel=0.02)
    dream = wrapped(NetAdapter(LikeDream().bfloat16()))  # which makes float32 of its logits
    dream(batch).loss.backward()
    assert dream.net.head_is_last(()) is True


@pytest.mark.filterwarnings("ignore:.*will be removed in v6:FutureWarning")
@pytest.mark.parametrize("family", ["ModernBert", "Llama"])
def test_gradient_checkpointing(family: str) -> None:
    gradients = []
    for recomputes in (False, True):
        model = model_of(family)
        if recomputes:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        whole = wrapped(NetAdapter(model))
        whole(IDS, seed=1).loss.backward()
        assert whole.net.head_is_last(()) is True
        gradients.append([p.grad for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*will be removed in v6:FutureWarning")
def test_adapters_of_peft() -> None:
    peft = pytest.importorskip("peft")
    batch = corrupt(IDS, wrapped(NetAdapter(model_of("Llama"))).masking, seed=1)
    for targets, is_last in ((["q_proj", "v_proj"], True), (["q_proj", "lm_head"], None)):
        options = peft.LoraConfig(target_modules=targets, init_lora_weights=False, r=2)
        model = peft.get_peft_model(model_of("Llama"), options)
        net = NetAdapter(model)
        assert (net.num_tokens, net.max_seq_len) == (NUM_TOKENS, LENGTH) and net.looks_both_ways
        loss = wrapped(net)(batch).loss
        assert net.head_is_last(()) is is_last
        expected = loss_of(NetAdapter(model, head=None)(batch.input_ids), batch)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        loss.backward()
        trained = [n for n, p in model.named_parameters() if p.grad is not None]
        assert trained and all("lora" in name for name in trained)


@pytest.mark.parametrize("family", ["Bert", "Llama"])
def test_what_is_trained_is_saved(family: str, tmp_path) -> None:
    model = model_of(family, tie_word_embeddings=True)
    before = model.config.to_dict()
    whole = wrapped(NetAdapter(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    whole(IDS, seed=1).loss.backward()
    optimizer.step()
    model.eval().save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert torch.equal(NetAdapter(again)(IDS), whole.net(IDS))
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    if IS_5:  # transformers 4 adds what it saved with
        assert again.config.to_dict().keys() == before.keys()


@pytest.mark.skipif(not IS_5, reason="transformers 4 may not have it")
def test_masks_of_pairs_that_do_not_count_are_refused() -> None:
    """By a net with a mask of its own, and by convolutions over what masks keep apart."""
    config = config_of("Lfm2", layer_types=["conv", "full_attention"])
    for model in (gpt_neo(), transformers.Lfm2ForCausalLM(config)):
        blocks = wrapped(NetAdapter(model, bidirectional=False), block_length=4)
        with pytest.raises(ValueError, match=r"LM does not attend by a mask of pairs \[B, 1"):
            blocks(IDS)
        assert all(module.training for module in model.modules())


def test_lack_of_memory_is_not_taken_for_another_mask() -> None:
    def fails(*_: object) -> None:
        raise torch.OutOfMemoryError

    model = model_of("Llama")
    blocks = wrapped(NetAdapter(model), block_length=4)
    model.model.register_forward_pre_hook(fails)
    with pytest.raises(torch.OutOfMemoryError):
        blocks(IDS)
    with pytest.raises(torch.OutOfMemoryError):
        NetAdapter(model)


@pytest.mark.skipif(not IS_5, reason="transformers 4: encoders take no masks of pairs")
def test_what_rounding_hides_is_not_refused() -> None:
    """In bfloat16 a token of this net changes nothing before it, but a little behind it."""
    net = NetAdapter(model_of("ModernBert").bfloat16())
    wrapped(net, block_length=4)(IDS)
