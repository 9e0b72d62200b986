"""The product of a linear, x W^T, and where bfloat16 gives the same as float32.

    y = f_x f_w sum_k x_k w_k               x_k, w_k numbers of an Exact, f_x and f_w its factors

Two such numbers have 14 significant bits together at most (core/exact.py), so that each x_k w_k is
exact in float32, whichever of the two types multiplies. Both add in float32 and differ in the order
of additions alone: the sums are equal to the last bit as long as they need no more than 24 bits,
and else within 2^-23 k sum_k |x_k w_k| of each other. A GPU multiplies bfloat16 some 16 times as
fast as float32, a CPU without instructions of its own for it more slowly: there the numbers are
multiplied in float32.

A float32 is the sum of three bfloat16 numbers, exactly. So where bfloat16 holds one side alone, as
weights that a checkpoint has in bfloat16, three products in it are one in float32.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from duquantpp_jax.core import Exact
from duquantpp_jax.models.attention import HIGHEST
from duquantpp_jax.models.experts import Routed

LINEAR = "...k,nk->...n"
PARTS = 3
"""Numbers of 8 significant bits that add up to a float32."""


def matmul(x: Any, w: Any) -> Array:
    """x W^T with sums in float32; for routed inputs W [experts, n, k] is a stack of experts.

    Args:
      x: Float[tokens, k], or `Routed` inputs, or an Exact of either.
      w: Float[n, k], or an Exact of it.
    """
    factors: tuple[Array | None, ...] = ()
    product = float_product
    routed = isinstance(x, Routed) or (isinstance(x, Exact) and isinstance(x.numbers, Routed))
    if isinstance(w, Exact) and not (routed and w.factor is not None):
        product = functools.partial(exact, parts=1 if isinstance(x, Exact) else PARTS)
        factors = (x.factor, w.factor) if isinstance(x, Exact) else (w.factor,)
        x, w = x.numbers if isinstance(x, Exact) else x, w.numbers
    x, w = (side.whole() if isinstance(side, Exact) else side for side in (x, w))
    y = x.each(lambda w, x: product(x, w), w).x if routed else product(x, w)
    return functools.reduce(jnp.multiply, [factor for factor in factors if factor is not None], y)


def float_product(x: Float[Array, "*tokens k"], w: Float[Array, "n k"]) -> Array:
    """x W^T in the type of x, at the highest precision; w may be stored in bfloat16."""
    if x.dtype == jnp.float32 and w.dtype == jnp.bfloat16:
        return exact(x, w, parts=PARTS)
    return jnp.einsum(LINEAR, x, w, precision=HIGHEST)


def as_factor(w: Any, dtype: DTypeLike) -> Array:
    """A weight in a type for `float_product`: bfloat16 stays as it is."""
    return w if getattr(w, "dtype", None) == jnp.bfloat16 else w.astype(dtype)


def exact(
    x: Float[Array, "*tokens k"], w: Float[Array, "n k"], *, parts: int
) -> Float32[Array, "*tokens n"]:
    """x W^T where bfloat16 holds w, and x as a sum of so many numbers; derivatives are float32
    products."""
    return _exact(parts, x, w)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _exact(parts: int, x: Array, w: Array) -> Array:
    fast = functools.partial(narrow, LINEAR) if parts == 1 else split_product
    return jax.lax.platform_dependent(x, w, cpu=_wide, default=of_one if is_one(x) else fast)


def _exact_backward(parts: int, kept: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    del parts
    return jax.vjp(_wide, *kept)[1](g)


_exact.defvjp(lambda parts, x, w: (_exact(parts, x, w), (x, w)), _exact_backward)


def _wide(x: Array, w: Array) -> Float32[Array, "*tokens n"]:
    return float_product(x.astype(jnp.float32), w.astype(jnp.float32))


def is_one(x: Float[Array, "*tokens k"]) -> bool:
    """Whether there is one token alone."""
    return x.size == x.shape[-1]


def of_one(x: Float[Array, "*tokens k"], w: Float[Array, "n k"]) -> Float32[Array, "*tokens n"]:
    """x W^T of one token as products that are added up: so XLA reads the weight where it stands, at
    the memory's speed, which its matrix products with sums in another type do not."""
    y = jnp.sum(x.reshape(-1).astype(jnp.float32) * w.astype(jnp.float32), axis=-1)
    return y.reshape(*x.shape[:-1], len(w))


def split_product(
    x: Float32[Array, "*tokens k"], w: Float[Array, "n k"]
) -> Float32[Array, "*tokens n"]:
    """x W^T with x as the sum of PARTS bfloat16 numbers, each the rest of those before, rounded.

    x below 2^-100 loses its last bits, and from bfloat16's largest on it gives NaN.
    """
    parts = []
    for _ in range(PARTS - 1):
        parts.append(jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7))
        x = x - parts[-1]
    return jnp.sum(narrow(LINEAR, jnp.stack([*parts, x]), w), axis=0)


def narrow(equation: str, a: Array, b: Array) -> Float32[Array, "..."]:
    """A product with bfloat16 factors, rounded where they are no bfloat16, and float32 sums."""
    a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)
