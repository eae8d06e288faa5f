"""The options of ``generate``."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from nar_kernels.checks import as_float, as_int
from nar_kernels.options import coerce_fields, option

Strategy = Literal["confidence", "margin", "entropy", "threshold", "random", "halton", "critic"]

_COUNT = 1, (1 << 31) - 1, "in [1, 2**31)"
_SHARE = 0, 1, "in [0, 1]"
_SCALE = 0, math.nextafter(math.inf, 0), "at least 0 and finite"
# Of each number: the least, the largest, and both in words.
_RANGES = {
    **{"steps": _COUNT, "block_length": _COUNT, "top_k": _COUNT},
    **{"temperature": _SCALE, "choice_temperature": _SCALE, "threshold": _SHARE},
    "guidance_scale": (-_SCALE[1], _SCALE[1], "finite"),
}


@dataclass(frozen=True)
class SamplingConfig:
    """How sequences are sampled: every option of ``nar-kernels generate``.

    The defaults give samples as varied as the data: any id may be drawn, in random order. (The
    arguments of ``NonAutoregressiveWrapper.generate`` have those of x-transformers. ``confidence``
    fills the background of an image first, which leaves little choice for the rest.)

    Each field carries its description as ``metadata["help"]``; the command line is made from it.

    Raises:
        TypeError: a value is not of the field's type.
        ValueError: a value is out of range, or contradicts another.
    """

    steps: int | None = option(
        None,
        "calls of the net",
        type=int,
        otherwise="18; as many as it takes with threshold",
    )
    strategy: str = option(
        "random",
        "which tokens are unmasked first: where the drawn one is most probable (confidence, "
        "arXiv:2202.04200); where the two most probable are furthest apart (margin, "
        "arXiv:2502.06768); where entropy is lowest (arXiv:2508.15487); all above a probability "
        "(threshold, arXiv:2505.22618); any (random, arXiv:2406.07524); far apart on a grid "
        "(halton, arXiv:2503.17076); where a critic finds the least wrong (arXiv:2209.04439)",
        choices=get_args(Strategy),
    )
    temperature: float = option(1.0, "of the drawn tokens at the first step, falling to 0")
    top_k: int | None = option(
        None, "draw among the k most probable tokens only", type=int, otherwise="all"
    )
    choice_temperature: float = option(
        0.0,
        "Gumbel noise on what strategy confidence, margin, entropy and critic say, falling to 0 "
        "(MaskGIT has 4.5)",
    )
    threshold: float = option(
        0.9, "probability from which strategy threshold unmasks a token at once"
    )
    block_length: int | None = option(
        None,
        "unmask blocks of so many tokens from left to right, the steps divided among them "
        "(semi-autoregressive, arXiv:2503.09573)",
        type=int,
        otherwise="one block",
    )
    remask: bool = option(False, "tokens that became improbable may be masked again")
    guidance_scale: float = option(
        1.0, "classifier-free guidance by the prompt (arXiv:2207.12598); 1 is none"
    )
    grid: tuple[int, int] | None = None  # (height, width) for halton; None for a square

    def __post_init__(self) -> None:
        coerce_fields(self)
        for name, (least, most, words) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:  # nor NaN
                raise ValueError(f"{name} is {value}: it must be {words}")
        if self.choice_temperature > 0 and self.strategy in ("threshold", "random", "halton"):
            raise ValueError(f"choice_temperature has no meaning for strategy {self.strategy!r}")
        if self.grid is not None:
            height, width = (as_int("grid", size) for size in self.grid)
            object.__setattr__(self, "grid", (height, width))

    def num_steps(self, seq_len: int) -> int:
        """``steps``, or what they are by default."""
        if self.steps is not None:
            return self.steps
        return seq_len if self.strategy == "threshold" else 18


def top_k_of(filter_thres: float | None, num_tokens: int) -> int | None:
    """``top_k`` for x-transformers' ``filter_thres``, the share of the vocabulary that is never
    drawn: the least probable ids.

    Raises:
        TypeError, ValueError: it is no share.
    """
    if filter_thres is None:
        return None
    share = as_float("filter_thres", filter_thres)
    if not 0 <= share <= 1:
        raise ValueError(f"filter_thres is {share}: it must be in [0, 1], or None")
    return max(math.ceil((1 - share) * num_tokens), 1)
