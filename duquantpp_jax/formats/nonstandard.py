"""Formats with E2M1 elements that are NOT MXFP4, for comparison: their scales are float32 numbers.

    FP32Scale   scale = amax / 6
    Log256      scale on a grid of 256 steps, even in log2, over the whole tensor
    FPQuant     scale = 2^(floor(log2 amax) - 2) * 4/3
    Quest       scale = 2^floor(log2(2.92247856 / 6 * std + 1e-8))

Elements are x / scale, the exact quotient rounded once. Scales are at least 2^-126, the smallest
normal float32; a block with NaN or Inf has the scale NaN; `.scale_bytes()` raises.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Key, UInt32

from duquantpp_jax.core import (
    Element,
    ElementRounding,
    ElementRoundingField,
    Format,
    MXArray,
    choice,
    times_power_of_two,
)
from duquantpp_jax.formats import scales as sc
from duquantpp_jax.formats.division import divide_by, magnitude_bits, quotient, split
from duquantpp_jax.formats.elements import E2M1, encode
from duquantpp_jax.formats.mx import check_key, from_blocks, to_blocks


@dataclasses.dataclass(frozen=True)
class FloatScaled(Format):
    """E2M1 elements under float32 scales; a subclass says how scales follow from the block."""

    _: dataclasses.KW_ONLY
    block_size: int = 32
    rounding: ElementRoundingField = ElementRounding.NEAREST_EVEN
    element: Element = dataclasses.field(default=E2M1, init=False)

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ValueError(f"a block of {self.block_size} elements: give at least 1")
        object.__setattr__(self, "rounding", choice(ElementRounding, self.rounding))

    def scales(
        self, blocks: Float32[Array, "*blocks size"], amax: UInt32[Array, "*blocks"]
    ) -> Float32[Array, "*blocks"]:
        """Scale of each block; what it gives for a zero block does not matter.

        Args:
          blocks: Finite numbers.
          amax: Bits of the largest magnitude of each block, times its clip.
        """
        raise NotImplementedError

    def encode(
        self,
        x: Array | np.ndarray,
        *,
        key: Key[Array, ""] | None = None,
        clip: Array | None = None,
        **unused: Any,
    ) -> MXArray:
        """See `Format.quantize`."""
        given = [name for name, value in unused.items() if value is not None]
        if given:
            raise ValueError(f"{type(self).__name__} has no use for {', '.join(given)}")
        check_key(key, self.rounding)
        return _encode(to_blocks(x, self.block_size), key, clip, format=self)


@dataclasses.dataclass(frozen=True)
class FP32Scale(FloatScaled):
    """scale = amax / 6: the continuous scale that power-of-two rules are coarse versions of."""

    def scales(self, blocks: Array, amax: Array) -> Float32[Array, "*blocks"]:
        return times_power_of_two(*divide_by(amax, 6))


@dataclasses.dataclass(frozen=True)
class Log256(FloatScaled):
    """The scale of the released DuQuant++ code, which its documentation calls MXFP4.

    With r = amax / 6 of each block, L0 and L1 the least and largest log2 r of the WHOLE tensor:

        i = clip(floor(255 (log2 r - L0) / (L1 - L0)), 0, 255),   scale = 2^(L0 + (L1 - L0) i / 255)

    So the result depends on every token of the call, and a batch is part of its definition. Two
    guards that the released code lacks: zero blocks (and those with NaN or Inf) take no part in L0
    and L1, and L1 = L0 gives scale = r rather than a division by zero.

    Source: the code released with arXiv 2604.17789.
    """

    def scales(self, blocks: Array, amax: Array) -> Float32[Array, "*blocks"]:
        positive = amax > 0
        r = times_power_of_two(*divide_by(amax, 6))
        log = jnp.log2(jnp.where(positive, at_least_normal(r), 1.0))
        low = jnp.min(log, where=positive, initial=jnp.inf)
        high = jnp.max(log, where=positive, initial=-jnp.inf)
        span = jnp.where(high > low, high - low, 1.0)
        index = jnp.clip(jnp.floor(255 * (log - low) / span), 0, 255)
        index = jnp.where(log < high, index, jnp.where(high > low, 255.0, 0.0))
        return jnp.exp2(low + span * index / 255)


@dataclasses.dataclass(frozen=True)
class FPQuant(FloatScaled):
    """scale = 2^(floor(log2 amax) - 2) * 4/3: FLOOR's scale times 4/3, so that amax / scale lies
    in [3, 6) and nothing saturates.

    Source: `abs_max` of FP-Quant and QuTLASS, arXiv 2509.23202.
    """

    def scales(self, blocks: Array, amax: Array) -> Float32[Array, "*blocks"]:
        exponent, _ = split(amax)
        return times_power_of_two(jnp.full(amax.shape, 4 / 3, jnp.float32), exponent - 2)


@dataclasses.dataclass(frozen=True)
class Quest(FloatScaled):
    """scale = 2^floor(log2(2.92247856 / 6 * std + 1e-8)), std of the block about its mean: the
    power of two below the scale of least squared error for Gaussian numbers of that std.

    Float sums decide between two powers of two where std is next to the border, so unlike the rest
    this one may differ from machine to machine there.

    Source: `quest` of FP-Quant and QuTLASS, after arXiv 2502.05003.
    """

    def scales(self, blocks: Array, amax: Array) -> Float32[Array, "*blocks"]:
        exponent, _ = split(sc.block_amax(blocks))
        unit = times_power_of_two(blocks, -exponent[..., None])  # so that no square overflows
        mean, square = jnp.mean(unit, axis=-1), jnp.mean(jnp.square(unit), axis=-1)
        std = times_power_of_two(jnp.sqrt(jnp.maximum(square - mean * mean, 0)), exponent)
        floor, _ = split(magnitude_bits(2.92247856 / 6 * std + 1e-8))
        return times_power_of_two(jnp.ones(amax.shape, jnp.float32), floor)


def at_least_normal(scales: Float32[Array, "*blocks"]) -> Float32[Array, "*blocks"]:
    """Scales, none below 2^-126: smaller ones would be flushed to zero."""
    bits = jnp.maximum(magnitude_bits(scales), 0x00800000)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


@functools.partial(jax.jit, static_argnames="format")
def _encode(
    blocks: Float32[Array, "*blocks size"],
    key: Array | None,
    clip: Array | None,
    *,
    format: FloatScaled,
) -> MXArray:
    amax = sc.block_amax(blocks)
    bad = amax >= sc.INFINITY_BITS
    if clip is not None:
        amax = sc.clipped(amax, clip)
        bad = bad | (amax >= sc.INFINITY_BITS)
    finite = jnp.where(bad[..., None], jnp.float32(0), blocks)
    amax = jnp.where(bad, jnp.uint32(0), amax)
    scales = format.scales(finite, amax)
    scales = jnp.where(amax > 0, at_least_normal(scales), jnp.float32(1))
    q, exponent = quotient(finite, scales[..., None])
    codes = encode(q, -exponent, format.element, format.rounding, key)
    return MXArray(
        elements=from_blocks(codes),
        scales=jnp.where(bad, jnp.float32(jnp.nan), scales),
        element=format.element,
        block_size=format.block_size,
    )
