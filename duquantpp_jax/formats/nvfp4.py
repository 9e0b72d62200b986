"""NVFP4: E2M1 elements in blocks of 16, an E4M3 scale a block, a float32 scale for the tensor.

    t = max |x| / (6 * 448)                     float32, rounded once
    s_b = E4M3(fl(amax_b / 6) / t)              nearest-even, at least 2^-9 if amax_b > 0
    element_i = E2M1(x_i / fl(s_b t))           nearest-even
    x_i ~ element_i s_b t

With four_over_six, t = max |x| / (6 * 256), and a block takes the scale E4M3((amax_b / 4) / t),
which makes its amax 4 and not 6, where that has the smaller squared error.

Calibrated, t is the next power of two, so that the reciprocal that programs store is exact, and so
is a decoded number in bfloat16; and a scale that would be zero is 2^-3, as compressed-tensors has
it. Activations then have a t that calibration chose, with room for twice the largest number seen.

The sources leave some cases open. Here a block with NaN or Inf has the scale NaN (byte 0x7F),
dequantizes to NaN and does not count for t; a zero block has scale 0 and zero codes; t is 1 if all
of x is zero, and at least 2^-126 otherwise. Rounding what is rounded changes nothing, but where a
scale is subnormal in E4M3: there the second rounding may choose a smaller scale.

Source: NVIDIA, arXiv 2509.25149, appendix on NVFP4 quantization; Cook et al., arXiv 2512.02010
(four over six); compressed-tensors 0.20, quantization/utils/helpers.py (calibrated).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, UInt8

from duquantpp_jax.core.arrays import Element, times_power_of_two
from duquantpp_jax.core.choices import ElementRounding
from duquantpp_jax.formats import scales as sc
from duquantpp_jax.formats.division import divide_by, magnitude_bits, quotient, split
from duquantpp_jax.formats.elements import E2M1, E4M3, encode
from duquantpp_jax.formats.errors import Wide, in_units, less, squared_error
from duquantpp_jax.formats.mx import BlockFormat, Blocks, Clip, Rng, Rounded

E4M3_NAN = 0x7F
_EIGHTH = 0x20
"""2^-3 in E4M3."""
HEADROOM = 2
"""How much larger than in calibration an activation may be before it is clipped."""


@dataclasses.dataclass(frozen=True)
class NVFP4(BlockFormat):
    """NVFP4, with the choice of four over six. A given tensor_scale is positive, at least 2^-126.

    Attributes:
      four_over_six: Choose for each block whether its amax becomes 6 or 4.
      calibrated: Take powers of two as tensor scales, and that of activations from calibration.
    """

    _: dataclasses.KW_ONLY
    four_over_six: bool = False
    calibrated: bool = False
    block_size: int = 16
    element: Element = dataclasses.field(default=E2M1, init=False)
    uses = ("tensor_scale", "clip")

    def calibrated_scale(self, amax: Float[Array, "*layers"]) -> Float32[Array, "*layers"] | None:
        """See `Format.calibrated_scale`."""
        if not self.calibrated:
            return None
        q, exponent = divide_by(magnitude_bits(amax.astype(jnp.float32)), 21)
        scale = sc.at_least_normal(times_power_of_two(q, exponent - 7) * np.float32(HEADROOM))
        return _next_power_of_two(scale)

    def round_blocks(
        self, blocks: Blocks, key: Rng, tensor_scale: Array | None = None, clip: Clip = None
    ) -> Rounded:
        whole = sc.block_amax(blocks)
        if tensor_scale is None:
            largest = jnp.max(jnp.where(whole < sc.INFINITY_BITS, whole, 0), initial=0)
            # 6 * 448 = 21 * 2^7; of four over six 6 * 256 = 3 * 2^9, as E4M3 also has 1.5 * 256.
            odd, power = (3, 9) if self.four_over_six else (21, 7)
            q, exponent = divide_by(largest, odd)
            tensor_scale = sc.at_least_normal(times_power_of_two(q, exponent - power))
            if self.calibrated:
                tensor_scale = _next_power_of_two(tensor_scale)
            tensor_scale = jnp.where(largest > 0, tensor_scale, jnp.float32(1))
        amax, bad = sc.clipped_amax(blocks, clip)
        tensor_exponent, significand = split(magnitude_bits(tensor_scale))
        tensor = significand.astype(jnp.float32)  # t = tensor * 2^(tensor_exponent - 23)

        def scale(share: Array, exponent: Array) -> UInt8[Array, "*blocks"]:
            q, q_exponent = quotient(share, tensor)
            byte = encode(q, tensor_exponent - 23 - exponent - q_exponent, E4M3)
            if self.calibrated:
                return jnp.where(byte == 0, jnp.uint8(_EIGHTH), byte)
            return jnp.where(amax > 0, jnp.maximum(byte, 1), jnp.uint8(0))

        def elements(byte: Array, rounding: ElementRounding) -> UInt8[Array, "*blocks size"]:
            total = E4M3.decode(jnp.maximum(byte, 1)) * tensor
            q, q_exponent = quotient(blocks, total[..., None])
            return encode(q, tensor_exponent - 23 - q_exponent, E2M1, rounding, key)

        def error(byte: UInt8[Array, "*blocks"]) -> Wide:
            x, unit = in_units(blocks, whole)
            rounded = (
                E2M1.decode(elements(byte, self.rounding.without_key))
                * E4M3.decode(byte)[..., None]
                * tensor
            )
            return squared_error(x, times_power_of_two(rounded, tensor_exponent - 23 - unit))

        byte = scale(*divide_by(amax, 6))
        if self.four_over_six:
            four = scale(*divide_by(amax, 4))
            byte = jnp.where(less(error(four), error(byte)), four, byte)
        codes = jnp.where(bad[..., None], jnp.uint8(0), elements(byte, self.rounding))
        byte = jnp.where(bad, jnp.uint8(E4M3_NAN), byte)
        return codes, jax.lax.bitcast_convert_type(byte, jnp.float8_e4m3fn), tensor_scale


def _next_power_of_two(x: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """The least power of two that is not below a positive, normal x."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    up = (bits + jnp.uint32(0x7FFFFF)) & jnp.uint32(0x7F800000)
    return jax.lax.bitcast_convert_type(up, jnp.float32)
