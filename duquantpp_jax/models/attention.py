"""Rotary positions, and causal attention over all keys or over a window of the last ones.

    R(x)_i        = x_i cos(p w_i) - x_{i + d/2} sin(p w_i)              i < d/2, position p
    R(x)_{i+d/2}  = x_{i + d/2} cos(p w_i) + x_i sin(p w_i)
    a_p           = sum_s softmax_s(q_p k_s / sqrt(c)) v_s               over p - window < s <= p

A head may have a sink: one more logit in its softmax, which has no value.

Source: Su et al., RoFormer (arXiv:2104.09864), in the half-rotation layout of Hugging Face
checkpoints; Ainslie et al., GQA (arXiv:2305.13245); Jiang et al., Mistral 7B (arXiv:2310.06825),
section 2, for the window.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

# By default a GPU multiplies float32 in TF32, whose 10-bit mantissa rounds as a quantizer does.
HIGHEST = jax.lax.Precision.HIGHEST


def product(equation: str, a: Float[Array, "..."], b: Float[Array, "..."]) -> Float32[Array, "..."]:
    """The einsum in float32. Of bfloat16 factors the gradient is rounded to bfloat16 before it is
    multiplied, which else would be a product in float32."""
    if a.dtype == jnp.bfloat16:
        return _narrow(equation, a, b)
    return jnp.einsum(equation, a, b, precision=HIGHEST, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _narrow(equation: str, a: Array, b: Array) -> Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _narrow_backward(equation: str, kept: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    _, pull = jax.vjp(functools.partial(jnp.einsum, equation), *kept)
    return pull(g.astype(jnp.bfloat16))


_narrow.defvjp(lambda equation, a, b: (_narrow(equation, a, b), (a, b)), _narrow_backward)


def rotary(
    x: Float[Array, "rows length *heads head_dim"],
    positions: Int32[Array, "*rows length"],
    frequencies: Float32[Array | np.ndarray, " pairs"],
) -> Float32[Array, "rows length *heads head_dim"]:
    """R(x): rotates the pair (x_i, x_{i + d/2}) by the angle positions * frequencies_i."""
    angle = positions.astype(jnp.float32)[..., None] * frequencies
    angle = angle.reshape(*positions.shape, *(1,) * (x.ndim - 3), len(frequencies))
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def causal_attention(
    q: Float[Array, "rows length kv_heads groups head_dim"],
    k: Float[Array, "rows keys kv_heads head_dim"],
    v: Float[Array, "rows keys kv_heads head_dim"],
    positions: Int32[Array, "*rows length"],
    window: Int32[Array | np.ndarray, ""] | None,
    scalar: float,
    sinks: Float[Array, "kv_heads groups"] | None = None,
) -> Float[Array, "rows length kv_heads groups head_dim"]:
    """softmax(q k^T / sqrt(c)) v over the keys up to the query; softmax in float32.

    Args:
      positions: Of the queries, of all rows or of each; keys and values are at 0, 1, ...
      window: Number of keys that a query sees, its own last; None for all.
      scalar: c, which is head_dim in most families.
      sinks: The logit of each head's sink.
    """
    scores = product("rqhgd,rkhd->rhgqk", q, k)
    keys = jnp.arange(k.shape[1], dtype=jnp.int32)
    visible = keys <= positions[..., None]
    if window is not None:
        visible &= keys > positions[..., None] - window
    visible = visible.reshape(-1, 1, 1, *visible.shape[-2:])
    scores = jnp.where(visible, scores / np.float32(scalar**0.5), -jnp.inf)
    if sinks is not None:
        sink = jnp.broadcast_to(sinks[..., None, None], (*scores.shape[:-1], 1))
        scores = jnp.concatenate([sink.astype(jnp.float32), scores], axis=-1)
    weights = jax.nn.softmax(scores)
    weights = weights if sinks is None else weights[..., 1:]
    return jnp.einsum("rhgqk,rkhd->rqhgd", weights.astype(v.dtype), v, precision=HIGHEST)


def fused_attention(
    q: Float[Array, "rows length kv_heads groups head_dim"],
    k: Float[Array, "rows keys kv_heads head_dim"],
    v: Float[Array, "rows keys kv_heads head_dim"],
    positions: Int32[Array, "*rows length"],
    window: None,
    scalar: float,
    sinks: None = None,
    *,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "rows length kv_heads groups head_dim"]:
    """`causal_attention` of positions from 0 on, in kernels that never have its weights in memory.

    Needs `fused_attention_runs`; by "xla" it runs anywhere, in no such kernel.

    Source: Dao et al., FlashAttention (arXiv:2205.14135).
    """
    heads = q.reshape(*q.shape[:2], -1, q.shape[-1])
    how: Any = {"is_causal": True, "scale": scalar**-0.5, "implementation": implementation}
    return jax.nn.dot_product_attention(heads, k, v, **how).reshape(q.shape)


@functools.cache
def fused_attention_runs(head_dim: int) -> bool:
    """Whether cuDNN runs `fused_attention` of bfloat16 here."""
    if jax.default_backend() != "gpu":
        return False
    x = jax.ShapeDtypeStruct((1, 64, 1, head_dim), jnp.bfloat16)
    fused = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
    try:
        jax.eval_shape(fused, x, x, x)
    except (RuntimeError, ValueError, NotImplementedError):
        return False
    return True
