"""Keyword arguments for the net: only those that its ``forward`` declares are passed on.

Many nets accept and ignore unknown keywords, so a misspelt option of ours would go unnoticed.
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
    """Merges ``kwargs``, whose names the net must declare, and ``net_kwargs``.

    Args:
        caller_names: arguments of the caller itself, to suggest in errors.

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
    """The keywords that a net declares, without the ids; None if it cannot be inspected."""
    module = innermost(net)
    names = _class_keywords(type(module))  # type: ignore[arg-type]
    if names is None:
        return None
    own = vars(module).get("forward")  # instance-level: compiled, or wrapped by accelerate
    for more in (own, *_kwargs_targets(module)):
        if more is not None:
            names |= _keywords(more)[0]
    return names - _reserved_names(module)


def _reserved_names(module: Any) -> set[str]:
    """Keywords that change what a net returns, reserved for this package."""
    if _is_of_x_transformers(module):
        parameters = inspect.signature(type(module).forward).parameters
        return {name for name in parameters if name.startswith("return_")}
    return {"return_embeddings", "return_logits_and_embeddings"}


def _is_of_x_transformers(module: Any) -> bool:
    return any(c.__module__.startswith("x_transformers.") for c in type(module).__mro__)


def _kwargs_targets(module: Any) -> list[Any]:
    """Functions to which known nets pass their ``**kwargs``."""
    found = []
    if _is_of_x_transformers(module):
        found.append(getattr(getattr(module, "attn_layers", None), "forward", None))
    if hasattr(module, "get_base_model"):  # peft
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
        except (TypeError, ValueError):  # not a Python function
            return None
        names |= own
        if not takes_any:
            break
    return names


def _keywords(function: Any, skip: int = 1) -> tuple[frozenset[str], bool]:
    """The keywords of a function, and whether it has ``**kwargs``; skips self and the ids."""
    parameters = list(inspect.signature(function).parameters.values())
    names = [
        p.name for p in parameters[skip:] if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    return frozenset(names), any(p.kind == p.VAR_KEYWORD for p in parameters)
