"""All strategies of `generate` that need no grid and no critic, with what each can be joined to."""

from typing import get_args

from nar_kernels.sampling.config import BY_CONFIDENCE, NO_REMASK, Strategy

STRATEGIES: list[Strategy] = [
    name for name in get_args(Strategy) if name not in ("halton", "critic")
]
# Options that make them differ: the default is sure of next to nothing here.
OPTIONS = {
    "threshold": {"threshold": 0.4},
    "quota": {"threshold": 0.4},
    "factor": {"factor": 2.0},
    "entropy_bound": {"entropy_bound": 1.5},
    "remdm_cap": {"eta": 0.4},
    "remdm_rescale": {"eta": 0.8},
}
# Those of one strategy each.
PLAIN = [{"strategy": name, **OPTIONS.get(name, {})} for name in STRATEGIES]
MODES = [
    *PLAIN,
    *(
        {**mode, "can_mask_prev_unmasked": True}
        for mode in PLAIN
        if mode["strategy"] not in NO_REMASK
    ),
    *({**mode, "editing_threshold": 0.3} for mode in PLAIN if mode["strategy"] in BY_CONFIDENCE),
]
