"""Live view of decoding in a terminal."""

import math
from collections.abc import Iterable
from typing import TextIO

from nar_kernels.data.sequence_spec import SequenceSpec
from nar_kernels.sampling.decode import DecodeState
from nar_kernels.show.pieces import pieces_of
from nar_kernels.show.samples import shade

_MASK = "░"
_WIDTH = 72
# (upper bound of the probability, 256-colour code): from red (improbable) to plain text.
_DOUBTFUL = ((0.2, 203), (0.5, 215), (0.8, 229))


def watch(states: Iterable[DecodeState], spec: SequenceSpec, out: TextIO) -> DecodeState:
    """Redraws the first sequence in place after each step, and clears it at the end; returns the
    last state.

    Ids that were improbable when they were sampled are coloured.
    """
    height, state = 0, None
    for state in states:
        lines = _frame(state, spec)
        # Move to the start of the last frame, and clear below.
        out.write((f"\x1b[{height}F" if height else "") + "\x1b[J" + "\n".join(lines) + "\n")
        out.flush()
        height = len(lines)
    assert state is not None
    if height:
        out.write(f"\x1b[{height}F\x1b[J")
    return state


def _frame(state: DecodeState, spec: SequenceSpec) -> list[str]:
    share = state.masked[0].float().mean().item()
    lines = [f"step {state.step} of {state.num_steps}, {share:.0%} masked"]
    if spec.render == "text":
        return lines + _flowing(state, spec)
    length = state.ids.shape[1]
    cells = [_cell(state, i, spec) for i in range(length)]
    if spec.image_shape is not None:
        width = spec.image_shape[1]
        return lines + ["".join(cells[i : i + width]) for i in range(0, length, width)]
    between = "" if spec.render == "bytes" else " "
    columns = max(_WIDTH // (len(between) + (1 if spec.render == "bytes" else 6)), 1)
    return lines + [between.join(cells[i : i + columns]) for i in range(0, length, columns)]


def _flowing(state: DecodeState, spec: SequenceSpec) -> list[str]:
    """Lines of text, whose tokens have different widths."""
    lines, room, piece_of = [""], _WIDTH, pieces_of(spec).piece
    for id_, is_masked, log_prob in zip(
        state.ids[0].tolist(), state.masked[0].tolist(), state.log_prob[0].tolist(), strict=True
    ):
        piece = _MASK * 2 if is_masked else piece_of(id_)
        for i, part in enumerate(piece.split("\n")):
            part = "".join(c if c.isprintable() else " " for c in part)
            if i or len(part) > room:
                lines.append("")
                room = _WIDTH
            lines[-1] += part if is_masked else _coloured(part, log_prob)
            room -= len(part)
    return lines


def _cell(state: DecodeState, i: int, spec: SequenceSpec) -> str:
    """One position, at a fixed width."""
    id_ = int(state.ids[0, i])
    is_masked = bool(state.masked[0, i])
    if spec.image_shape is not None:
        return _MASK * 2 if is_masked else shade(id_, spec.mask_id)
    if spec.render == "bytes":
        character = chr(id_) if id_ < 128 else "·"
        text = _MASK if is_masked else character if character.isprintable() else " "
    else:
        text = _MASK * 6 if is_masked else f"{id_:6d}"
    return text if is_masked else _coloured(text, float(state.log_prob[0, i]))


def _coloured(text: str, log_prob: float) -> str:
    """By how probable it was when it was sampled."""
    probability = math.exp(min(log_prob, 0))
    colour = next((code for bound, code in _DOUBTFUL if probability < bound), None)
    return text if colour is None else f"\x1b[38;5;{colour}m{text}\x1b[0m"
