"""Views: several masks of each sample in one batch.

Shapes: B batch, L sequence length, n views.
"""

from enum import IntEnum
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nar_kernels.checks import as_int
from nar_kernels.ops.masking import MaskingConfig
from nar_kernels.spec.philox import MAX_VIEWS
from nar_kernels.spec.schedules import NUM_TIMES

# Tables of weights take 256 KiB a node; rules of more nodes than these gain nothing in float32.
_MAX_NODES = 64


class Pairing(IntEnum):
    """How the views of a batch are related. Values are those of
    ``csrc/corrupt/division.h``."""

    INDEPENDENT = 0
    COMPLEMENT = 1  # what is drawn; and what could be masked, but is not
    COUPLED = 2  # everything; what is drawn; and its complement


# What is asked for: so many, a range of them, or related ones.
ViewsLike = int | range | Literal["complement", "coupled"]

_NAMES = {"complement": (2, Pairing.COMPLEMENT), "coupled": (3, Pairing.COUPLED)}


class Views(NamedTuple):
    """
    Attributes:
        num: n.
        first: of independent views, the number of the first.
    """

    num: int = 1
    first: int = 0
    pairing: Pairing = Pairing.INDEPENDENT

    def state(self) -> list[int] | None:
        """As plain values; None for one view."""
        return None if self == ONE_VIEW else [*map(int, self)]

    @property
    def is_paired(self) -> bool:
        return self.pairing is not Pairing.INDEPENDENT


ONE_VIEW = Views()


def check_views(views: ViewsLike, masking: MaskingConfig | None = None) -> Views:
    """
    Raises:
        ValueError, TypeError: no such views, or they do not go with the times of ``masking``.
    """
    is_quadrature = masking is not None and masking.is_quadrature
    if views == 1 and not is_quadrature:  # saves 1 us
        return ONE_VIEW
    if isinstance(views, str):
        if views not in _NAMES:
            raise ValueError(
                f"views is {views!r}: it must be a number of views, a range of them, 'complement' "
                "or 'coupled'"
            )
        count, pairing = _NAMES[views]
        if is_quadrature:
            raise ValueError(f"times='quadrature' has independent views, not {views!r} ones")
        return Views(count, 0, pairing)
    first = 0
    if isinstance(views, range):
        if views.step != 1 or not views or views.start < 0:
            raise ValueError(f"views is {views}: a range of them must ascend by 1 from 0 or more")
        first, count = views.start, len(views)
    else:
        count = as_int("views", views)
    if count < 1 or first + count > MAX_VIEWS:
        raise ValueError(f"views is {views}: there must be at least 1, and at most {MAX_VIEWS}")
    if is_quadrature and (first > 0 or count > _MAX_NODES):
        raise ValueError(
            f"views is {views}: times='quadrature' takes a number of nodes, at most {_MAX_NODES}"
        )
    return Views(count, first)


class ViewTables(NamedTuple):
    """Fields of :class:`CorruptArgs`, on a device."""

    ratio: Tensor
    weight: Tensor
    by_view: bool
    times: Tensor | None

    def to(self, device: torch.device) -> "ViewTables":
        times = None if self.times is None else self.times.to(device)
        return ViewTables(self.ratio.to(device), self.weight.to(device), self.by_view, times)


def view_tables(masking: MaskingConfig, views: Views, device: torch.device) -> ViewTables:
    """What kernels look up; cached."""
    if views.pairing is Pairing.INDEPENDENT and not masking.is_quadrature:
        ratio, weight, _ = masking.tables(device)
        return ViewTables(ratio, weight, False, None)
    key = views, device
    if key not in masking.tables_of_views:
        made = _quadrature(masking, views) if masking.is_quadrature else _paired(masking, views)
        masking.tables_of_views[key] = made.to(device)
    found: ViewTables = masking.tables_of_views[key]
    return found


def _paired(masking: MaskingConfig, views: Views) -> ViewTables:
    """A pair is drawn at the ratios m and 1 - m. In the bound on the likelihood, an integral of
    1 / ratio over ratios, the second has the weight |m'| / (1 - m), of which exact draws need |m'|
    alone, too. "coupled" has the weights of DiffuCoder (arXiv:2506.20639), 1, 1 / m and
    1 / (1 - m)."""
    # At least 2**-32, so that every key is below one of the two ratios.
    ratio = masking.table.ratio.masked_fill(masking.table.ratio == 0, 1)
    drawn = masking.weight_table
    if masking.weighting == "unit" or (masking.exact and views.pairing is Pairing.COMPLEMENT):
        return ViewTables(ratio, drawn, False, None)
    share = (ratio.long() & 0xFFFFFFFF).double() / 2.0**32
    rest = (1 - share).reciprocal()
    one = torch.ones_like(share)
    if views.pairing is Pairing.COMPLEMENT:
        weights = [drawn.double(), masking.table.exact_weight * rest]
    else:
        weights = [one, one, one] if masking.exact else [one, share.reciprocal(), rest]
    return ViewTables(ratio, torch.stack(weights).float(), True, None)


def _quadrature(masking: MaskingConfig, views: Views) -> ViewTables:
    """The mean over views is Gauss-Legendre quadrature over the time range (GDPO,
    arXiv:2510.08554): exact for integrands that are polynomials of a degree up to 2 n - 1."""
    nodes, weights = np.polynomial.legendre.leggauss(views.num)
    times = torch.from_numpy(np.floor((nodes + 1) / 2 * NUM_TIMES)).long()
    shares = torch.from_numpy(weights / 2 * views.num)
    weight = (shares[:, None] * masking.weight_table).float()
    return ViewTables(masking.table.ratio, weight, True, times.clamp(0, NUM_TIMES - 1))
