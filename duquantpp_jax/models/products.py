"""The product of a linear, x W^T, and where bfloat16 gives the same as float32.

    y = f_x f_w sum_k x_k w_k               x_k, w_k numbers of an Exact, f_x and f_w its factors

Two such numbers have 12 significant bits together at most (core/exact.py), so that each x_k w_k is
exact in float32, whichever of the two types multiplies. Both add in float32 and differ in the order
of additions alone: the sums are equal to the last bit as long as they need no more than 24 bits,
and else within 2^-23 k sum_k |x_k w_k| of each other. A GPU multiplies bfloat16 some 16 times as
fast as float32, a CPU without instructions of its own for it more slowly: there the numbers are
multiplied in float32.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from duquantpp_jax.core import Exact
from duquantpp_jax.models.attention import HIGHEST
from duquantpp_jax.models.experts import Routed

LINEAR = "...k,nk->...n"


def matmul(x: Any, w: Any) -> Array:
    """x W^T with sums in float32; for routed inputs W [experts, n, k] is a stack of experts.

    Args:
      x: Float[tokens, k], or `Routed` inputs, or an Exact of either.
      w: Float[n, k], or an Exact of it.
    """
    factors: list[Array] = []
    product = float_product
    routed = isinstance(x, Routed) or (isinstance(x, Exact) and isinstance(x.numbers, Routed))
    if isinstance(x, Exact) and isinstance(w, Exact) and not (routed and w.factor is not None):
        factors = [factor for factor in (x.factor, w.factor) if factor is not None]
        x, w, product = x.numbers, w.numbers, exact
    x, w = (side.whole() if isinstance(side, Exact) else side for side in (x, w))
    if routed:
        return functools.reduce(jnp.multiply, factors, x.each(lambda w, x: product(x, w), w).x)
    return functools.reduce(jnp.multiply, factors, product(x, w))


def float_product(x: Float[Array, "*tokens k"], w: Float[Array, "n k"]) -> Array:
    """x W^T at the highest precision."""
    return jnp.einsum(LINEAR, x, w, precision=HIGHEST)


@jax.custom_vjp
def exact(x: Float[Array, "*tokens k"], w: Float[Array, "n k"]) -> Float32[Array, "*tokens n"]:
    """x W^T of numbers that bfloat16 holds; derivatives are float32 products."""
    bfloat16 = functools.partial(narrow, LINEAR)
    return jax.lax.platform_dependent(x, w, cpu=_wide, default=bfloat16)


def _exact_forward(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return exact(x, w), (x, w)


def _exact_backward(kept: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    primals, pull = jax.vjp(_wide, *kept)
    del primals
    return pull(g)


exact.defvjp(_exact_forward, _exact_backward)


def _wide(x: Array, w: Array) -> Float32[Array, "*tokens n"]:
    return float_product(x.astype(jnp.float32), w.astype(jnp.float32))


def narrow(equation: str, a: Array, b: Array) -> Float32[Array, "..."]:
    """A product with bfloat16 factors, rounded where they are no bfloat16, and float32 sums."""
    a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)
