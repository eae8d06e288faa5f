"""Dataclass fields that are also command-line options."""

import os
from dataclasses import Field, field, fields
from typing import Any, get_args

import numpy as np

from nar_kernels.checks import as_float, as_int, is_sequence


def option(default: Any, help: str, **more: Any) -> Any:
    """A dataclass field with its help text in ``metadata["help"]``.

    ``otherwise`` says what None means; the rest of ``more`` goes to argparse.
    """
    return field(default=default, metadata={"help": help, **more})


def option_of(name: str) -> str:
    """The command-line option of a field."""
    return "--" + name.replace("_", "-")


def coerce_fields(options: Any) -> None:
    """Converts each field of a frozen dataclass to a Python value of its declared type, in place.

    Accepts NumPy scalars, one-element tensors and any ``os.PathLike``; where a tuple of ints is
    declared, any sequence of them.

    Raises:
        TypeError: a value is not of the field's type.
        ValueError: a value is not one of the field's choices, or empty.
    """
    for f in fields(options):
        if not f.metadata:
            continue
        value = _coerce(f, getattr(options, f.name))
        object.__setattr__(options, f.name, value)
        choices = f.metadata.get("choices")
        if choices and value not in choices:
            raise ValueError(f"{f.name} is {value!r}: it must be one of {', '.join(choices)}")
        if value == "":
            raise ValueError(f"{option_of(f.name)} is empty: leave it out, or say what it is")


def _coerce(f: Field[Any], value: Any) -> Any:
    types = get_args(f.type) or (f.type,)
    if value is None and type(None) in types:
        return None
    if str in types and isinstance(value, str):
        return str(value)
    if tuple[int, ...] in types and is_sequence(value):
        return tuple(as_int(f.name, number) for number in value)
    if bool in types and isinstance(value, bool | np.bool_):
        return bool(value)
    if int in types and not isinstance(value, bool | np.bool_):
        return as_int(f.name, value)
    if float in types and not isinstance(value, bool | np.bool_):
        return as_float(f.name, value)
    if os.PathLike[str] in types and isinstance(value, os.PathLike):
        path = os.fspath(value)
        if isinstance(path, str):
            return path
    names = [getattr(t, "__name__", str(t)) for t in types if t is not type(None)]
    raise TypeError(f"{f.name} is {value!r}: it must be of type {' or '.join(names)}")
