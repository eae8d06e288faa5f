"""The options of ``generate``."""

import math
from argparse import BooleanOptionalAction
from dataclasses import dataclass
from typing import Literal, get_args

from nar_kernels.checks import as_float, as_int
from nar_kernels.options import coerce_fields, option

Strategy = Literal[
    "confidence",
    "margin",
    "entropy",
    "threshold",
    "quota",
    "factor",
    "entropy_bound",
    "random",
    "halton",
    "remdm_cap",
    "remdm_rescale",
    "critic",
]
EndPolicy = Literal["allow", "last", "never"]

# Those that fill as many positions in a step as the net is sure of.
ADAPTIVE = "threshold", "quota", "factor", "entropy_bound"
# Those that mask positions again at random.
REMASKING = "remdm_cap", "remdm_rescale"
# Those that do not go with ``remask``.
NO_REMASK = "quota", *REMASKING
# Those whose order is independent of the net's predictions.
BLIND = "random", "halton", *REMASKING
# Those that go by how sure the net is of ids.
BY_CONFIDENCE = tuple(name for name in get_args(Strategy) if name not in (*BLIND, "critic"))

_COUNT = 1, (1 << 31) - 1, "in [1, 2**31)"
_SHARE = 0, 1, "in [0, 1]"
_PART = math.nextafter(0, 1), 1, "in (0, 1]"
_SCALE = 0, math.nextafter(math.inf, 0), "at least 0 and finite"
# Range of each number: minimum, maximum, and how an error message states it.
_RANGES = {
    **{"steps": _COUNT, "block_length": _COUNT, "top_k": _COUNT},
    **{"length": _COUNT, "max_new_tokens": _COUNT},
    **{"temperature": _SCALE, "choice_temperature": _SCALE, "threshold": _SHARE},
    **{"factor": _SCALE, "entropy_bound": _SCALE, "editing_threshold": _SHARE, "eta": _SHARE},
    "top_p": _PART,
    "guidance_scale": (-_SCALE[1], _SCALE[1], "finite"),
}


@dataclass(frozen=True)
class SamplingConfig:
    """Sampling options: every option of ``nar-kernels generate``.

    The defaults aim for samples as diverse as the data: no filter of tokens, positions in random
    order. (``NonAutoregressiveWrapper.generate`` has the defaults of x-transformers instead. With
    ``confidence``, images get their background first, which leaves little choice for the rest.)

    Each field's description is in ``metadata["help"]``, from which the command line is generated.

    Raises:
        TypeError: a value has the wrong type.
        ValueError: a value is out of range or contradicts another.
    """

    steps: int | None = option(
        None,
        "decoding steps, one call of the net each",
        type=int,
        otherwise="18, or one for each block; as many as it takes with threshold, quota, factor "
        "and entropy_bound",
    )
    strategy: str = option(
        "random",
        "unmasking order: highest probability of the sampled token first (confidence, "
        "arXiv:2202.04200); largest gap between the top two probabilities (margin, "
        "arXiv:2502.06768); lowest entropy (arXiv:2508.15487); all above a probability "
        "(threshold, arXiv:2505.22618), or at least an equal share of the block in each step "
        "(quota, LLaDA 2); the more at once, the surer of each (factor, arXiv:2505.22618); as long "
        "as entropies add up to little (entropy_bound, arXiv:2505.24857); random "
        "(arXiv:2406.07524); far apart on a grid (halton, arXiv:2503.17076); random, and some "
        "masked again (remdm_cap, remdm_rescale, arXiv:2503.00307); lowest score of a critic "
        "(arXiv:2209.04439)",
        choices=get_args(Strategy),
    )
    temperature: float = option(
        1.0, "sampling temperature, annealed linearly to 0 at the last step"
    )
    anneal: bool = option(
        True,
        "anneal the temperature; without, it is the same in all steps, as in ancestral sampling "
        "(MDLM) and LLaDA",
    )
    top_k: int | None = option(
        None, "sample from the k most probable tokens only", type=int, otherwise="all"
    )
    top_p: float = option(
        1.0,
        "sample from the fewest most probable tokens only whose probabilities, at the temperature "
        "of the step, add up to this (nucleus sampling, arXiv:1904.09751); 1 is all",
    )
    choice_temperature: float = option(
        0.0,
        "scale of Gumbel noise on the scores of strategy confidence, margin, entropy and critic, "
        "annealed to 0 (MaskGIT has 4.5)",
    )
    threshold: float = option(
        0.9,
        "probability at or above which strategy threshold unmasks a token at once; strategy quota, "
        "above which",
    )
    factor: float = option(
        1.0,
        "strategy factor unmasks n tokens at once if each has at least probability "
        "1 - factor / (n + 1)",
    )
    entropy_bound: float = option(
        0.1,
        "strategy entropy_bound unmasks a token at once if the entropies, in nats, of those that "
        "the net is surer of add up to no more",
    )
    editing_threshold: float | None = option(
        None,
        "replace tokens of the block that are already unmasked by what the net now holds most "
        "probable, if its probability is above this (LLaDA 2.1); for strategies that go by "
        "confidence",
        type=float,
        otherwise="they stay",
    )
    eta: float = option(
        0.02,
        "share of the unmasked tokens that a step of strategy remdm_cap masks again, at most; of "
        "remdm_rescale, a factor on the largest share that is possible",
    )
    block_length: int | None = option(
        None,
        "semi-autoregressive decoding (arXiv:2503.09573): unmask blocks of this many tokens from "
        "left to right, the steps divided among them",
        type=int,
        otherwise="one block",
    )
    cache: bool | None = option(
        None,
        "keep the keys and values of finished blocks, of a net that is trained so that a block "
        "attends to itself and those before",
        action=BooleanOptionalAction,
        otherwise="where the net is known to be such a net, and can",
    )
    remask: bool = option(False, "allow tokens that became improbable to be masked again")
    guidance_scale: float = option(
        1.0, "classifier-free guidance on the class or the prompt (arXiv:2207.12598); 1 is none"
    )
    length: int | tuple[int, ...] | None = option(
        None,
        "positions of a sequence, prompt included; in Python also one number per sequence",
        type=int,
        otherwise="all that the net has",
    )
    max_new_tokens: int | None = option(
        None,
        "positions after the prompt, instead of length; blocks begin at the end of the prompt then",
        type=int,
    )
    eos: str = option(
        "allow",
        "the token that ends an answer: drawn like any other (allow), filled last, when nothing "
        "else is left (last, for strategies that go by confidence), or not drawn (never)",
        choices=get_args(EndPolicy),
    )
    grid: tuple[int, int] | None = None  # (height, width) for halton; None for a square

    def __post_init__(self) -> None:
        coerce_fields(self)
        for name, (least, most, words) in _RANGES.items():
            field = getattr(self, name)
            for value in field if isinstance(field, tuple) else (field,):
                if value is not None and not least <= value <= most:  # also rejects NaN
                    raise ValueError(f"{name} is {value}: it must be {words}")
        if self.choice_temperature > 0 and self.strategy in (*ADAPTIVE, *BLIND):
            raise ValueError(f"choice_temperature has no meaning for strategy {self.strategy!r}")
        if self.length is not None and self.max_new_tokens is not None:
            raise ValueError(
                f"length is {self.length} and max_new_tokens is {self.max_new_tokens}: give one of "
                "them; length counts the prompt, too"
            )
        if self.eos == "last" and self.strategy not in BY_CONFIDENCE:
            raise ValueError(
                f"eos is 'last', but strategy {self.strategy!r} does not go by the confidence of "
                f"ids: use {', '.join(BY_CONFIDENCE)}, or eos='never'"
            )
        if self.editing_threshold is not None and self.strategy not in BY_CONFIDENCE:
            raise ValueError(
                f"editing_threshold is {self.editing_threshold}, but strategy {self.strategy!r} "
                f"does not go by the confidence of ids: use {', '.join(BY_CONFIDENCE)}, or leave "
                "editing_threshold out"
            )
        if self.editing_threshold is not None and self.remask:
            raise ValueError(
                f"editing_threshold is {self.editing_threshold} and remask is True: ids are either "
                "replaced or masked again, so leave one of them out"
            )
        if self.remask and self.strategy in NO_REMASK:
            instead = "threshold" if self.strategy == "quota" else "random"
            raise ValueError(
                f"remask is True, but strategy {self.strategy!r} itself says how many positions "
                "are filled or masked again: leave remask (can_mask_prev_unmasked) out, or use "
                f"{instead}"
            )
        if self.grid is not None:
            height, width = (as_int("grid", size) for size in self.grid)
            object.__setattr__(self, "grid", (height, width))

    @property
    def may_change(self) -> bool:
        """Whether a position that is filled may change before its block is done."""
        return self.remask or self.editing_threshold is not None or self.strategy in REMASKING

    def num_steps(self, seq_len: int) -> int:
        """``steps``, or the default: 18, or one for each block if that is more; ``seq_len`` for
        those of :data:`ADAPTIVE`."""
        if self.steps is not None:
            return self.steps
        if self.strategy in ADAPTIVE:
            return seq_len
        return max(18, -(-seq_len // (self.block_length or seq_len)))


def top_k_from_filter_thres(filter_thres: float | None, num_tokens: int) -> int | None:
    """``top_k`` equivalent to x-transformers' ``filter_thres``, the fraction of the vocabulary (the
    least probable ids) that is filtered out.

    Raises:
        TypeError, ValueError: ``filter_thres`` is not a number in [0, 1].
    """
    if filter_thres is None:
        return None
    share = as_float("filter_thres", filter_thres)
    if not 0 <= share <= 1:
        raise ValueError(f"filter_thres is {share}: it must be in [0, 1], or None")
    return max(math.ceil((1 - share) * num_tokens), 1)
