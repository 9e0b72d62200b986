"""A linear layer in MXFP4: rotate and quantize the input, multiply with quantized weights.

    y = Q(t(x)) W_q^T        where W_q holds t.weights(w), so that y ~ x w^T

The derivative is straight-through: Q counts as the identity, and y as t(x) W_q^T.

Source of the estimator: Bengio et al., arXiv 1308.3432, section 3.1.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float

from duquantpp_jax.core import ScaleRule, Transform
from duquantpp_jax.kernels.operand import Operand
from duquantpp_jax.kernels.rotate_quantize.api import Implementation, rotate_quantize
from duquantpp_jax.kernels.scaled_matmul.api import scaled_matmul
from duquantpp_jax.transforms.block import multiply_blocks

BLOCK = 32


def quantized_linear(
    x: Float[Array, "*tokens k"],
    weights: Operand,
    transform: Transform,
    *,
    scale_rule: ScaleRule = ScaleRule.FLOOR,
    out_dtype: Any = None,
    implementation: Implementation | None = None,
) -> Float[Array, "*tokens n"]:
    """x w^T with both sides in MXFP4. Differentiable in x and transform, straight-through.

    >>> import jax.numpy as jnp
    >>> from duquantpp_jax import MXFP4
    >>> from duquantpp_jax.transforms import BlockRotation
    >>> rotation = BlockRotation(jnp.eye(32)[None])
    >>> weights = Operand.from_mx(MXFP4().quantize(rotation.weights(jnp.ones((8, 64)))))
    >>> quantized_linear(jnp.ones((2, 64)), weights, rotation)[0, 0].item()
    64.0

    Args:
      x: Activations, tokens in any number of leading axes.
      weights: MXFP4 of transform.weights(w), as `Operand.from_mx` lays it out.
      transform: Smoothing and rotations within blocks of 32; what mixes blocks has to be applied
        to x before.
      scale_rule: For the activations.
      out_dtype: bfloat16 or float32; that of x if not given.
      implementation: Of both kernels: "mosaic_sm100", "reference", or None for what runs here.

    Raises:
      ValueError: Widths differ, the transform mixes blocks, or as the kernels say.
      RuntimeError: The named implementation cannot run here.
    """
    *tokens, k = x.shape
    if k != weights.shape[1]:
        raise ValueError(f"x has {k} columns and weights {weights.shape[1]}: they must be equal")
    if (blocks := transform.as_blocks(k, BLOCK)) is None:
        raise ValueError(
            f"{type(transform).__name__} does not keep to blocks of {BLOCK}: apply it to x before, "
            "and give the rest of the chain"
        )
    matrices = jnp.eye(BLOCK, dtype=jnp.float32)[None] if blocks.matrices is None else blocks[1]
    options = (scale_rule, jnp.dtype(out_dtype or x.dtype), implementation)
    flat = x.reshape(math.prod(tokens), k)
    moved = _linear(options, flat, weights, matrices, blocks.divisor)
    return moved.reshape(*tokens, weights.shape[0])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(
    options: tuple, x: Array, weights: Operand, matrices: Array, smooth: Array | None
) -> Array:
    return _batched(options)(x, weights, matrices, smooth)


def _forward(options: tuple, *operands: Any):
    return _linear(options, *operands), operands


def _backward(options: tuple, operands: tuple, gradient: Array):
    x, weights, matrices, smooth = operands
    w = weights.dequantize()

    def straight_through(x: Array, matrices: Array, smooth: Array | None) -> Array:
        x = x.astype(jnp.float32)
        moved = multiply_blocks(x if smooth is None else x / smooth, matrices)
        return jnp.matmul(moved, w.T, precision=jax.lax.Precision.HIGHEST)

    _, pull = jax.vjp(straight_through, x, matrices, smooth)
    to_x, *to_transform = pull(gradient.astype(jnp.float32))
    return to_x, None, *to_transform  # weights are codes: nothing to derive


_linear.defvjp(_forward, _backward)


@functools.cache
def _batched(options: tuple):
    """The two kernels; under vmap over x alone, its rows become rows of one larger matmul."""
    scale_rule, out_dtype, implementation = options

    @custom_vmap
    def run(x: Array, *others: Any) -> Array:
        weights, matrices, smooth = others
        moved = rotate_quantize(
            x, matrices, smooth, scale_rule=scale_rule, implementation=implementation
        )
        return scaled_matmul(moved, weights, out_dtype=out_dtype, implementation=implementation)

    @run.def_vmap
    def _(size: int, batched: Any, x: Array, *others: Any):
        if not any(jax.tree.leaves(batched[1:])):
            flat = run(x.reshape(-1, x.shape[-1]), *others)
            return flat.reshape(size, -1, flat.shape[-1]), True

        def spread(leaf: Array, is_batched: bool) -> Array:
            return leaf if is_batched else jnp.broadcast_to(leaf, (size, *leaf.shape))

        arguments = jax.tree.map(spread, (x, *others), tuple(batched))
        return jax.lax.map(lambda each: run(*each), arguments), True

    return run
