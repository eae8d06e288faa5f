"""Keyword arguments that are for the net: which ones it knows.

Many nets take any keyword and drop what they do not know. A misspelt option of ours would vanish in
one of them, so only names that its ``forward`` declares are passed on.
"""

import difflib
import inspect
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from torch import nn

from nar_kernels.nets.adapter import innermost


def merge_net_kwargs(
    net: nn.Module,
    kwargs: dict[str, Any],
    net_kwargs: Mapping[str, Any] | None,
    caller_names: Iterable[str],
) -> dict[str, Any]:
    """``kwargs`` and ``net_kwargs`` in one, if the net declares the names of the former.

    Args:
        caller_names: names that the caller takes itself, to suggest.

    Raises:
        TypeError: an unknown name, or one given twice.
    """
    declared = declared_names(net) if kwargs else frozenset()
    for name in kwargs:
        if declared is not None and name not in declared:
            near = difflib.get_close_matches(name, [*caller_names, *sorted(declared)], n=1)
            suggestion = f"; did you mean {near[0]!r}?" if near else "."
            raise TypeError(
                f"unknown argument {name!r}: neither this method nor the forward of "
                f"{type(innermost(net)).__name__} declares it{suggestion} What the net takes as "
                f"**kwargs goes into net_kwargs={{{name!r}: ...}}"
            )
    twice = sorted(set(kwargs) & set(net_kwargs or {}))
    if twice:
        raise TypeError(f"{twice[0]!r} was given twice, once in net_kwargs: leave one out")
    return {**kwargs, **(net_kwargs or {})}


def declared_names(net: nn.Module) -> frozenset[str] | None:
    """The keywords that a net declares, its ids left out; None if that cannot be told."""
    module = innermost(net)
    names = _class_keywords(type(module))  # type: ignore[arg-type]
    if names is None:
        return None
    own = vars(module).get("forward")  # such as one that was compiled, or wrapped by accelerate
    for more in (own, *_kwargs_targets(module)):
        if more is not None:
            names |= _keywords(more)[0]
    return names - _reserved_names(module)


def _reserved_names(module: Any) -> set[str]:
    """What changes the output of a net, and is for whoever calls it here to say."""
    if _is_of_x_transformers(module):
        parameters = inspect.signature(type(module).forward).parameters
        return {name for name in parameters if name.startswith("return_")}
    return {"return_embeddings", "return_logits_and_embeddings"}


def _is_of_x_transformers(module: Any) -> bool:
    return any(c.__module__.startswith("x_transformers.") for c in type(module).__mro__)


def _kwargs_targets(module: Any) -> list[Any]:
    """What known nets hand their ``**kwargs`` to."""
    found = []
    if _is_of_x_transformers(module):
        found.append(getattr(getattr(module, "attn_layers", None), "forward", None))
    if hasattr(module, "get_base_model"):  # of peft
        found.append(module.get_base_model().forward)
    return found


@lru_cache(maxsize=64)
def _class_keywords(kind: type) -> frozenset[str] | None:
    names: frozenset[str] = frozenset()
    for c in kind.__mro__:
        if "forward" not in vars(c):
            continue
        try:
            own, takes_any = _keywords(vars(c)["forward"], skip=2)
        except (TypeError, ValueError):  # no Python function
            return None
        names |= own
        if not takes_any:
            break
    return names


def _keywords(function: Any, skip: int = 1) -> tuple[frozenset[str], bool]:
    """The keywords of a function, and whether it takes any other; ``skip`` are self and the ids."""
    parameters = list(inspect.signature(function).parameters.values())
    names = [
        p.name for p in parameters[skip:] if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    return frozenset(names), any(p.kind == p.VAR_KEYWORD for p in parameters)
