"""PNG plots: the loss curve of a run, image grids, filmstrips of decoding steps; a corpus.

Shapes: H height and W width of an image in tokens.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nar_kernels.extras import import_extra
from nar_kernels.files import atomic_write

_PIXELS = 6  # per token, along each axis
_GAP = 8  # pixels between images
_DPI = 100
_LENGTH_BINS = 40
_PAPER, _INK, _FAINT, _TABLE = "#ffffff", "#1d2733", "#66717e", "#e4e8ed"
_TRAIN, _HELD_OUT = "#9db4d0", "#d1495b"
_MASKED = "#f6b957"  # distinct from every grey level


def _figure(width: float, height: float) -> Any:
    """An empty figure, size in inches. Avoids pyplot, which keeps global state."""
    return import_extra("matplotlib.figure").Figure(figsize=(width, height), dpi=_DPI)


def _write(figure: Any, path: Path) -> None:
    with atomic_write(path) as file:
        figure.savefig(file, format="png", facecolor=figure.get_facecolor())


def loss_curve(
    path: Path,
    *,
    train: Sequence[tuple[float, float]],
    held_out: Sequence[tuple[int, float, float]],
    baselines: dict[str, float],
    train_label: str,
    title: str,
) -> None:
    """Training loss, held-out loss with its standard error, and baselines as horizontal lines.

    Args:
        train: (step, bits per token).
        held_out: (step, bits per token, standard error).
        baselines: bits per token of each label.
    """
    figure = _figure(8, 4.6)
    axes = figure.add_axes((0.09, 0.12, 0.88, 0.74))
    if train:
        axes.plot(*zip(*train, strict=True), color=_TRAIN, linewidth=1.2, label=train_label)
    steps, bits, errors = (np.array(column) for column in zip(*held_out, strict=True))
    axes.fill_between(steps, bits - errors, bits + errors, color=_HELD_OUT, alpha=0.2, linewidth=0)
    axes.plot(steps, bits, color=_HELD_OUT, linewidth=2, marker="o", markersize=4, label="held out")
    axes.annotate(
        f"{bits[-1]:.3f}",
        (steps[-1], bits[-1]),
        xytext=(0, -14),
        textcoords="offset points",
        ha="right",
        color=_HELD_OUT,
        weight="bold",
    )
    for label, level in baselines.items():
        axes.axhline(level, color=_INK, linewidth=0.9, linestyle=(0, (5, 4)))
        axes.annotate(
            f"{label}: {level:.2f}",
            (0.99, level),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
            color=_INK,
            fontsize=9,
        )
    # Crop the first training steps: at log2 of the vocabulary they would flatten everything else.
    lows, highs = [*bits, *baselines.values()], [bits[0], *baselines.values()]
    axes.set_ylim(min(lows) - 0.12, max(highs) + 0.25)
    axes.set_xlim(0, max(int(steps[-1]), 1))
    axes.set_xlabel("optimiser step", color=_INK)
    axes.set_ylabel("bits per token", color=_INK)
    figure.text(0.09, 0.94, title, color=_INK, fontsize=12)
    axes.grid(axis="y", color="#e6e9ed", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(-0.01, 0.99), ncol=2, fontsize=9)
    _write(figure, path)


def corpus(
    path: Path,
    *,
    id_counts: np.ndarray,
    lengths: np.ndarray,
    length_counts: np.ndarray,
    title: str,
) -> None:
    """How often ids occur, by rank, and how long documents are, if there are any.

    Args:
        id_counts: how often each id occurs.
        lengths, length_counts: how many documents have which length; empty if there are none.
    """
    figure = _figure(9.6, 4)
    figure.text(0.1, 0.92, title, color=_INK, fontsize=12)
    right = 0.97 if len(lengths) == 0 else 0.48
    axes = _plain_axes(figure, (0.1, 0.15, right - 0.1, 0.68))
    frequency = np.sort(id_counts[id_counts > 0])[::-1] / id_counts.sum()
    marker = "o" if len(frequency) == 1 else None
    axes.loglog(np.arange(len(frequency)) + 1, frequency, color=_HELD_OUT, marker=marker)
    axes.set_xlabel("rank of the id", color=_INK)
    axes.set_ylabel("share of all tokens", color=_INK)
    if len(lengths):
        axes = _plain_axes(figure, (0.59, 0.15, 0.38, 0.68))
        # Bins of a constant ratio, between whole numbers, so that none of them must be empty.
        longest = max(int(lengths[-1]), 1)
        edges = np.unique(np.geomspace(1, longest + 1, _LENGTH_BINS + 1).round()) - 0.5
        shown = np.maximum(lengths, 1)  # an empty document has no place on this axis
        axes.hist(shown, edges, weights=length_counts, color=_TRAIN)
        axes.set_xscale("log")
        axes.set_xlabel("length of the document, tokens", color=_INK)
        axes.set_ylabel("documents", color=_INK)
    _write(figure, path)


def _plain_axes(figure: Any, place: tuple[float, float, float, float]) -> Any:
    axes = figure.add_axes(place)
    axes.grid(color="#e6e9ed", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return axes


def images(
    path: Path,
    ids: Tensor,
    *,
    mask_id: int,
    column_labels: Sequence[str] = (),
    title: str = "",
) -> None:
    """A grid of images; a filmstrip if its columns are decoding steps.

    Args:
        ids: int64 ``[rows, columns, H, W]``: ``mask_id``, or ink from 0 (white) to ``mask_id - 1``.
        column_labels: one per column, or none.
    """
    canvas = _tiles(ids.cpu(), mask_id)
    margin = {"left": 18, "right": 18, "top": 18, "bottom": 18}  # pixels
    margin["top"] += 26 * bool(title) + 20 * bool(column_labels)
    width = canvas.shape[1] + margin["left"] + margin["right"]
    height = canvas.shape[0] + margin["top"] + margin["bottom"]
    figure = _figure(width / _DPI, height / _DPI)
    figure.set_facecolor(_TABLE)
    figure.figimage(canvas, xo=margin["left"], yo=margin["bottom"], origin="upper")
    if title:
        figure.text(margin["left"] / width, 1 - 24 / height, title, color=_INK, fontsize=11)
    step = _PIXELS * ids.shape[-1] + _GAP
    for column, label in enumerate(column_labels):
        x = margin["left"] + column * step + (step - _GAP) / 2
        y = height - margin["top"] + 8
        figure.text(x / width, y / height, label, ha="center", color=_FAINT, fontsize=9)
    _write(figure, path)


def _tiles(ids: Tensor, mask_id: int) -> np.ndarray:
    """uint8 RGB array of all images, with gaps between them."""
    # Palette, indexed by id: white to ink, then the mask colour.
    ink = torch.linspace(0, 1, mask_id, dtype=torch.float32, device="cpu")[:, None]
    white, black, masked = torch.tensor([_rgb(_PAPER), _rgb(_INK), _rgb(_MASKED)], device="cpu")
    palette = torch.cat([white + ink * (black - white), masked[None]])
    tiles = (
        palette.round()
        .to(torch.uint8)[ids]
        .repeat_interleave(_PIXELS, 2)
        .repeat_interleave(_PIXELS, 3)
    )

    rows, columns, height, width, _ = tiles.shape
    canvas = torch.tensor(_rgb(_TABLE), dtype=torch.uint8, device="cpu").repeat(
        rows, columns, height + _GAP, width + _GAP, 1
    )
    canvas[:, :, :height, :width] = tiles
    canvas = canvas.transpose(1, 2).reshape(rows * (height + _GAP), columns * (width + _GAP), 3)
    return canvas[:-_GAP, :-_GAP].numpy()


def _rgb(colour: str) -> tuple[int, int, int]:
    red, green, blue = bytes.fromhex(colour.removeprefix("#"))
    return red, green, blue
