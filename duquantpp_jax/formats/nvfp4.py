"""NVFP4: E2M1 elements in blocks of 16, an E4M3 scale for a block, a float32 one for the tensor.

    t = max |x| / (6 * 448)                     float32, rounded once
    s_b = E4M3(fl(amax_b / 6) / t)              nearest-even, at least 2^-9 if amax_b > 0
    element_i = E2M1(x_i / fl(s_b t))           nearest-even
    x_i ~ element_i s_b t

With four_over_six, t = max |x| / (6 * 256), and a block whose squared error is smaller when its
amax becomes 4 and not 6 takes the scale E4M3((amax_b / 4) / t) instead. Of equal errors 6 has it.

Where the sources leave room: a block with NaN or Inf has the scale NaN (byte 0x7F), dequantizes to
NaN and takes no part in t; a zero block has scale 0 and zero codes; t is 1 if all is zero, and at
least 2^-126 otherwise.

Source: NVIDIA, arXiv 2509.25149, appendix on NVFP4 quantization; Cook et al., arXiv 2512.02010
(four over six).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32, Key, UInt8, UInt32

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
from duquantpp_jax.formats.elements import E2M1, E4M3, encode
from duquantpp_jax.formats.errors import Wide, above, in_units, less, squared_error
from duquantpp_jax.formats.mx import check_key, from_blocks, to_blocks

SMALLEST_NORMAL = 0x00800000  # bits of 2^-126
E4M3_NAN = 0x7F


@dataclasses.dataclass(frozen=True)
class NVFP4(Format):
    """NVFP4, with the choice of four over six.

    Attributes:
      four_over_six: Choose for each block whether its amax becomes 6 or 4.
      block_size: Elements that share one E4M3 scale; 16 in the format.
      rounding: How x / scale becomes an element.
    """

    _: dataclasses.KW_ONLY
    four_over_six: bool = False
    block_size: int = 16
    rounding: ElementRoundingField = ElementRounding.NEAREST_EVEN
    element: Element = dataclasses.field(default=E2M1, init=False)

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ValueError(f"a block of {self.block_size} elements: give at least 1")
        object.__setattr__(self, "rounding", choice(ElementRounding, self.rounding))

    def encode(
        self,
        x: Array | np.ndarray,
        *,
        key: Key[Array, ""] | None = None,
        tensor_scale: Float32[Array, ""] | None = None,
        scale_offset: Array | None = None,
        clip: Float32[Array, "*clips"] | None = None,
    ) -> MXArray:
        """See `Format.quantize`. A given tensor_scale is positive and at least 2^-126."""
        if scale_offset is not None:
            raise ValueError("scale_offset is for scales that are powers of two, such as MXFP4's")
        check_key(key, self.rounding)
        return _encode(to_blocks(x, self.block_size), key, tensor_scale, clip, format=self)


def tensor_scale_of(amax: UInt32[Array, ""], four_over_six: bool) -> Float32[Array, ""]:
    """amax / (6 * 448), or amax / (6 * 256): the largest block scale becomes E4M3's largest, or
    256, of which E4M3 also has 1.5 times as much.

    Args:
      amax: Bits of the largest magnitude of the tensor, finite.
    """
    # 6 * 448 = 21 * 2^7 and 6 * 256 = 3 * 2^9
    odd, power = (3, 9) if four_over_six else (21, 7)
    q, exponent = divide_by(amax, odd)
    bits = magnitude_bits(times_power_of_two(q, exponent - power))
    scale = jax.lax.bitcast_convert_type(jnp.maximum(bits, SMALLEST_NORMAL), jnp.float32)
    return jnp.where(amax > 0, scale, jnp.float32(1))


@functools.partial(jax.jit, static_argnames="format")
def _encode(
    blocks: Float32[Array, "*blocks size"],
    key: Array | None,
    tensor_scale: Array | None,
    clip: Array | None,
    *,
    format: NVFP4,
) -> MXArray:
    amax = sc.block_amax(blocks)
    bad = amax >= sc.INFINITY_BITS
    if tensor_scale is None:
        largest = jnp.max(jnp.where(bad, jnp.uint32(0), amax), initial=0)
        tensor_scale = tensor_scale_of(largest, format.four_over_six)
    if clip is not None:
        amax = sc.clipped(amax, clip)
        bad = bad | (amax >= sc.INFINITY_BITS)
    tensor_exponent, significand = split(magnitude_bits(tensor_scale))
    tensor = significand.astype(jnp.float32)  # t = tensor * 2^(tensor_exponent - 23)
    unit = above(sc.block_amax(blocks))[..., None]

    def scale(
        share: Float32[Array, "*blocks"], exponent: Int32[Array, "*blocks"]
    ) -> UInt8[Array, "*blocks"]:
        q, q_exponent = quotient(share, tensor)
        byte = encode(q, tensor_exponent - 23 - exponent - q_exponent, E4M3)
        return jnp.where(amax > 0, jnp.maximum(byte, 1), jnp.uint8(0))

    def elements(
        byte: UInt8[Array, "*blocks"], rounding: ElementRounding
    ) -> UInt8[Array, "*blocks size"]:
        total = E4M3.decode(jnp.maximum(byte, 1)) * tensor
        q, q_exponent = quotient(blocks, total[..., None])
        return encode(q, tensor_exponent - 23 - q_exponent, E2M1, rounding, key)

    def error(byte: UInt8[Array, "*blocks"]) -> Wide:
        held = E2M1.decode(elements(byte, nearest)) * E4M3.decode(byte)[..., None] * tensor
        held = times_power_of_two(held, tensor_exponent - 23 - unit)
        return squared_error(in_units(blocks, unit), held)

    nearest = format.rounding
    if nearest is ElementRounding.STOCHASTIC:
        nearest = ElementRounding.NEAREST_EVEN
    byte = scale(*divide_by(amax, 6))
    if format.four_over_six:
        four = scale(*divide_by(amax, 4))
        byte = jnp.where(less(error(four), error(byte)), four, byte)
    codes = jnp.where(bad[..., None], jnp.uint8(0), elements(byte, format.rounding))
    byte = jnp.where(bad, jnp.uint8(E4M3_NAN), byte)
    return MXArray(
        elements=from_blocks(codes),
        scales=jax.lax.bitcast_convert_type(byte, jnp.float8_e4m3fn),
        tensor_scale=tensor_scale,
        element=E2M1,
        block_size=format.block_size,
    )
