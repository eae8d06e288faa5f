"""HTML player of decoding steps: one self-contained file, no network needed.

Shapes: B sequences, L sequence length, S steps.
"""

import html
import json
import re
from collections.abc import Iterator, Sequence
from importlib import resources
from typing import Any, NamedTuple

import numpy as np

from nar_kernels.data.sequence_spec import SequenceSpec
from nar_kernels.sampling.decode import DecodeState
from nar_kernels.sampling.states import Blocks
from nar_kernels.show.pieces import pieces_of

# A cost is -log p quantised to 0.01 nat, which keeps p to a relative error of 0.5 %. The maximum
# stands for all negligible probabilities, also 0.
_COSTS_PER_NAT, _MAX_COST = 100, 9999


class _Snapshot(NamedTuple):
    """A decoding state, flattened: int64 ``[B * L]`` each.

    ``costs`` are ``-100 ln p`` of the ids, 0 where masked.
    """

    ids: np.ndarray
    costs: np.ndarray


def page(
    states: Sequence[DecodeState],
    spec: SequenceSpec,
    *,
    title: str,
    blocks: Blocks | None = None,
) -> str:
    """The HTML of the page, to be written as UTF-8.

    The URL fragments ``#step=7`` and ``#step=7&view=confidence`` set the initial step and view.

    Args:
        states: all S + 1 states from :meth:`NonAutoregressiveWrapper.generate_steps`.
        spec: format of the sequences.
        blocks: those that they were decoded in, ``blocks`` of ``generate_steps``.

    Raises:
        ValueError: ``states`` is empty, or its sequences do not fit ``spec.image_shape``.
    """
    if not states:
        raise ValueError("states is empty: give all that generate_steps yields")
    num_sequences, length = states[0].ids.shape
    if spec.image_shape is not None and length != spec.image_shape[0] * spec.image_shape[1]:
        raise ValueError(
            f"the sequences have {length} positions: images of {spec.image_shape} do not fit"
        )
    data: dict[str, Any] = {
        "render": spec.render,
        "image_shape": spec.image_shape,
        "mask_id": spec.mask_id,
        "num_sequences": num_sequences,
        "seq_len": length,
        "blocks": None if blocks is None else blocks._asdict(),
        "changes": list(_changes(states, spec.mask_id)),
    }
    if spec.render == "text":
        seen = {id_ for state in states for id_ in state.ids.unique().tolist()} - {spec.mask_id}
        data["pieces"] = {id_: pieces_of(spec).piece(id_) for id_ in sorted(seen)}
    facts = (
        f"{_count(num_sequences, 'sequence')} of {_count(length, 'position')}, "
        f"filled in {_count(len(states) - 1, 'step')}"
    )
    if blocks is not None:
        facts += f", in blocks of {blocks.length}"
    if blocks is not None and blocks.cached:
        facts += "; keys and values of finished blocks are kept"
    values = {
        "title": html.escape(title),
        "facts": facts,
        # Escape "<": JSON in a script element must not contain "</script>".
        "data": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
    }
    template = resources.files("nar_kernels.show").joinpath("player.html").read_text("utf-8")
    # In one pass, because a title may contain a placeholder.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], template)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _changes(states: Sequence[DecodeState], mask_id: int) -> Iterator[dict[str, list[int]]]:
    """Delta of each state to the one before; of the first, to one that is all masked.

    Each delta has flat lists: ``filled`` (place, id, cost), ``masked`` (place) and ``revised``
    (place, increase of the cost). Places are indices into the flat ``[B * L]``, delta-encoded.
    """
    size = states[0].ids.numel()
    before = _Snapshot(np.full(size, mask_id), np.zeros(size, np.int64))
    for state in states:
        after = _snapshot(state, mask_id)
        is_masked, is_other = after.ids == mask_id, after.ids != before.ids
        rise = after.costs - before.costs
        yield {
            "filled": _rows(~is_masked & is_other, after.ids, after.costs),
            "masked": _rows(is_masked & is_other),
            "revised": _rows(~is_other & (rise != 0), rise),  # same id, new probability
        }
        before = after


def _snapshot(state: DecodeState, mask_id: int) -> _Snapshot:
    masked = state.masked.cpu().numpy().reshape(-1)
    ids = np.where(masked, mask_id, state.ids.cpu().numpy().reshape(-1))
    log_prob = np.where(masked, 0, state.log_prob.float().cpu().numpy().reshape(-1))
    costs = np.rint(-_COSTS_PER_NAT * log_prob).clip(0, _MAX_COST).astype(np.int64)
    return _Snapshot(ids, costs)


def _rows(where: np.ndarray, *columns: np.ndarray) -> list[int]:
    """Flat list of (delta-encoded place, *columns) where ``where`` is true."""
    places = np.flatnonzero(where)
    gaps = np.diff(places, prepend=0)
    return np.stack([gaps, *(column[places] for column in columns)], 1).reshape(-1).tolist()
