"""The options of sampling, and the policy they select."""

import dataclasses
import math
from typing import get_args

import numpy as np
import pytest
import torch

from nar_kernels.sampling import config as config_module
from nar_kernels.sampling.config import SamplingConfig, top_k_from_filter_thres
from nar_kernels.sampling.strategies import make_policy

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "best"}, "strategy is 'best': it must be one of confidence, margin"),
        ({"strategy": "confidence", "choice_temperature": -1.0}, "choice_temperature is -1.0"),
        ({"strategy": "confidence", "choice_temperature": math.nan}, "choice_temperature is nan"),
        ({"choice_temperature": 1.0}, "choice_temperature has no meaning for strategy 'random'"),
        ({"threshold": 1.5}, r"threshold is 1.5: it must be in \[0, 1\]"),
        ({"steps": 0}, r"steps is 0: it must be in \[1, 2\*\*31\)"),
        ({"block_length": -1}, "block_length is -1"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, r"top_p is 0.0: it must be in \(0, 1\]"),
        ({"top_p": 1.01}, "top_p is 1.01"),
        ({"top_p": math.nan}, "top_p is nan"),
        ({"temperature": math.inf}, "temperature is inf: it must be at least 0 and finite"),
        ({"guidance_scale": math.nan}, "guidance_scale is nan: it must be finite"),
        ({"length": 0}, r"length is 0: it must be in \[1, 2\*\*31\)"),
        ({"length": (3, 0)}, r"length is 0: it must be in \[1, 2\*\*31\)"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"length": 3, "max_new_tokens": 2}, "length is 3 and max_new_tokens is 2: give one"),
        ({"eos": "first"}, "eos is 'first': it must be one of allow, last, never"),
        ({"eos": "last"}, "eos is 'last', but strategy 'random' does not go by the confidence"),
        (
            {"eos": "last", "strategy": "remdm_cap"},
            "use confidence, margin, entropy, threshold, quota, factor, entropy_bound, or eos=",
        ),
        ({"factor": -0.1}, "factor is -0.1: it must be at least 0 and finite"),
        ({"entropy_bound": math.inf}, "entropy_bound is inf: it must be at least 0 and finite"),
        ({"eta": 1.5}, r"eta is 1.5: it must be in \[0, 1\]"),
        ({"editing_threshold": -0.5}, r"editing_threshold is -0.5: it must be in \[0, 1\]"),
        (
            {"editing_threshold": 0.5, "strategy": "random"},
            "editing_threshold is 0.5, but strategy 'random' does not go by the confidence of ids: "
            "use confidence, .*, entropy_bound, or leave editing_threshold out",
        ),
        (
            {"editing_threshold": 0.5, "strategy": "threshold", "remask": True},
            "editing_threshold is 0.5 and remask is True: .* leave one of them out",
        ),
        (
            {"remask": True, "strategy": "quota"},
            "remask is True, but strategy 'quota' itself says .*: leave remask .* out, or use "
            "threshold",
        ),
        (
            {"remask": True, "strategy": "remdm_rescale"},
            "strategy 'remdm_rescale' itself .* masked again: leave remask .* out, or use random",
        ),
        (
            {"choice_temperature": 1.0, "strategy": "entropy_bound"},
            "choice_temperature has no meaning for strategy 'entropy_bound'",
        ),
    ],
)
def test_values_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**options)


@pytest.mark.parametrize(
    "options",
    [{"steps": 2.5}, {"temperature": "hot"}, {"remask": 1}, {"grid": (2, 1.5)}, {"strategy": 3}],
)
def test_values_of_another_type(options):
    (name,) = options
    with pytest.raises(TypeError, match=f"{name} is "):
        SamplingConfig(**options)


def test_every_number_has_a_range():
    numbers = {
        f.name
        for f in dataclasses.fields(SamplingConfig)
        if {int, float} & {f.type, *get_args(f.type)}
    }
    assert numbers == set(config_module._RANGES)


def test_numbers_of_other_libraries_become_plain():
    config = SamplingConfig(
        steps=np.int64(3),
        temperature=torch.tensor(0.5),
        threshold=np.float32(0.25),
        guidance_scale=-2,
        length=np.array([3, 4], np.uint8),
        grid=(np.int32(2), torch.tensor(3)),
    )
    expected = {"steps": 3, "temperature": 0.5, "threshold": 0.25, "guidance_scale": -2.0}
    for name, value in expected.items():
        assert getattr(config, name) == value and type(getattr(config, name)) is type(value)
    assert config.grid == (2, 3) and config.length == (3, 4)
    assert SamplingConfig(length=torch.tensor(5)).length == 5
    assert dataclasses.replace(config, steps=None).num_steps(7) == 18
    for strategy in ("threshold", "quota", "factor", "entropy_bound"):
        assert SamplingConfig(strategy=strategy).num_steps(7) == 7


def test_filter_thres_is_a_share_of_the_vocabulary():
    assert [top_k_from_filter_thres(x, 10) for x in (None, 0, 0.7, 0.95, 1)] == [None, 10, 4, 1, 1]
    with pytest.raises(ValueError, match="filter_thres is 1.5"):
        top_k_from_filter_thres(1.5, 10)


def test_a_strategy_needs_what_it_goes_by():
    with pytest.raises(ValueError, match="strategy 'critic' needs a token_critic"):
        make_policy(SamplingConfig(strategy="critic"), 4, CPU, None)
    with pytest.raises(ValueError, match="grid is 3 x 2: strategy 'halton' needs"):
        make_policy(SamplingConfig(strategy="halton", grid=(3, 2)), 5, CPU, None)
    order = make_policy(SamplingConfig(strategy="halton"), 4, CPU, None).order
    assert sorted(order.tolist()) == [0, 1, 2, 3]
