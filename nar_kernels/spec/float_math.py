"""Bit-reproducible float32 exp and log: the same rounding on every device and backend.

PyTorch's own differ by a bit between devices, which is enough to sample a different token. These
are plain multiplications and additions in a fixed order, without FMA: the same as in
csrc/runtime/float_math.h. The polynomials are those of Cephes (Moshier), accurate to 2 ulp.
"""

import torch
from torch import Tensor

_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4  # ln 2 split (Cody-Waite)
_EXP = (
    *(1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3),
    *(4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1),
)
_LOG = (
    *(7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1),
    *(-1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1),
    *(2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1),
)


def _polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    y = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        y = y * x + coefficient
    return y


def exp_of_negative(x: Tensor) -> Tensor:
    """exp(x) for float32 x <= 0; 0 below -87, near the smallest normal float32."""
    shifted = x * 1.44269504 + 12582912.0  # 1.5 * 2**23: rounds; the integer is in the low bits
    n = shifted - 12582912.0
    r = x - n * _LN2_HIGH - n * _LN2_LOW
    p = _polynomial(_EXP, r) * (r * r) + r + 1.0
    power = (shifted.view(torch.int32) << 23) + 0x3F800000
    return torch.where(x < -87.0, 0.0, p * power.view(torch.float32))


def log_of_parts(exponent: Tensor, f: Tensor) -> Tensor:
    """log(2**exponent * (1 + f)) for f in [sqrt(1/2) - 1, sqrt(2) - 1]; both float32."""
    y = _polynomial(_LOG, f)
    y = y * f * (f * f) + exponent * _LN2_LOW - 0.5 * (f * f)
    return f + y + exponent * _LN2_HIGH


def log_of_positive(x: Tensor) -> Tensor:
    """log(x) of float32 x > 0 that are not subnormal."""
    bits = x.view(torch.int32)
    mantissa = ((bits & 0x7FFFFF) | 0x3F000000).view(torch.float32)  # in [1/2, 1)
    is_low = mantissa < 0.707106781
    exponent = ((bits >> 23) - 126 - is_low.to(torch.int32)).to(torch.float32)
    return log_of_parts(exponent, torch.where(is_low, mantissa + mantissa, mantissa) - 1.0)


def gumbel(words: Tensor) -> Tensor:
    """Standard Gumbel noise, float32 in [-3.1, 22.9], from random words: int64 in [0, 2**32).

    -log(-log(1 - u)) with u = (word + 1/2) / 2**32. Small words give the largest noise, which
    decides which token wins: they keep full precision, so that improbable tokens are sampled at
    the right rate. Words from 2**30 on are rounded to 31 bits.
    """
    u = ((words & 0x3FFFFFFF).to(torch.float32) + 0.5) * 2**-32
    rest = (((0xFFFFFFFF - words) >> 1).to(torch.float32) + 0.5) * 2**-31
    of_small = log_of_parts(torch.zeros_like(u), -u)  # 1 - u would lose bits of u
    return -log_of_positive(-torch.where(words < 1 << 30, of_small, log_of_positive(rest)))
