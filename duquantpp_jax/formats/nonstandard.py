"""Formats for comparison that are NOT MXFP4: E2M1 elements under float32 scales.

Each class names its equation and its source. Elements are x / scale, the exact quotient rounded
once. Scales are at least 2^-126, the smallest normal float32. A block with NaN or Inf has the scale
NaN. `.scale_bytes()` raises.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float32, UInt32

from duquantpp_jax.core.arrays import Element, times_power_of_two
from duquantpp_jax.formats import scales as sc
from duquantpp_jax.formats.division import divide_by, magnitude_bits, quotient, split
from duquantpp_jax.formats.elements import E2M1, encode
from duquantpp_jax.formats.mx import BlockFormat, Blocks, Clip, Rng, Rounded


@dataclasses.dataclass(frozen=True)
class FloatScaled(BlockFormat):
    """E2M1 elements under float32 scales; a subclass computes the scale of each block."""

    element: Element = dataclasses.field(default=E2M1, init=False)

    def scales(self, blocks: Blocks, amax: UInt32[Array, "*blocks"]) -> Float32[Array, "*blocks"]:
        """Scale of each finite block, any number for a zero block; amax is times its clip."""
        raise NotImplementedError

    def round_blocks(self, blocks: Blocks, key: Rng, clip: Clip = None) -> Rounded:
        amax, bad = sc.clipped_amax(blocks, clip)
        finite = jnp.where(bad[..., None], jnp.float32(0), blocks)
        amax = jnp.where(bad, jnp.uint32(0), amax)
        scales = jnp.where(amax > 0, sc.at_least_normal(self.scales(finite, amax)), jnp.float32(1))
        q, exponent = quotient(finite, scales[..., None])
        codes = encode(q, -exponent, self.element, self.rounding, key)
        return codes, jnp.where(bad, jnp.float32(jnp.nan), scales), None


@dataclasses.dataclass(frozen=True)
class FP32Scale(FloatScaled):
    """scale = amax / 6, which the power-of-two rules approximate.

    Source: by definition.
    """

    def scales(self, blocks: Array, amax: Array) -> Float32[Array, "*blocks"]:
        return times_power_of_two(*divide_by(amax, 6))


@dataclasses.dataclass(frozen=True)
class Log256(FloatScaled):
    """The scale of the released DuQuant++ code, which its documentation calls MXFP4.

    With r = amax / 6 of each block, L0 and L1 the least and largest log2 r of the WHOLE tensor:

        i = clip(floor(255 (log2 r - L0) / (L1 - L0)), 0, 255),   scale = 2^(L0 + (L1 - L0) i / 255)

    So the result depends on every token of the batch. Two guards are not in the released code: L0
    and L1 leave out blocks that are zero or have NaN or Inf, and where L1 = L0 the scale is r.

    Source: the code released with arXiv 2604.17789.
    """

    def scales(self, blocks: Array, amax: Array) -> Float32[Array, "*blocks"]:
        positive = amax > 0
        r = times_power_of_two(*divide_by(amax, 6))
        log = jnp.log2(jnp.where(positive, sc.at_least_normal(r), 1.0))
        low = jnp.min(log, where=positive, initial=jnp.inf)
        high = jnp.max(log, where=positive, initial=-jnp.inf)
        span = jnp.where(high > low, high - low, 1.0)
        index = jnp.clip(jnp.floor(255 * (log - low) / span), 0, 255)
        index = jnp.where(log < high, index, jnp.where(high > low, 255.0, 0.0))
        return jnp.exp2(low + span * index / 255)


@dataclasses.dataclass(frozen=True)
class FPQuant(FloatScaled):
    """scale = 2^(floor(log2 amax) - 2) * 4/3, FLOOR's scale times 4/3.

    amax / scale lies in [3, 6), so that nothing saturates.

    Source: `abs_max` of FP-Quant and QuTLASS, arXiv 2509.23202.
    """

    def scales(self, blocks: Array, amax: Array) -> Float32[Array, "*blocks"]:
        exponent, _ = split(amax)
        return times_power_of_two(jnp.full(amax.shape, 4 / 3, jnp.float32), exponent - 2)


@dataclasses.dataclass(frozen=True)
class Quest(FloatScaled):
    """scale = 2^floor(log2(2.92247856 / 6 * std + 1e-8)), std of the block about its mean.

    This is the power of two below the scale of least squared error for Gaussian numbers of that
    std. The std is a float sum, so where it is next to a border the scale may differ from machine
    to machine.

    Source: `quest` of FP-Quant and QuTLASS, after arXiv 2502.05003.
    """

    def scales(self, blocks: Array, amax: Array) -> Float32[Array, "*blocks"]:
        exponent, _ = split(sc.block_amax(blocks))
        unit = times_power_of_two(blocks, -exponent[..., None])  # so that no square overflows
        mean, square = jnp.mean(unit, axis=-1), jnp.mean(jnp.square(unit), axis=-1)
        std = times_power_of_two(jnp.sqrt(jnp.maximum(square - mean * mean, 0)), exponent)
        floor, _ = split(magnitude_bits(2.92247856 / 6 * std + 1e-8))
        return times_power_of_two(jnp.ones(amax.shape, jnp.float32), floor)
