"""Command-line arguments from the fields of a dataclass."""

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any

from nar_kernels.options import option_of


def add_options(
    parser: argparse.ArgumentParser,
    config_class: Any,
    *,
    presets: Mapping[str, Mapping[str, Any]] | None = None,
    exclude: tuple[str, ...] = (),
) -> None:
    """Adds an option for each dataclass field that has ``help`` in its metadata. Options that are
    not given are absent from the parsed namespace. A switch has a ``--no-`` form, since its default
    may be that of a run that is resumed, unless the field names another ``action``.

    Args:
        presets: for the help text: other defaults, by data set.
        exclude: names of fields to leave out.
    """
    for f in dataclasses.fields(config_class):
        if f.name in exclude or "help" not in f.metadata:
            continue
        keywords = {k: v for k, v in f.metadata.items() if k not in ("help", "otherwise")}
        help_text = f.metadata["help"]
        if f.default is dataclasses.MISSING:
            pass
        elif isinstance(f.default, bool):
            keywords.setdefault("action", argparse.BooleanOptionalAction)
        else:
            if "action" not in keywords:
                keywords.setdefault("type", type(f.default))
            help_text += _defaults(f, presets or {})
        parser.add_argument(
            option_of(f.name), default=argparse.SUPPRESS, help=help_text, **keywords
        )


def _defaults(f: dataclasses.Field[Any], presets: Mapping[str, Mapping[str, Any]]) -> str:
    """The ``(default: ...)`` suffix of an option's help; empty if there is no default."""
    default = f.metadata.get("otherwise", f.default)
    others = [f"{name} {preset[f.name]}" for name, preset in presets.items() if f.name in preset]
    shown = [*([] if default is None else [str(default)]), *others]
    return f" (default: {', '.join(shown)})" if shown else ""
