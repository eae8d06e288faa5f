"""How a net is told the class of each sequence.

Shapes: B batch, C classes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nar_kernels.checks import as_classes, as_int, is_integral, is_sequence
from nar_kernels.nets.adapter import innermost, net_attribute
from nar_kernels.nets.keywords import declared_names
from nar_kernels.ops.corrupted import Corrupted

# The embedding of x-transformers' TransformerWrapper(embed_num_tokens={"class": C + 1}).
CLASS = "class"
# Keywords of other nets, in this order: ours, and those of diffusers and of DiT.
_NAMES = "class_ids", "class_labels", "y"


def num_classes_of(net: nn.Module) -> int | None:
    """C of a net that takes classes in [0, C], of which C stands for none; None if it says none.

    x-transformers' nets say it by the rows of their embedding, others by ``num_classes``.
    """
    embedding = _embedding(net)
    if embedding is not None:
        return embedding.num_embeddings - 1
    inner = getattr(innermost(net), "num_classes", None)
    found = net_attribute(net, "num_classes", inner)
    is_number = isinstance(found, int) and not isinstance(found, bool)
    return found if is_number and _name(net) is not None else None


def class_keywords(net: nn.Module, class_ids: Tensor, given: dict[str, Any]) -> dict[str, Any]:
    """Keywords for the call of ``net`` on sequences of these classes, int64 ``[B]``, beside those
    that are given.

    Raises:
        ValueError: the net takes no classes, or they are given twice.
    """
    name = _name(net)
    if name is None:
        kind = type(innermost(net)).__name__
        raise ValueError(
            f"there are classes, but {kind} takes none: its forward must declare one of "
            f"{', '.join(_NAMES)}; x-transformers' TransformerWrapper is made with "
            f"embed_num_tokens={{{CLASS!r}: <number of classes> + 1}}"
        )
    others = given.get(name, {}) if name == "embed_ids" else {}
    if name in given and (name != "embed_ids" or CLASS in others):
        raise ValueError(f"the class was given twice, once as {name!r}: leave one out")
    if name == "embed_ids":  # summed with the embeddings of all positions
        return {name: {**others, CLASS: class_ids[:, None]}}
    return {name: class_ids}


def needs_class(net: nn.Module) -> bool:
    """Whether it is a net of x-transformers that cannot be called without a class."""
    return _embedding(net) is not None


def batch_class_keywords(net: nn.Module, batch: Corrupted, given: dict[str, Any]) -> dict[str, Any]:
    """:func:`class_keywords` of a batch; none if it has no classes.

    Raises:
        ValueError: as there; or the net needs a class, and there is none; or samples share rows; or
            a class on the CPU is outside [0, C]; or another number than C stands for none.
        TypeError: the classes are no tensor of integers.
    """
    if batch.class_ids is None:
        if needs_class(net) and "embed_ids" not in given:
            raise ValueError(
                "the net takes a class, and the batch has none: make it by MaskedLoader(classes=), "
                "or give class_ids; those without a class have the number of classes"
            )
        return {}
    ids: Any = batch.class_ids
    if not isinstance(ids, Tensor) or not is_integral(ids.dtype):
        what = ids.dtype if isinstance(ids, Tensor) else f"a {type(ids).__name__}"
        raise TypeError(f"class_ids is {what}: it must be a tensor of integers, one for each row")
    shape = batch.input_ids.shape
    rows = 1 if len(shape) == 1 else shape[0]
    if list(ids.shape) != [rows]:
        raise ValueError(
            f"the batch has classes {list(ids.shape)} in {rows} rows: it must have one for each, "
            "so documents that share a row cannot have classes of their own"
        )
    num_classes = num_classes_of(net)
    if None not in (num_classes, batch.num_classes) and num_classes != batch.num_classes:
        raise ValueError(
            f"{batch.num_classes} stands for a class that was dropped, and the net has "
            f"{num_classes} classes: give MaskedLoader num_classes={num_classes}"
        )
    # Looking at others is a sync.
    if ids.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_range(ids, num_classes)
    return class_keywords(net, ids.to(torch.int64), given)


ClassIds = int | Sequence[int] | Tensor


def guided_by_class(
    net: nn.Module,
    class_ids: ClassIds | None,
    batch: int,
    device: torch.device,
    given: dict[str, Any],
    unconditional: dict[str, Any] | None,
    *,
    is_guided: bool,
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Keywords for sampling ``batch`` sequences of these classes, with those that are given; and
    those that replace them in the call without a condition, where there is one.

    Without ``class_ids``, a net that needs a class is told that there is none.

    Raises:
        TypeError, ValueError: not classes, not one or B of them, or outside [0, C]; or they are to
            guide, and C is not known.
    """
    num_classes = num_classes_of(net)
    none = None
    if num_classes is not None:
        none = torch.full((batch,), num_classes, dtype=torch.int64, device=device)
    if class_ids is None:
        if needs_class(net) and "embed_ids" not in given:
            assert none is not None
            given = {**given, **class_keywords(net, none, given)}
        return given, unconditional
    ids = _read(class_ids, batch, num_classes).to(device)
    conditional = class_keywords(net, ids, given)
    if none is not None:
        unconditional = {**class_keywords(net, none, given), **(unconditional or {})}
    elif is_guided and unconditional is None:
        raise ValueError(
            f"guidance by class needs to know which class stands for none, and "
            f"{type(innermost(net)).__name__} does not say: give it the attribute num_classes, or "
            "pass the arguments without the class as unconditional"
        )
    return {**given, **conditional}, unconditional


def _read(class_ids: ClassIds, batch: int, num_classes: int | None) -> Tensor:
    """int64 ``[B]``."""
    if not is_sequence(class_ids):
        class_ids = [as_int("class_ids", class_ids)] * batch
    ids = as_classes("class_ids", class_ids)
    if ids.shape != (batch,):
        raise ValueError(
            f"class_ids has shape {list(ids.shape)}: it must be an int or [{batch}], a class for "
            "each sequence"
        )
    _check_range(ids, num_classes)
    return ids


def _check_range(ids: Tensor, num_classes: int | None) -> None:
    """Raises ValueError if one is outside [0, C]."""
    most = torch.iinfo(torch.int64).max if num_classes is None else num_classes
    outside = ids[(ids < 0) | (ids > most)]
    if len(outside):
        are = "from 0 on"
        if num_classes is not None:
            are = f"in [0, {num_classes}), and {num_classes} stands for none"
        raise ValueError(f"class_ids holds {outside[0].item()}: the classes of the net are {are}")


def _name(net: nn.Module) -> str | None:
    """The keyword by which a net takes classes."""
    if _embedding(net) is not None:
        return "embed_ids"
    declared = declared_names(net) or frozenset()
    return next((name for name in _NAMES if name in declared), None)


def _embedding(net: nn.Module) -> nn.Embedding | None:
    embeds = getattr(innermost(net), "embeds", None)
    key = f"{CLASS}_embed"
    found = embeds[key] if isinstance(embeds, nn.ModuleDict) and key in embeds else None
    return found if isinstance(found, nn.Embedding) else None
