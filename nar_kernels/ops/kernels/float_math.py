"""Bit-reproducible float32 exp, log and Gumbel noise: those of ``nar_kernels/spec/float_math.py``.

Kernels that call them are compiled with ``enable_fp_fusion=False``: nothing may be fused, or taken
from a library of the device.
"""

import triton
import triton.language as tl

_LN2_HIGH = tl.constexpr(0.693359375)  # ln 2 in two parts
_LN2_LOW = tl.constexpr(-2.12194440e-4)


@triton.jit
def exp_of_negative(x):
    shifted = x * 1.44269504 + 12582912.0  # 1.5 * 2**23: leaves the integer in the low bits
    n = shifted - 12582912.0
    r = x - n * _LN2_HIGH - n * _LN2_LOW
    p = r * 1.9875691500e-4 + 1.3981999507e-3
    p = (p * r + 8.3334519073e-3) * r + 4.1665795894e-2
    p = (p * r + 1.6666665459e-1) * r + 5.0000001201e-1
    p = p * (r * r) + r + 1.0
    power = (shifted.to(tl.int32, bitcast=True) << 23) + 0x3F800000
    return tl.where(x < -87.0, 0.0, p * power.to(tl.float32, bitcast=True))


@triton.jit
def log_of_parts(exponent, f):
    y = (f * 7.0376836292e-2 - 1.1514610310e-1) * f + 1.1676998740e-1
    y = (y * f - 1.2420140846e-1) * f + 1.4249322787e-1
    y = (y * f - 1.6668057665e-1) * f + 2.0000714765e-1
    y = (y * f - 2.4999993993e-1) * f + 3.3333331174e-1
    y = y * f * (f * f) + exponent * _LN2_LOW - 0.5 * (f * f)
    return f + y + exponent * _LN2_HIGH


@triton.jit
def _parts(x):
    """A positive x as 2**exponent * (1 + f), for ``log_of_parts``."""
    bits = x.to(tl.int32, bitcast=True)
    mantissa = ((bits & 0x7FFFFF) | 0x3F000000).to(tl.float32, bitcast=True)
    is_low = mantissa < 0.707106781
    exponent = ((bits >> 23) - 126 - is_low.to(tl.int32)).to(tl.float32)
    return exponent, tl.where(is_low, mantissa + mantissa, mantissa) - 1.0


@triton.jit
def log_of_positive(x):
    exponent, f = _parts(x)
    return log_of_parts(exponent, f)


@triton.jit
def gumbel(words):
    u = ((words & 0x3FFFFFFF).to(tl.float32) + 0.5) * 2.3283064365386963e-10  # 2**-32
    rest = (((words ^ 0xFFFFFFFF) >> 1).to(tl.float32) + 0.5) * 4.656612873077393e-10  # 2**-31
    exponent, f = _parts(rest)
    is_small = words < 1 << 30
    log = log_of_parts(tl.where(is_small, 0.0, exponent), tl.where(is_small, -u, f))
    return -log_of_positive(-log)
