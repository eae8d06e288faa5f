"""What :class:`nar_kernels.NetAdapter` knows of the models of Hugging Face, by the names of their
methods and attributes: transformers is not imported.

Shapes: B batch, L sequence length.
"""

import inspect
import math
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from nar_kernels.nets.logit_form import LogitForm
from nar_kernels.nets.plain import is_plain_tensor

# Names that configurations give to these.
_LENGTHS = ("max_position_embeddings", "max_sequence_length", "max_seq_len", "seq_length")
_FACTORS = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")

# Kinds of attention that add a dense mask to scores.
_ADDING = ("eager", "flex_attention")


def is_hugging_face(net: nn.Module) -> bool:
    """Whether a net has a configuration and embeddings, as models of transformers do, those of
    ``trust_remote_code`` and in adapters of peft included."""
    return hasattr(net, "config") and callable(getattr(net, "get_output_embeddings", None))


def embedding_rows(net: nn.Module) -> int | None:
    """Rows of the input embeddings, which are more than ``config.vocab_size`` says after a resize;
    None if unknown."""
    weight = getattr(_embeddings(net, "get_input_embeddings"), "weight", None)
    return weight.shape[0] if isinstance(weight, Tensor) and weight.dim() == 2 else None


def max_length(net: nn.Module) -> int | None:
    """How many positions the net has, by its configuration; None if that does not say."""
    config = getattr(net, "config", None)
    lengths = (getattr(config, name, None) for name in _LENGTHS)
    length = next((n for n in lengths if isinstance(n, int) and n > 0), None)
    return None if length is None else length - first_position(net)


def first_position(net: nn.Module) -> int:
    """The ``position_ids`` of the first token: RoBERTa's count from behind its padding."""
    for module in net.modules():
        positions = module._modules.get("position_embeddings")
        if isinstance(positions, nn.Embedding) and positions.padding_idx is not None:
            return positions.padding_idx + 1
    return 0


def computes_own_loss(net: nn.Module) -> bool:
    """Whether the net, in training mode, masks its input by itself and returns a loss in place of
    logits, as SDAR does (arXiv:2510.06303)."""
    return hasattr(_base_model(net), "prepare_for_bd_training")


def stores_on_request(net: nn.Module) -> bool:
    """Whether a cache grows only in calls with ``store_kv=True``, as that of SDAR."""
    base: Any = _base_model(net)
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else base
    return "store_kv" in inspect.signature(type(decoder).forward).parameters


def output_embeddings(net: nn.Module) -> nn.Module | None:
    """The head, or the embedding that is one, if the net says so."""
    return _embeddings(net, "get_output_embeddings")


def _embeddings(net: nn.Module, method: str) -> nn.Module | None:
    try:
        found = getattr(net, method)()
    except (AttributeError, NotImplementedError, TypeError):
        return None
    return found if isinstance(found, nn.Module) else None


def added_bias(net: nn.Module, head: nn.Module) -> str | None:
    """Name of a parameter ``[V]`` beside the head that may be added to its output, as of ESM."""
    for name, module in net.named_modules():
        bias = module._parameters.get("bias")
        is_beside = any(child is head for child in module.children())
        if is_beside and is_plain_tensor(bias) and bias is not getattr(head, "bias", None):
            return f"{name}.bias" if name else "bias"
    return None


def logit_forms(net: Any, bias: str | None) -> Iterator[LogitForm]:
    """How logits may follow from the head, by the configuration: which one it is depends on the
    model, and is seen when it is called.

    Args:
        bias: of :func:`added_bias`, if it is used.
    """
    scales, caps = [1.0], [None]
    for config in (net.config, getattr(net.config, "text_config", None)):
        for factor in _numbers(config, _FACTORS):
            scales += [factor, 1 / factor]  # Granite divides by what HyperCLOVA X multiplies with
        if getattr(config, "scale_logits", False):  # LLaDA
            scales += [width**-0.5 for width in _numbers(config, ("d_model",))]
        caps += _numbers(config, _CAPS)
    for scale, cap in product(scales, caps):
        yield LogitForm(is_unmodified=False, scale=scale, cap=cap, bias=bias)


def _numbers(config: object, names: tuple[str, ...]) -> list[Any]:
    values = (getattr(config, name, None) for name in names)
    return [float(value) for value in values if isinstance(value, int | float) and value > 0]


class Unmasking:
    """How to call a decoder so that its attention looks both ways, while its modules and its
    configuration stay as they are.

    transformers 5 has an argument for that, ``is_causal=False``, which most decoders pass on to all
    that needs it. Others get a mask of all pairs, ``[B, 1, L, L]``, in place of their own. Which
    way works is tried out, on a few tokens.

    Raises:
        ValueError: none does.
    """

    def __init__(self, net: nn.Module) -> None:
        self._net, core = net, _base_model(net)
        config: Any = getattr(core, "config", None)
        kinds = set(getattr(config, "layer_types", None) or [])
        if getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None):
            kinds.add("sliding_attention")
        parameters = inspect.signature(type(core).forward).parameters
        self._has_cache = "use_cache" in parameters
        self._by_argument = True
        ways = []
        if kinds <= {"full_attention", "sliding_attention"}:
            if any(p.kind == p.VAR_KEYWORD for p in parameters.values()):
                ways.append(True)
            # The mask takes the place of that of a window, too.
            if "sliding_attention" not in kinds and "attention_mask" in parameters:
                ways.append(False)
        is_flash = "flash" in str(attention_of(net))  # which takes no such mask
        needs_gpu = is_flash or computes_own_loss(net)  # SDAR has kernels of its own
        if ways and (needs_gpu or any(p.is_meta for p in net.parameters())):
            self._by_argument = ways[0 if is_flash else -1]
            return
        cause: Exception | None = None
        for self._by_argument in ways:
            try:
                looks = self._looks_both_ways()
                if looks is None:
                    self._by_argument = ways[-1]
                if looks is not False:
                    return
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # a net may do anything with what it does not expect
                cause = error
        kind, layers = type(core).__name__, ", ".join(sorted(kinds)) or "kinds of its own"
        raise ValueError(
            f"{kind} cannot be made to look both ways, with layers of {layers}: full_attention "
            "mostly can, sliding_attention with transformers 5. Use another net, or "
            "bidirectional=False to have it called as it is"
        ) from cause

    @torch.no_grad()
    def _looks_both_ways(self) -> bool | None:
        """Whether what a token changes before it is not nothing, compared to what it does after,
        with and without padding behind. None: neither changes anything, as with weights of 0."""
        net: Any = self._net._modules.get("_orig_mod", self._net)  # nothing is compiled for this
        training = [module for module in net.modules() if module.training]
        net.eval()
        try:
            for is_padded in (False, True):
                ids = _few_tokens(net, 3 + is_padded)
                padding = torch.tensor([[1, 1, 1, 0]], device=ids.device).expand(3, 4)
                given = {"attention_mask": padding} if is_padded else {}
                before, after, _ = _influences(net, ids, given | self.arguments(ids, given))
                if before == after == 0:
                    return None
                if not before > 1e-3 * after:  # or NaN
                    return False
            return True
        finally:
            for module in training:
                module.training = True

    def arguments(self, ids: Tensor, given: dict[str, Any]) -> dict[str, Any]:
        """What to pass beside, or in place of, the arguments that are given; none if these have a
        mask of pairs or a cache.

        Args:
            ids: int64 ``[B, L]``.
        """
        mask = given.get("attention_mask")
        is_padding = isinstance(mask, Tensor) and mask.dim() == 2
        if "is_causal" in given or given.get("past_key_values") is not None:
            return {}
        if mask is not None and not is_padding:
            return {}
        more = {"use_cache": False} if self._has_cache and "use_cache" not in given else {}
        if self._by_argument:
            return {"is_causal": False, **more}
        rows, length = ids.shape
        attends = torch.ones((rows, length), dtype=torch.bool, device=ids.device)
        if is_padding:
            assert mask is not None
            attends = mask.bool()
        pairs = attends[:, None, None].expand(rows, 1, length, length)
        return {"attention_mask": mask_for(self._net, pairs), **more}


def takes_pairs(net: nn.Module) -> bool:
    """Whether a mask ``[B, 1, L, L]`` takes the place of the net's own, and nothing beside
    attention looks at other tokens, such as recurrent layers; tried out, with masks of all pairs
    and of those that look ahead. To be called in evaluation mode."""
    ids = _few_tokens(net, 3)
    pairs = torch.ones(1, 1, 3, 3, dtype=torch.bool, device=ids.device)
    before, after, rounding = _influences(net, ids, {"attention_mask": mask_for(net, pairs)})
    if before == after == 0 or not math.isfinite(before + after):
        return True  # it shows nothing
    _, behind, _ = _influences(net, ids, {"attention_mask": mask_for(net, pairs.triu())})
    # What a mask keeps out changes nothing at all, and a convolution little at first.
    return before > 1e-3 * after and behind <= max(rounding, 1e-5 * after)


def _few_tokens(net: nn.Module, length: int) -> Tensor:
    """int64 ``[3, length]``: sequences of which the second has another token 2, and the third
    another token 0. None is padding, which counts for RoBERTa's positions. Nothing differs where
    there are few ids."""
    padding = getattr(_embeddings(net, "get_input_embeddings"), "padding_idx", None)
    ids = [i for i in range(min(embedding_rows(net) or 1, 7)) if i != padding] or [0]
    places = [[1, 2, 3, 0], [1, 2, 4, 0], [5, 2, 3, 0]]
    rows = [[ids[min(place, len(ids) - 1)] for place in row[:length]] for row in places]
    return torch.tensor(rows, device=next(net.parameters()).device)


@torch.no_grad()
def _influences(net: nn.Module, ids: Tensor, kwargs: dict[str, Any]) -> tuple[float, float, float]:
    """Of :func:`_few_tokens`: what token 2 changes at position 0, and token 0 at position 2, and
    what rounding may; the first two are 0 if both may be due to that."""
    out = net(ids, **kwargs)
    found = (getattr(out, name, None) for name in ("logits", "last_hidden_state"))
    values = next((v for v in found if v is not None), out)
    values = values if isinstance(values, Tensor) else values[0]
    dtypes = {values.dtype, *(p.dtype for p in net.parameters() if p.is_floating_point())}
    rounding = 4 * max(torch.finfo(dtype).eps for dtype in dtypes) * values.abs().max().item()
    changes = values[0, 0] - values[1, 0], values[0, 2] - values[2, 2]
    before, after = (change.abs().max().item() for change in changes)
    return (0.0, 0.0, rounding) if max(before, after) < rounding else (before, after, rounding)


def is_decoder(net: nn.Module) -> bool:
    """Whether attention looks back only, by what the modules say or how transformers calls them."""
    kind = type(_base_model(net))
    is_own = kind.__module__.startswith("transformers.")
    is_called = kind.__name__.endswith(("ForCausalLM", "LMHeadModel"))
    says = any(getattr(module, "is_causal", None) is True for module in net.modules())
    return says or (is_own and is_called)


def _base_model(net: Any) -> nn.Module:
    """Without an adapter of peft, or torch.compile."""
    net = net._modules.get("_orig_mod", net)
    return net.get_base_model() if hasattr(net, "get_base_model") else net


def mask_for(net: Any, mask: Tensor) -> Tensor:
    """A dense mask as the attention of a net takes it: bool, or numbers to add."""
    if attention_of(net) not in _ADDING:
        return mask
    kind = next((p.dtype for p in net.parameters() if p.is_floating_point()), torch.float32)
    if torch.is_autocast_enabled(mask.device.type):
        kind = torch.get_autocast_dtype(mask.device.type)
    nothing = torch.zeros((), dtype=kind, device=mask.device)
    return nothing.masked_fill(~mask, torch.finfo(kind).min)


def attention_of(net: Any) -> str | None:
    """Which kind of attention a net computes, such as ``"sdpa"``; None if it does not say."""
    if computes_own_loss(net):
        return "sdpa"  # whatever its configuration says
    return getattr(getattr(net, "config", None), "_attn_implementation", None)
