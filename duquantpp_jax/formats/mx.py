"""The MX formats: an element type, a block size and a power-of-two scale chosen by a rule.

    amax_b = max |x_b|,  E_b = rule(amax_b),  element_i = round(x_i / 2^E_b),  x_i ~ element_i 2^E_b

The specification leaves some cases open. Here a block with NaN or Inf gets scale byte 255 and
dequantizes to NaN (its codes are zeros with the signs of x); an all-zero block gets byte 0 and zero
codes; zeros and negative underflow keep their sign; subnormals are exact.

Source: OCP MX v1.0, section 6.3; Rouhani et al., arXiv 2310.10537, Algorithm 1.
"""

import abc
import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Key, Shaped, UInt8

from duquantpp_jax.core import (
    Element,
    ElementRounding,
    ElementRoundingField,
    Format,
    MXArray,
    ScaleRule,
    ScaleRuleField,
    choice,
)
from duquantpp_jax.formats import scales as sc
from duquantpp_jax.formats.elements import E2M1, E2M3, E3M2, E4M3, E5M2, encode

FLOAT_TYPES = ("float32", "bfloat16", "float16")
OPTIONS = {
    "tensor_scale": "formats with two levels of scale, such as NVFP4",
    "scale_offset": "scales that are powers of two, such as MXFP4's",
    "clip": "formats that choose the scale of a block",
}
"""The options of `Format.quantize` and what each is for."""

Rounded = tuple[UInt8[Array, "*blocks size"], Shaped[Array, "*blocks"], Array | None]
"""Codes and scales of blocks, and the tensor scale for formats that have it."""


def to_blocks(x: Array | np.ndarray, block_size: int) -> Float32[Array, "*blocks size"]:
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
    return to_float32(jnp.asarray(x)).reshape(*x.shape[:-1], width // block_size, block_size)


def to_float32(x: Array) -> Float32[Array, "*shape"]:
    """x in float32, exact also where it is subnormal in its own type."""
    if x.dtype == jnp.bfloat16:  # the upper half of a float32; a cast may flush subnormals
        bits = jax.lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32) << 16
        return jax.lax.bitcast_convert_type(bits, jnp.float32)
    return x.astype(jnp.float32)  # every float16 is a normal float32


class BlockFormat(Format):
    """A format of minifloat elements: a subclass chooses the scales and rounds the elements.

    Attributes:
      element: The element type.
      rounding: How x / scale becomes an element; a field, also given by its name.
      uses: The options of `Format.quantize`, besides the key, that it takes.
    """

    element: Element
    rounding: ElementRoundingField
    uses: ClassVar[tuple[str, ...]] = ("clip",)

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ValueError(f"a block of {self.block_size} elements: give at least 1")
        object.__setattr__(self, "rounding", choice(ElementRounding, self.rounding))

    def encode(
        self,
        x: Array | np.ndarray,
        *,
        key: Key[Array, ""] | None = None,
        tensor_scale: Float[Array, ""] | None = None,
        scale_offset: Int[Array, "*offsets"] | None = None,
        clip: Float[Array, "*clips"] | None = None,
    ) -> MXArray:
        """See `Format.quantize`."""
        options = {"tensor_scale": tensor_scale, "scale_offset": scale_offset, "clip": clip}
        given = {name: value for name, value in options.items() if value is not None}
        for name in given.keys() - set(self.uses):
            kind = type(self).__name__
            raise ValueError(f"{kind} has no use for {name}: {name} is for {OPTIONS[name]}")
        if key is not None and self.rounding is not ElementRounding.STOCHASTIC:
            how = self.rounding.value
            raise ValueError(f"key is for stochastic rounding; this format rounds {how}")
        return self._encode(to_blocks(x, self.block_size), key, given)

    @functools.partial(jax.jit, static_argnames="self")
    def _encode(
        self, blocks: Float32[Array, "*blocks size"], key: Array | None, given: dict[str, Any]
    ) -> MXArray:
        codes, scales, tensor_scale = self.round_blocks(blocks, key, **given)
        codes = codes.reshape(*codes.shape[:-2], codes.shape[-2] * codes.shape[-1])
        static = {"element": self.element, "block_size": self.block_size}
        return MXArray(codes, scales, tensor_scale, **static)

    @abc.abstractmethod
    def round_blocks(
        self, blocks: Float32[Array, "*blocks size"], key: Key[Array, ""] | None, **options: Any
    ) -> Rounded:
        """Rounds blocks; a block whose amax * clip is not finite gets the scale NaN.

        Args:
          key: Given where rounding is stochastic.
          options: Those of `uses` that are given.
        """


@dataclasses.dataclass(frozen=True)
class MX(BlockFormat):
    """A microscaling format.

    Attributes:
      block_size: Elements that share a scale; 32 in the standard.
      scale_rule: How the scale follows from the block; also by its name, as in "even".
    """

    element: Element
    _: dataclasses.KW_ONLY
    block_size: int = 32
    scale_rule: ScaleRuleField = ScaleRule.FLOOR
    rounding: ElementRoundingField = ElementRounding.NEAREST_EVEN
    element_types: ClassVar[tuple[Element, ...]] = ()  # to choose from; empty for any
    uses = ("scale_offset", "clip")

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "scale_rule", choice(ScaleRule, self.scale_rule))
        if self.element_types and self.element not in self.element_types:
            names = " or ".join(element.name for element in self.element_types)
            raise ValueError(f"{type(self).__name__} has {names} elements, not {self.element}")

    def round_blocks(
        self,
        blocks: Float32[Array, "*blocks size"],
        key: Key[Array, ""] | None,
        scale_offset: Int[Array, "*offsets"] | None = None,
        clip: Float[Array, "*clips"] | None = None,
    ) -> Rounded:
        amax, bad = sc.clipped_amax(blocks, clip)
        exponent = sc.scale_exponent(amax, self.scale_rule, self.element)
        if self.scale_rule is ScaleRule.MSE:
            exponent = sc.least_error_exponent(blocks, exponent, self.element, self.rounding)
        if scale_offset is not None:
            exponent = exponent + scale_offset
        exponent = jnp.where(amax == 0, -127, sc.clamp(exponent))
        scale = jnp.where(bad, 512, exponent)  # rounds all of a bad block to zero
        codes = encode(blocks, scale[..., None], self.element, self.rounding, key)
        byte = jnp.where(bad, 255, exponent + 127).astype(jnp.uint8)
        return codes, jax.lax.bitcast_convert_type(byte, jnp.float8_e8m0fnu), None


@dataclasses.dataclass(frozen=True)
class MXFP4(MX):
    """MXFP4: E2M1 elements (0, .5, 1, 1.5, 2, 3, 4, 6), an E8M0 scale for 32 of them."""

    element: Element = dataclasses.field(default=E2M1, init=False)


@dataclasses.dataclass(frozen=True)
class MXFP6(MX):
    """MXFP6: E2M3 elements (to 7.5) or E3M2 (to 28), an E8M0 scale for 32 of them."""

    element: Element = E2M3
    element_types = (E2M3, E3M2)


@dataclasses.dataclass(frozen=True)
class MXFP8(MX):
    """MXFP8: E4M3 elements (to 448) or E5M2 (to 57344), an E8M0 scale for 32 of them."""

    element: Element = E4M3
    element_types = (E4M3, E5M2)
