"""Goodness of fit with a threshold corrected for the number of tests. Seeds are fixed."""

import torch
from torch import Tensor

# Chance that a whole family of tests fails though all is well.
FAMILY_ERROR = 1e-3


def chi_square_p(counts: Tensor, expected: Tensor | None = None) -> float:
    """p-value of observed counts against expected ones (default: all equal)."""
    counts = counts.flatten().to(torch.float64)
    if expected is None:
        expected = torch.full_like(counts, counts.sum().item() / len(counts))
    assert expected.min() >= 5, "too few expected per cell for a chi-square test"
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = torch.tensor(len(counts) - 1.0, dtype=torch.float64)
    return torch.special.gammaincc(freedom / 2, statistic / 2).item()


def is_uniform(counts: Tensor, num_tests: int) -> bool:
    return len(counts.flatten()) == 1 or chi_square_p(counts) > FAMILY_ERROR / num_tests


def assert_uniform(counts: Tensor, num_tests: int) -> None:
    assert is_uniform(counts, num_tests), f"p = {chi_square_p(counts)}"


def assert_mean(sample: Tensor, mean: float, num_tests: int) -> None:
    """The sample mean lies within the corrected normal bound of ``mean``."""
    sample = sample.to(torch.float64)
    z = (sample.mean() - mean) / (sample.std() / len(sample) ** 0.5)
    p = 2 * (1 - torch.distributions.Normal(0, 1).cdf(z.abs())).item()
    assert p > FAMILY_ERROR / num_tests, f"mean {sample.mean().item()}, expected {mean}, p = {p}"


def same_law_p(one: Tensor, other: Tensor) -> float:
    """p-value of two samples of one law, from how often each has been in each cell. Cells with few
    of both count as one."""
    counts = torch.stack([one.flatten(), other.flatten()]).to(torch.float64)
    is_rare = counts.sum(0) < 20
    counts = torch.cat([counts[:, ~is_rare], counts[:, is_rare].sum(1, keepdim=True)], 1)
    counts = counts[:, counts.sum(0) > 0]
    expected = counts.sum(1, keepdim=True) * counts.sum(0) / counts.sum()
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = torch.tensor(counts.shape[1] - 1.0, dtype=torch.float64)
    return torch.special.gammaincc(freedom / 2, statistic / 2).item()


def assert_same_law(one: Tensor, other: Tensor, num_tests: int) -> None:
    p = same_law_p(one, other)
    assert p > FAMILY_ERROR / num_tests, f"p = {p}"
