"""Format, which says how numbers are rounded, and MXArray, in which x ~ element * scale by blocks.

This file reads an MXArray; duquantpp_jax/formats chooses the scales and rounds the elements.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Float32, Int, Shaped, UInt8

from duquantpp_jax.core.exact import SIGNIFICANT_BITS, Exact


@dataclasses.dataclass(frozen=True)
class Element:
    """A minifloat: sign, exponent and mantissa bits, read as in IEEE 754 with subnormals.

    Attributes:
      bias: Subtracted from the exponent field.
      max_code: Code of the largest finite magnitude. Codes above it are NaN.
      infinity_code: Code of Inf, for types that have it.
      dtype: The JAX type that stores elements; uint8 stores the code where JAX has no such type.

    Source: OCP Microscaling Formats (MX) v1.0, section 5.3.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    max_code: int
    dtype: Any
    infinity_code: int | None = None

    def __repr__(self) -> str:
        return self.name

    @property
    def bits(self) -> int:
        """1 + exponent_bits + mantissa_bits."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def emin(self) -> int:
        """Exponent of the smallest normal magnitude (and of the subnormals)."""
        return 1 - self.bias

    @property
    def emax(self) -> int:
        """floor(log2(max))."""
        return (self.max_code >> self.mantissa_bits) - self.bias

    @property
    def max(self) -> float:
        """Largest finite magnitude."""
        return self.max_significand * 2.0 ** (self.emax - self.mantissa_bits)

    @property
    def max_significand(self) -> int:
        """Significand of `max` as an integer of mantissa_bits + 1 bits."""
        unit = 1 << self.mantissa_bits
        return unit + self.max_code % unit

    def store(self, codes: UInt8[Array, "*shape"]) -> Shaped[Array, "*shape"]:
        """Codes as elements of the storage type."""
        if self.dtype == jnp.uint8:
            return codes
        if self.bits == 8 or codes.ndim == 0 or codes.shape[-1] % 2:
            narrow = codes if self.bits == 8 else codes.astype(jnp.uint4)
            return jax.lax.bitcast_convert_type(narrow, self.dtype)
        # A bitcast of bytes in memory is free. Without the barrier XLA fuses it with the packing,
        # which is slow.
        packed = jax.lax.optimization_barrier(codes[..., 0::2] | codes[..., 1::2] << 4)
        return jax.lax.bitcast_convert_type(packed, self.dtype).reshape(codes.shape)

    @functools.partial(jax.jit, static_argnames="self")
    def codes(self, elements: Shaped[Array, "*shape"]) -> UInt8[Array, "*shape"]:
        """The codes of elements; `elements` may be codes already."""
        if elements.dtype == jnp.uint8:
            return elements
        if self.bits == 4:
            # XLA's CPU compiler fails on a bitcast of float4 inside a scan, so this casts to e5m2.
            # Half of its magnitude bits are 28 for .5, 30 for 1, 31 for 1.5, 32 for 2 and so on.
            wide = jax.lax.bitcast_convert_type(elements.astype(jnp.float8_e5m2), jnp.uint8)
            half = (wide & 0x7F) >> 1
            return jnp.where(half > 28, half - 28, half // 28) | (wide >> 7 << 3)
        return jax.lax.bitcast_convert_type(elements, jnp.uint8)

    @functools.partial(jax.jit, static_argnames="self")
    def decode(
        self, codes: UInt8[Array, "*shape"], exponent: Int[Array, "*#shape"] | int = 0
    ) -> Float32[Array, "*shape"]:
        """The values of codes times 2^exponent, exact where float32 can represent them."""
        unit = 1 << self.mantissa_bits
        magnitude = codes.astype(jnp.int32) & ((unit << self.exponent_bits) - 1)
        field = magnitude >> self.mantissa_bits
        significand = (magnitude & (unit - 1)) + jnp.where(field > 0, unit, 0)
        power = jnp.maximum(field, 1) - (self.bias + self.mantissa_bits)
        value = times_power_of_two(significand.astype(jnp.float32), power + exponent)
        if self.max_code + 1 < unit << self.exponent_bits:
            value = jnp.where(magnitude > self.max_code, jnp.float32(jnp.nan), value)
        if self.infinity_code is not None:
            value = jnp.where(magnitude == self.infinity_code, jnp.float32(jnp.inf), value)
        negative = (codes >> (self.bits - 1)).astype(jnp.uint32) << 31
        bits = jax.lax.bitcast_convert_type(value, jnp.uint32) | negative
        return jax.lax.bitcast_convert_type(bits, jnp.float32)


def times_power_of_two(
    x: Float32[Array, "*shape"], exponent: Int[Array, "*#shape"] | int
) -> Float32[Array, "*shape"]:
    """x * 2^exponent in integer arithmetic, as CPUs and GPUs flush subnormals in float arithmetic.

    x is no subnormal, and |exponent| < 2^30. The product is exact, or Inf where it is too large. A
    subnormal one loses the bits below 2^-149; that of an MX element and its scale has none there.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    field = (bits >> 23) & 0xFF
    sign = bits & jnp.int32(-(2**31))
    moved = field + exponent
    normal = (bits & jnp.int32(-0x7F800001)) | (jnp.clip(moved, 1, 254) << 23)
    significand = (bits & 0x7FFFFF) | 0x800000
    subnormal = sign | (significand >> jnp.clip(1 - moved, 0, 31))
    result = jnp.where(moved > 0, normal, subnormal)
    result = jnp.where(moved > 254, sign | 0x7F800000, result)
    result = jnp.where((field == 0) | (field == 255), bits, result)
    return jax.lax.bitcast_convert_type(result, jnp.float32)


@struct.dataclass
class MXArray:
    """A quantized array: x ~ element * scale (* tensor_scale), blocks along the last axis.

    Attributes:
      elements: In the storage type of `element`, or uint8 codes; of the shape of x.
      scales: float8_e8m0fnu for MX formats, float8_e4m3fn for NVFP4, float32 for the others.
      tensor_scale: A float32 number for formats with two levels of scale, else None.
      block_size: Elements that share a scale.
    """

    elements: Array
    scales: Array
    tensor_scale: Float[Array, "*stack"] | None = None
    element: Element = struct.field(pytree_node=False, kw_only=True)
    block_size: int = struct.field(pytree_node=False, kw_only=True)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array that was quantized."""
        return self.elements.shape

    @jax.jit
    def stored(self) -> MXArray:
        """The same array with elements in their storage type."""
        if self.elements.dtype == self.element.dtype:
            return self
        blocks = self.elements.reshape(*self.scales.shape, self.block_size)
        elements = self.element.store(blocks).reshape(self.shape)
        return dataclasses.replace(self, elements=elements)

    def codes(self) -> UInt8[Array, "*shape"]:
        """The code of each value: sign, exponent and mantissa bits, the sign in the highest."""
        return self.element.codes(self.elements)

    def scale_bytes(self) -> UInt8[Array, "*blocks"]:
        """Byte of each block's scale; in E8M0 byte b is 2^(b - 127), and 255 is NaN.

        Raises:
          ValueError: The scales are float32 numbers.
        """
        if self.scales.dtype.itemsize != 1:
            raise ValueError(
                f"scales of type {self.scales.dtype} have no byte: read .scales, "
                "or choose a format whose scale is one byte (MXFP4)"
            )
        return jax.lax.bitcast_convert_type(self.scales, jnp.uint8)

    def dequantize(self) -> Float32[Array, "*shape"]:
        """element * scale (* tensor_scale) in float32.

        Exact for E8M0 scales, with subnormals, and Inf from 2^128 on. With other scales the product
        is rounded once; below 2^-126 its lowest bits are cut off. Its gradient by what was
        quantized is zero: `Format.fake_quantize` passes gradients straight through.
        """
        return self._times_scale(self.elements.reshape(*self.scales.shape, self.block_size))

    @property
    def is_exact(self) -> bool:
        """Whether `exactly` gives an Exact; a property of the types of elements and scales."""
        added = {"float8_e8m0fnu": 0, "float8_e4m3fn": 4}.get(str(self.scales.dtype), 24)
        return self.element.mantissa_bits + 1 + added <= SIGNIFICANT_BITS

    def exactly(self) -> Exact | Float32[Array, "*shape"]:
        """What `dequantize` gives, as an Exact where bfloat16 holds it but for the tensor scale."""
        if not self.is_exact:
            return self.dequantize()
        return Exact(dataclasses.replace(self, tensor_scale=None).dequantize(), self.tensor_scale)

    def where(self, chosen: Bool[Array, "*#blocks"], other: MXArray) -> MXArray:
        """Blocks of this array where they are chosen, those of the other array elsewhere."""
        chosen = jnp.broadcast_to(chosen, self.scales.shape)
        wide = jnp.repeat(chosen, self.block_size, axis=-1)
        elements = jnp.where(wide, self.elements, other.elements)
        scales = jnp.where(chosen, self.scales, other.scales)
        return dataclasses.replace(other, elements=elements, scales=scales)

    def limit(self) -> Float32[Array, "*shape"]:
        """For each value the largest magnitude of its block's grid; larger ones saturate."""
        shape = (*self.scales.shape, self.block_size)
        return self._times_scale(jnp.full(shape, self.element.max, jnp.float32))

    @jax.jit
    def _times_scale(self, blocks: Shaped[Array, "*blocks size"]) -> Float32[Array, "*shape"]:
        """Elements, their codes or float32 numbers, times scale (* tensor_scale)."""
        coded = blocks.dtype == jnp.uint8
        if self.scales.dtype == jnp.float8_e8m0fnu:
            byte = self.scale_bytes().astype(jnp.int32)[..., None]
            if coded:
                x = self.element.decode(blocks, byte - 127)  # a single product
            else:
                x = times_power_of_two(blocks.astype(jnp.float32), byte - 127)
            return jnp.where(byte == 255, jnp.float32(jnp.nan), x).reshape(self.shape)
        x = self.element.decode(blocks) if coded else blocks.astype(jnp.float32)
        scale = self.scales.astype(jnp.float32)[..., None]
        if self.scales.dtype == jnp.float8_e4m3fn:  # of 4 bits: element * scale is exact
            x = x * scale
            if self.tensor_scale is None:
                return x.reshape(self.shape)
            t = self.tensor_scale  # its axes are those over which arrays are stacked
            scale = t.reshape(*t.shape, *[1] * (x.ndim - t.ndim))
        # With scale = significand * 2^exponent only the last product may be subnormal.
        bits = jax.lax.bitcast_convert_type(scale, jnp.int32)
        significand = jax.lax.bitcast_convert_type((bits & 0x7FFFFF) | 0x3F800000, jnp.float32)
        x = times_power_of_two(x * significand, (bits >> 23) - 127)
        return jnp.where(jnp.isfinite(scale), x, jnp.float32(jnp.nan)).reshape(self.shape)


class Format(abc.ABC):
    """How numbers are rounded. Frozen, hashable, without arrays: a static choice under jit.

    Attributes:
      holds_weights: Whether it can store weights; a format that cannot is for activations only.
    """

    block_size: int
    holds_weights: ClassVar[bool] = True

    @abc.abstractmethod
    def encode(self, x: Array | np.ndarray, **options: Any) -> MXArray:
        """Like `quantize`, with uint8 codes as elements. Each format implements it."""

    def quantize(self, x: Array | np.ndarray, **options: Any) -> MXArray:
        """Rounds x to elements and scales, block by block along the last axis.

        Args:
          x: float32, bfloat16, float16 or a float8 with a mantissa; its last axis is a multiple of
            `block_size`.
          options: Each format takes some of these.
            key: For stochastic rounding of elements.
            tensor_scale: For formats with two levels of scale: replaces the computed one.
            scale_offset: Integers, an array that broadcasts over blocks: added to the exponents
              of their scales.
            clip: Factors that broadcast over blocks, on each block's largest magnitude before its
              scale is chosen; larger values saturate.

        Raises:
          ValueError: x has another type, no axis, or a last axis that `block_size` does not
            divide; or the format does not take an option.
        """
        return self.encode(x, **options).stored()

    def calibrated_scale(self, amax: Float[Array, "*layers"]) -> Float32[Array, "*layers"] | None:
        """The tensor scale of activations whose largest magnitude in calibration is amax.

        None in a format that has none, or takes it from the activations at hand.
        """
        return None

    def exactly(self, x: Float32[Array, "*shape"], **options: Any) -> Exact | Array:
        """`fake_quantize` along the last axis, as an Exact if the format has such numbers."""
        return self.fake_quantize(x, **options)

    def fake_quantize(
        self,
        x: Array | np.ndarray,
        *,
        axis: int = -1,
        pad: bool = False,
        saturated_gradient: bool = True,
        **options: Any,
    ) -> Float[Array, "*shape"]:
        """Quantizes and dequantizes: x rounded to this format, in its own type.

        The gradient is straight-through: df/dx = 1, as if nothing were rounded, and 0 for options.

        >>> import jax, duquantpp_jax
        >>> loss = lambda x: duquantpp_jax.MXFP4().fake_quantize(x, axis=0).sum()
        >>> jax.grad(loss)(jax.numpy.ones((32, 1)) / 3).mean().item()
        1.0

        Args:
          x: As for `quantize`; what its type does not hold is rounded once more.
          axis: Along which blocks lie; options are for x with this axis and the last swapped.
          pad: Fill the last block with zeros where blocks do not divide the axis (exact).
          saturated_gradient: Whether df/dx = 1 also where x saturates; else it is 0 there.
        """
        x = x if isinstance(x, jax.Array) else np.asarray(x)
        if not -x.ndim <= axis < x.ndim:
            raise ValueError(f"x of shape {x.shape} has no axis {axis}")
        width, moved = x.shape[axis], x.swapaxes(axis, -1)
        if pad and (missing := -width % self.block_size):
            filled = jnp.pad if isinstance(x, jax.Array) else np.pad  # which keeps float64
            moved = filled(moved, [(0, 0)] * (x.ndim - 1) + [(0, missing)])  # type: ignore
        q = self.encode(moved, **options)

        def back(y: Array) -> Array:
            return y[..., :width].swapaxes(axis, -1)

        x, passes = jnp.asarray(x), jnp.ones((), bool)
        if not saturated_gradient:
            passes = jnp.abs(x.astype(jnp.float32)) <= back(q.limit())
        rounded = back(q.dequantize()).astype(x.dtype)
        return rounded_to(x, *jax.lax.stop_gradient((rounded, passes)))


@jax.custom_jvp
def rounded_to(x: Array, rounded: Array, passes: Array) -> Array:
    """`rounded`, whose gradient is that of x where it passes, and 0 elsewhere."""
    return rounded


@rounded_to.defjvp
def _(primals: Any, tangents: Any) -> tuple[Array, Array]:
    _, rounded, passes = primals
    return rounded, jnp.where(passes, tangents[0], jnp.zeros_like(tangents[0]))
