"""Microscaling in exact rational arithmetic, written from the definitions and slow on purpose.

Nothing here is shared with the package: elements are tables of fractions, logarithms are found by
comparing, rounding by measuring distances.
"""

import bisect
import functools
import math
from fractions import Fraction

import ml_dtypes
import numpy as np

from duquantpp_jax.core import ElementRounding, ScaleRule
from duquantpp_jax.formats import E2M1, E2M3, E3M2, E4M3, E5M2

ELEMENTS = (E2M1, E2M3, E3M2, E4M3, E5M2)
DTYPES = {
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
}
MAXIMA = {"e2m1": 6, "e2m3": 7.5, "e3m2": 28, "e4m3": 448, "e5m2": 57344}
DETERMINISTIC = tuple(r for r in ElementRounding if r is not ElementRounding.STOCHASTIC)
AMAX_RULES = (ScaleRule.FLOOR, ScaleRule.CEIL, ScaleRule.EVEN, ScaleRule.RCEIL)


@functools.cache
def magnitudes(name: str) -> tuple[Fraction, ...]:
    """Finite magnitudes of an element in the order of their codes, as ml_dtypes reads them."""
    bits = ml_dtypes.finfo(DTYPES[name]).bits
    codes = np.arange(1 << (bits - 1), dtype=np.uint8).view(DTYPES[name]).astype(np.float64)
    finite = [Fraction(v) for v in codes if math.isfinite(v)]
    assert finite == sorted(finite)
    assert finite[-1] == MAXIMA[name]
    return tuple(finite)


def round_magnitude(x: Fraction, name: str, rounding: ElementRounding) -> int:
    """Code of the magnitude x, rounded and saturated."""
    table = magnitudes(name)
    if x >= table[-1]:
        return len(table) - 1
    above = bisect.bisect_right(table, x)
    below = above - 1
    down, up = x - table[below], table[above] - x
    if rounding is ElementRounding.TOWARD_ZERO or down < up:
        return below
    if up < down or rounding is ElementRounding.AWAY:
        return above
    return below if below % 2 == 0 else above


def code(x: float, scale: Fraction, name: str, rounding=ElementRounding.NEAREST_EVEN) -> int:
    """Code of x / scale."""
    sign_bit = 1 << (ml_dtypes.finfo(DTYPES[name]).bits - 1)
    magnitude = round_magnitude(abs(Fraction(float(x))) / scale, name, rounding)
    return magnitude + (sign_bit if math.copysign(1, x) < 0 else 0)


def value(code: int, name: str) -> Fraction:
    """What a code stands for."""
    half = 1 << (ml_dtypes.finfo(DTYPES[name]).bits - 1)
    magnitude = magnitudes(name)[code % half]
    return -magnitude if code >= half else magnitude


def power(exponent: int) -> Fraction:
    return Fraction(2) ** exponent


def floor_log2(x: Fraction) -> int:
    exponent = x.numerator.bit_length() - x.denominator.bit_length()
    return exponent if power(exponent) <= x else exponent - 1


def ceil_log2(x: Fraction) -> int:
    return -floor_log2(1 / x)


def scale_exponent(amax: Fraction, rule: ScaleRule, name: str) -> int:
    """E of a block whose largest magnitude is amax > 0, clamped to what E8M0 has."""
    largest = magnitudes(name)[-1]
    emax = floor_log2(largest)
    match rule:
        case ScaleRule.FLOOR:
            exponent = floor_log2(amax) - emax
        case ScaleRule.CEIL:
            exponent = ceil_log2(amax) - emax
        case ScaleRule.EVEN:
            mantissa_bits = {"e2m1": 1, "e2m3": 3, "e3m2": 2, "e4m3": 3, "e5m2": 2}[name]
            quantum = power(floor_log2(amax) - mantissa_bits)
            rounded = math.floor(amax / quantum + Fraction(1, 2)) * quantum
            exponent = floor_log2(rounded) - emax
        case ScaleRule.RCEIL:
            exponent = ceil_log2(amax / largest)
        case _:
            raise NotImplementedError(rule)
    return min(max(exponent, -127), 127)


def quantize_block(
    block, rule: ScaleRule, name: str, rounding=ElementRounding.NEAREST_EVEN
) -> tuple[int, list[int]]:
    """Scale byte and codes of one block."""
    if not all(math.isfinite(x) for x in block):
        return 255, [0] * len(block)
    amax = max(abs(Fraction(float(x))) for x in block)
    exponent = -127 if amax == 0 else scale_exponent(amax, rule, name)
    return exponent + 127, [code(x, power(exponent), name, rounding) for x in block]


def block_error(block, exponent: int, name: str) -> Fraction:
    """Squared error of a block of finite numbers under the scale 2^exponent."""
    scale = power(exponent)
    rounded = [value(code(x, scale, name), name) * scale for x in block]
    return sum((Fraction(float(x)) - h) ** 2 for x, h in zip(block, rounded, strict=True))


def codes_float64(x, name: str, rounding=ElementRounding.NEAREST_EVEN) -> np.ndarray:
    """Codes of many numbers at once: float64 holds them and all borders exactly, and no operation
    but comparisons is done with them."""
    table = np.array([float(v) for v in magnitudes(name)])
    middle = (table[1:] + table[:-1]) / 2
    x = np.asarray(x, np.float64)
    if rounding is ElementRounding.TOWARD_ZERO:
        magnitude = np.searchsorted(table[1:], np.abs(x), side="right")
    else:
        low = np.searchsorted(middle, np.abs(x), side="left")  # ties to the lower
        high = np.searchsorted(middle, np.abs(x), side="right")  # ties to the upper
        to_upper = (rounding is ElementRounding.AWAY) | (high % 2 == 0)
        magnitude = np.where(to_upper, high, low)
    sign_bit = 1 << (ml_dtypes.finfo(DTYPES[name]).bits - 1)
    return np.where(np.signbit(x), magnitude + sign_bit, magnitude).astype(np.uint8)


def float32(bits) -> np.ndarray:
    """float32 numbers from their bit patterns."""
    return np.asarray(bits, np.uint32).view(np.float32)


def telling_magnitudes(name: str) -> np.ndarray:
    """Positive float32 numbers: at every exponent, subnormals included, the borders of every rule
    and their neighbours."""
    mantissa_bits = {"e2m1": 1, "e2m3": 3, "e3m2": 2, "e4m3": 3, "e5m2": 2}[name]
    base, ulp = 1 << 23, 1 << (23 - mantissa_bits)
    largest = int(MAXIMA[name] / 2 ** floor_log2(Fraction(MAXIMA[name])) * base)
    top = 2 * base
    borders = [base, largest, top - ulp // 2, base + ulp // 2, base + base // 2, top - ulp]
    near = sorted({b + d for b in borders for d in (-2, -1, 0, 1, 2)} | {top - 1})
    significands = [s for s in near if base <= s < top]
    normal = [(e << 23) + s - base for e in range(1, 255) for s in significands]
    subnormal = [s >> k for s in significands for k in range(1, 24)]
    return float32(sorted({b for b in normal + subnormal if b}))
