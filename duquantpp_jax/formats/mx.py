"""The MX formats: an element type, a block size and a power-of-two scale chosen by a rule.

    amax_b = max |x_b|,  E_b = rule(amax_b),  element_i = round(x_i / 2^E_b),  x_i ~ element_i 2^E_b

Where the specification leaves room: NaN or Inf anywhere in a block gives scale byte 255, and the
whole block dequantizes to NaN (its codes are zeros with the signs of x); an all-zero block has byte
0 and zero codes; signed zeros and negative underflow keep their sign; subnormals are exact.

Source: OCP MX v1.0, section 6.3; Rouhani et al., arXiv 2310.10537, Algorithm 1.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int, Key

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
    blocks = (*x.shape[:-1], width // block_size, block_size)
    return to_float32(jnp.asarray(x)).reshape(blocks)


def from_blocks(blocks: Array) -> Array:
    """Blocks in a row again."""
    *batch, count, size = blocks.shape
    return blocks.reshape(*batch, count * size)


def to_float32(x: Array) -> Float32[Array, "*shape"]:
    """x in float32, exact also where it is subnormal in its own type."""
    if x.dtype == jnp.float32:
        return x
    if x.dtype == jnp.bfloat16:  # the upper half of a float32; a cast may flush subnormals
        bits = jax.lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32) << 16
        return jax.lax.bitcast_convert_type(bits, jnp.float32)
    return x.astype(jnp.float32)  # every float16 is a normal float32


def check_key(key: Array | None, rounding: ElementRounding) -> None:
    """Raises ValueError unless there is a key exactly where rounding is stochastic."""
    if key is None and rounding is ElementRounding.STOCHASTIC:
        raise ValueError("stochastic rounding needs a key: give key=jax.random.key(seed)")
    if key is not None and rounding is not ElementRounding.STOCHASTIC:
        raise ValueError(f"key is for stochastic rounding; this format rounds {rounding.value}")


@dataclasses.dataclass(frozen=True)
class MX(Format):
    """A microscaling format.

    Attributes:
      element: The element type.
      block_size: Elements that share one scale; 32 in the standard.
      scale_rule: How the scale follows from the block; also by its name, as in "even".
      rounding: How x / scale becomes an element; also by its name.
    """

    element: Element
    _: dataclasses.KW_ONLY
    block_size: int = 32
    scale_rule: ScaleRuleField = ScaleRule.FLOOR
    rounding: ElementRoundingField = ElementRounding.NEAREST_EVEN

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ValueError(f"a block of {self.block_size} elements: give at least 1")
        object.__setattr__(self, "scale_rule", choice(ScaleRule, self.scale_rule))
        object.__setattr__(self, "rounding", choice(ElementRounding, self.rounding))

    def encode(
        self,
        x: Array | np.ndarray,
        *,
        key: Key[Array, ""] | None = None,
        tensor_scale: Array | None = None,
        scale_offset: Int[Array, "*offsets"] | None = None,
        clip: Float32[Array, "*clips"] | None = None,
    ) -> MXArray:
        """See `Format.quantize`. A block whose amax * clip is not finite is NaN."""
        if tensor_scale is not None:
            raise ValueError("tensor_scale is for formats with two levels of scale, such as NVFP4")
        check_key(key, self.rounding)
        return _encode(to_blocks(x, self.block_size), key, scale_offset, clip, format=self)


@dataclasses.dataclass(frozen=True)
class MXFP4(MX):
    """MXFP4: E2M1 elements (0, .5, 1, 1.5, 2, 3, 4, 6), one E8M0 scale for 32 of them."""

    element: Element = dataclasses.field(default=E2M1, init=False)


@dataclasses.dataclass(frozen=True)
class MXFP6(MX):
    """MXFP6: E2M3 elements (to 7.5) or E3M2 (to 28), one E8M0 scale for 32 of them."""

    element: Element = E2M3

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_element(self, (E2M3, E3M2))


@dataclasses.dataclass(frozen=True)
class MXFP8(MX):
    """MXFP8: E4M3 elements (to 448) or E5M2 (to 57344), one E8M0 scale for 32 of them."""

    element: Element = E4M3

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_element(self, (E4M3, E5M2))


def _check_element(format: MX, elements: tuple[Element, ...]) -> None:
    if format.element not in elements:
        names = " or ".join(element.name for element in elements)
        raise ValueError(f"{type(format).__name__} has {names} elements, not {format.element}")


@functools.partial(jax.jit, static_argnames="format")
def _encode(
    blocks: Array, key: Array | None, offset: Array | None, clip: Array | None, *, format: MX
) -> MXArray:
    amax = sc.block_amax(blocks)
    bad = amax >= sc.INFINITY_BITS
    if clip is not None:
        amax = sc.clipped(amax, clip)
        bad = bad | (amax >= sc.INFINITY_BITS)
    exponent = sc.scale_exponent(amax, format.scale_rule, format.element)
    if format.scale_rule is ScaleRule.MSE:
        exponent = sc.least_error_exponent(blocks, exponent, format.element, format.rounding)
    if offset is not None:
        exponent = exponent + offset
    exponent = jnp.where(amax == 0, -127, sc.clamp(exponent))
    scale = jnp.where(bad, 512, exponent)  # of a bad block nothing but signs is left
    codes = encode(blocks, scale[..., None], format.element, format.rounding, key)
    byte = jnp.where(bad, 255, exponent + 127).astype(jnp.uint8)
    return MXArray(
        elements=from_blocks(codes),
        scales=jax.lax.bitcast_convert_type(byte, jnp.float8_e8m0fnu),
        element=format.element,
        block_size=format.block_size,
    )
