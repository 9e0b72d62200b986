"""The MX formats: an element type, a block size and a power-of-two scale chosen by a rule.

    amax_b = max |x_b|,  E_b = rule(amax_b),  element_i = round(x_i / 2^E_b),  x_i ~ element_i 2^E_b

Where the specification leaves room: NaN or Inf anywhere in a block gives scale byte 255, and the
whole block dequantizes to NaN; an all-zero block has byte 0 and zero codes; signed zeros and
negative underflow keep their sign; subnormals are exact.

Source: OCP MX v1.0, section 6.3; Rouhani et al., arXiv 2310.10537, Algorithm 1.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from duquantpp_jax.core import Element, Format, MXArray, ScaleRule
from duquantpp_jax.formats import scales as sc
from duquantpp_jax.formats.elements import E2M1, encode

FLOAT_TYPES = ("float32", "bfloat16", "float16")


def to_blocks(x: Array, block_size: int) -> Array:
    """x in float32 (exact), its last axis split into blocks.

    Raises:
      ValueError: As `Format.quantize` says.
    """
    dtype = getattr(x, "dtype", type(x).__name__)
    if str(dtype) not in FLOAT_TYPES:
        raise ValueError(
            f"cannot quantize {dtype}: give one of {', '.join(FLOAT_TYPES)} "
            "(a cast from float64 is yours to make: it rounds once more)"
        )
    if x.ndim == 0:
        raise ValueError("cannot quantize a single number: give an array with at least one axis")
    width = x.shape[-1]
    if width % block_size:
        raise ValueError(
            f"a width of {width} is not a multiple of block {block_size}: "
            f"pad to {-(-width // block_size) * block_size} or choose another block"
        )
    blocks = (*x.shape[:-1], width // block_size, block_size)
    return jnp.asarray(x).astype(jnp.float32).reshape(blocks)


@dataclasses.dataclass(frozen=True)
class MX(Format):
    """A microscaling format.

    Attributes:
      element: The element type.
      block_size: Elements that share one scale; 32 in the standard.
      scale_rule: How the scale follows from the block.
    """

    element: Element
    block_size: int = 32
    scale_rule: ScaleRule = ScaleRule.FLOOR

    def quantize(
        self,
        x: Array,
        *,
        key: Array | None = None,
        tensor_scale: Array | None = None,
        scale_offset: Array | None = None,
        clip: Array | None = None,
    ) -> MXArray:
        """See `Format.quantize`."""
        if tensor_scale is not None:
            raise ValueError("tensor_scale is for formats with two levels of scale, such as NVFP4")
        if key is not None:
            raise ValueError("key is for stochastic rounding; this format rounds to nearest")
        blocks = to_blocks(x, self.block_size)
        return _quantize(blocks, scale_offset, clip, format=self)


@dataclasses.dataclass(frozen=True)
class MXFP4(MX):
    """MXFP4: E2M1 elements (0, .5, 1, 1.5, 2, 3, 4, 6), one E8M0 scale for 32 of them."""

    element: Element = E2M1
    block_size: int = dataclasses.field(default=32, kw_only=True)
    scale_rule: ScaleRule = dataclasses.field(default=ScaleRule.FLOOR, kw_only=True)


@functools.partial(jax.jit, static_argnames="format")
def _quantize(blocks: Array, scale_offset: Any, clip: Any, *, format: MX) -> MXArray:
    amax = sc.block_amax(blocks)
    bad = amax >= sc.INFINITY_BITS
    if clip is not None:
        clipped = jax.lax.bitcast_convert_type(amax, jnp.float32) * clip
        amax = jax.lax.bitcast_convert_type(clipped, jnp.uint32)
    exponent = sc.scale_exponent(amax, format.scale_rule, format.element)
    if format.scale_rule is ScaleRule.MSE:
        exponent = sc.least_error_exponent(blocks, exponent, format.element)
    if scale_offset is not None:
        exponent = exponent + scale_offset
    exponent = sc.clamp(exponent)
    codes = encode(blocks, exponent[..., None], format.element)
    codes = jnp.where(bad[..., None], jnp.uint8(0), codes)
    byte = jnp.where(bad, 255, exponent + 127).astype(jnp.uint8)
    return MXArray(
        elements=format.element.store(codes.reshape(*blocks.shape[:-2], -1)),
        scales=jax.lax.bitcast_convert_type(byte, jnp.float8_e8m0fnu),
        element=format.element,
        block_size=format.block_size,
    )
