"""A linear layer in MXFP4: rotate and quantize the input, multiply with quantized weights.

    y = Q(t(x)) W_q^T        where W_q holds t.weights(w), so that y ~ x w^T

The derivative is straight-through: Q counts as the identity, and y as t(x) W_q^T.

Source of the estimator: Bengio et al., arXiv 1308.3432, section 3.1.
"""

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float

from duquantpp_jax.core import Chain, ScaleRule, Transform
from duquantpp_jax.kernels.operand import Operand
from duquantpp_jax.kernels.rotate_quantize.api import rotate_quantize
from duquantpp_jax.kernels.scaled_matmul.api import scaled_matmul
from duquantpp_jax.transforms.basic import Identity, Smooth
from duquantpp_jax.transforms.block import BlockAffine, BlockRotation, lower

__all__ = ["quantized_linear"]

BLOCK = 32
Implementation = Literal["mosaic_sm100", "reference"]


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
    block_matrices(transform, k)  # raises here, not in a trace of the derivative
    # Leaves and structure apart: JAX's transformations put other things than arrays in a pytree,
    # which the types of a transform refuse.
    leaves, structure = jax.tree.flatten(transform)
    options = (structure, scale_rule, jnp.dtype(out_dtype or x.dtype), implementation)
    flat = x.reshape(math.prod(tokens), k)
    return _linear(options, flat, weights, leaves).reshape(*tokens, weights.shape[0])


def block_matrices(
    transform: Transform, width: int
) -> tuple[Float[Array, "blocks 32 32"], Float[Array, " k"] | None]:
    """The matrices and the smoothing vector that move blocks of 32 as the transform does.

    Raises:
      ValueError: The transform mixes blocks.
    """
    match transform:
        case Identity():
            return jnp.eye(BLOCK, dtype=jnp.float32)[None], None
        case BlockRotation() | BlockAffine() if transform.matrices.shape[1:] == (BLOCK, BLOCK):
            return transform.matrices, None
    match lower(transform, width, BLOCK):
        case Chain((Smooth(scale), BlockAffine(matrices, _))):
            return matrices, scale
    raise ValueError(
        f"{type(transform).__name__} does not keep to blocks of {BLOCK}: apply it to x before, "
        "and give the rest of the chain"
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(options: tuple, x: Array, weights: Operand, leaves: list) -> Array:
    return _batched(options)(x, weights, leaves)


def _forward(options: tuple, x: Array, weights: Operand, leaves: list):
    return _linear(options, x, weights, leaves), (x, weights, leaves)


def _backward(options: tuple, saved: tuple, gradient: Array):
    x, weights, leaves = saved
    w = weights.dequantize()

    def straight_through(x: Array, leaves: list) -> Array:
        y = options[0].unflatten(leaves).activations(x.astype(jnp.float32))
        return jnp.matmul(y, w.T, precision=jax.lax.Precision.HIGHEST)

    _, pull = jax.vjp(straight_through, x, leaves)
    to_x, to_leaves = pull(gradient.astype(jnp.float32))
    return to_x, None, to_leaves  # weights are codes: nothing to derive


_linear.defvjp(_forward, _backward)


@functools.cache
def _batched(options: tuple):
    """The two kernels; under vmap over x alone, its rows become rows of one larger matmul."""
    structure, scale_rule, out_dtype, implementation = options

    @custom_vmap
    def run(x: Array, weights: Operand, leaves: list) -> Array:
        matrices, smooth = block_matrices(structure.unflatten(leaves), x.shape[-1])
        moved = rotate_quantize(
            x, matrices, smooth, scale_rule=scale_rule, implementation=implementation
        )
        return scaled_matmul(moved, weights, out_dtype=out_dtype, implementation=implementation)

    @run.def_vmap
    def _(size: int, batched: Any, x: Array, weights: Operand, leaves: list):
        if not any(jax.tree.leaves(batched[1:])):
            flat = run(x.reshape(-1, x.shape[-1]), weights, leaves)
            return flat.reshape(size, -1, flat.shape[-1]), True

        def spread(leaf: Array, is_batched: bool) -> Array:
            return leaf if is_batched else jnp.broadcast_to(leaf, (size, *leaf.shape))

        arguments = jax.tree.map(spread, (x, weights, leaves), tuple(batched))
        return jax.lax.map(lambda each: run(*each), arguments), True

    return run
