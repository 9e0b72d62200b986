"""Formats with E2M1 elements whose scale is NOT a power of two: for comparison, and not MXFP4.

    FP32     scale = amax / 6, a float32 number
    LOG256   scale on a grid of 256 steps, even in log2, over the whole tensor

Both keep float32 scales, so `.scale_bytes()` raises.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from duquantpp_jax.core import Element, Format, MXArray
from duquantpp_jax.formats import scales as sc
from duquantpp_jax.formats.elements import E2M1, encode
from duquantpp_jax.formats.mx import to_blocks


@dataclasses.dataclass(frozen=True)
class FloatScaled(Format):
    """E2M1 elements under float32 scales; a subclass says how scales follow from amax."""

    element: Element = E2M1
    block_size: int = 32

    def scales(self, amax: Float32[Array, "*blocks"]) -> Float32[Array, "*blocks"]:
        """Scale of each block; a zero block may have any positive one."""
        raise NotImplementedError

    def quantize(self, x: Array, *, clip: Array | None = None, **unused: Any) -> MXArray:
        """See `Format.quantize`; elements are round(x / scale), nearest-even, saturated."""
        given = [name for name, value in unused.items() if value is not None]
        if given:
            raise ValueError(f"{type(self).__name__} has no use for {', '.join(given)}")
        return _quantize(to_blocks(x, self.block_size), clip, format=self)


@dataclasses.dataclass(frozen=True)
class FP32Scale(FloatScaled):
    """scale = amax / 6: the continuous scale that power-of-two rules are coarse versions of."""

    def scales(self, amax: Float32[Array, "*blocks"]) -> Float32[Array, "*blocks"]:
        return jnp.where(amax > 0, amax / self.element.max, 1.0)


@dataclasses.dataclass(frozen=True)
class Log256(FloatScaled):
    """The scale of the released DuQuant++ code, which its documentation calls MXFP4.

    With r = amax / 6 of each block, L0 and L1 the least and largest log2 r of the WHOLE tensor:

        i = clip(floor(255 (log2 r - L0) / (L1 - L0)), 0, 255),   scale = 2^(L0 + (L1 - L0) i / 255)

    So the result depends on every token of the call, and a batch is part of its definition. Two
    guards that the released code lacks: zero blocks take no part in L0 and L1 (and quantize to
    zeros), and L1 = L0 gives scale = r rather than a division by zero.

    Source: the code released with arXiv 2604.17789.
    """

    def scales(self, amax: Float32[Array, "*blocks"]) -> Float32[Array, "*blocks"]:
        positive = amax > 0
        log = jnp.log2(jnp.where(positive, amax / self.element.max, 1.0))
        low = jnp.min(log, where=positive, initial=jnp.inf)
        high = jnp.max(log, where=positive, initial=-jnp.inf)
        span = high - low
        step = jnp.where(span > 0, span / 255, 1.0)
        index = jnp.clip(jnp.floor((log - low) / step), 0, 255)
        index = jnp.where(span > 0, index, 0.0)
        return jnp.where(positive, jnp.exp2(low + step * index), 1.0)


@functools.partial(jax.jit, static_argnames="format")
def _quantize(blocks: Array, clip: Any, *, format: FloatScaled) -> MXArray:
    bits = sc.block_amax(blocks)
    bad = bits >= sc.INFINITY_BITS
    amax = jax.lax.bitcast_convert_type(jnp.where(bad, jnp.uint32(0), bits), jnp.float32)
    if clip is not None:
        amax = amax * clip
    scales = format.scales(amax)
    scaled = blocks / scales[..., None]
    codes = encode(scaled, jnp.zeros_like(scaled, jnp.int32), format.element)
    codes = jnp.where(bad[..., None], jnp.uint8(0), codes)
    return MXArray(
        elements=format.element.store(codes.reshape(*blocks.shape[:-2], -1)),
        scales=jnp.where(bad, jnp.float32(jnp.nan), scales),
        element=format.element,
        block_size=format.block_size,
    )
