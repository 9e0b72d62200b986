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
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Shaped, UInt8

from duquantpp_jax.core import (
    Element,
    ElementRounding,
    Exact,
    Format,
    MXArray,
    RandomKey,
    ScaleRule,
)
from duquantpp_jax.core.arrays import rounded_to
from duquantpp_jax.formats import scales as sc
from duquantpp_jax.formats.elements import E2M1, E2M3, E3M2, E4M3, E5M2, encode

if TYPE_CHECKING:  # a field is given as a member or by its name, and read as a member
    RuleField = ScaleRule
    RoundingField = ElementRounding
else:
    RuleField, RoundingField = ScaleRule | str, ElementRounding | str

FLOAT_TYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")
OPTIONS = {
    "tensor_scale": "formats with two levels of scale, such as NVFP4",
    "scale_offset": "scales that are powers of two, such as MXFP4's",
    "clip": "formats that choose the scale of a block",
}
"""The options of `Format.quantize` and what each is for."""

Blocks = Float32[Array, "*blocks size"]
Clip = Float[Array, "*clips"] | None
Rng = RandomKey | None
Rounded = tuple[UInt8[Array, "*blocks size"], Shaped[Array, "*blocks"], Array | None]
"""Codes and scales of blocks, and the tensor scale for formats that have it."""


def check_type(x: Array | np.ndarray) -> None:
    """Raises ValueError unless numbers of x's type can be rounded."""
    dtype = getattr(x, "dtype", type(x).__name__)
    if str(dtype) not in FLOAT_TYPES:
        raise ValueError(
            f"cannot quantize {dtype}: give one of {', '.join(FLOAT_TYPES)} "
            "(a cast from float64 is yours to make: it rounds once more)"
        )


def to_blocks(x: Array | np.ndarray, block_size: int) -> Blocks:
    """x in float32 (exact), its last axis split into blocks; checks what `quantize` is given."""
    check_type(x)
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


@dataclasses.dataclass(frozen=True)
class BlockFormat(Format):
    """A format of minifloat elements: a subclass chooses the scales and rounds the elements.

    Attributes:
      block_size: Elements that share a scale.
      rounding: How x / scale becomes an element; also by its name, as in "stochastic".
      uses: The options of `Format.quantize`, besides the key, that it takes.
    """

    element: Element
    _: dataclasses.KW_ONLY
    block_size: int = 32
    rounding: RoundingField = ElementRounding.NEAREST_EVEN
    uses: ClassVar[tuple[str, ...]] = ("clip",)

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ValueError(f"a block of {self.block_size} elements: give at least 1")
        object.__setattr__(self, "rounding", ElementRounding(self.rounding))

    def encode(
        self,
        x: Array | np.ndarray,
        *,
        key: Rng = None,
        tensor_scale: Float[Array, ""] | None = None,
        scale_offset: Int[Array, "*offsets"] | None = None,
        clip: Clip = None,
    ) -> MXArray:
        """See `Format.quantize`."""
        options = {"tensor_scale": tensor_scale, "scale_offset": scale_offset, "clip": clip}
        given = {name: value for name, value in options.items() if value is not None}
        for name in given.keys() - set(self.uses):
            kind = type(self).__name__
            raise ValueError(f"{kind} has no use for {name}: {name} is for {OPTIONS[name]}")
        if key is not None and (how := self.rounding) is not ElementRounding.STOCHASTIC:
            raise ValueError(f"key is for stochastic rounding; this format rounds {how.value}")
        return self._encode(to_blocks(x, self.block_size), key, given)

    def exactly(self, x: Float32[Array, "*shape"], **options: Any) -> Exact | Array:
        """See `Format.exactly`."""
        q = self.encode(x, **options)
        rounded, passes = q.exactly(), jnp.ones((), bool)
        if not isinstance(rounded, Exact):
            return rounded_to(x, *jax.lax.stop_gradient((rounded, passes)))
        rounded = jax.lax.stop_gradient(rounded)
        unit = x if rounded.factor is None else x / rounded.factors()
        numbers = rounded_to(unit, rounded.numbers, passes)
        return dataclasses.replace(rounded, numbers=numbers)

    @functools.partial(jax.jit, static_argnames="self")
    def _encode(self, blocks: Blocks, key: Rng, given: dict[str, Any]) -> MXArray:
        codes, scales, tensor_scale = self.round_blocks(blocks, key, **given)
        codes = jax.lax.collapse(codes, codes.ndim - 2)
        static = {"element": self.element, "block_size": self.block_size}
        return MXArray(codes, scales, tensor_scale, **static)

    @abc.abstractmethod
    def round_blocks(self, blocks: Blocks, key: Rng, **options: Any) -> Rounded:
        """Rounds blocks, with those options of `uses` that are given.

        A block whose amax * clip is not finite gets the scale NaN.
        """


@dataclasses.dataclass(frozen=True)
class MX(BlockFormat):
    """A microscaling format; its blocks have 32 elements in the standard.

    Attributes:
      scale_rule: How the scale follows from the block; also by its name, as in "even".
    """

    _: dataclasses.KW_ONLY
    scale_rule: RuleField = ScaleRule.FLOOR
    element_types: ClassVar[tuple[Element, ...]] = ()  # to choose from; empty for any
    uses = ("scale_offset", "clip")

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "scale_rule", ScaleRule(self.scale_rule))
        if self.element_types and self.element not in self.element_types:
            names = " or ".join(element.name for element in self.element_types)
            raise ValueError(f"{type(self).__name__} has {names} elements, not {self.element}")

    def round_blocks(
        self, blocks: Blocks, key: Rng, scale_offset: Array | None = None, clip: Clip = None
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
