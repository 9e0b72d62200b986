"""A few tokens moved by a matrix for each block and quantized, in one kernel.

y_b = x_b M_b,      Q(y_b) = (2^E_b, elements)        E_b by a rule from max |y_b|
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float32, Int32

from duquantpp_jax.core import ScaleRule
from duquantpp_jax.formats.division import power_of_two
from duquantpp_jax.kernels.block_scale import (
    RAISED_ABOVE,
    magnitude,
    nearest,
    scale_of,
    with_sign,
)
from duquantpp_jax.kernels.matvec.tokens import Tokens

BLOCKS = 2
"""Blocks of a program."""


def to_tokens(
    x: Float32[Array, "tokens blocks 32"],
    matrices: Float32[Array, "layers blocks 32 32"],
    layer: Int32[Array, ""],
    rule: ScaleRule,
    *,
    interpret: bool = False,
) -> Tokens:
    """Q(x_b M_b) for each block, a multiple of BLOCKS of them."""
    from jax.experimental.pallas import triton as plt

    m, blocks, _ = x.shape
    words, scale_bytes = pl.pallas_call(
        functools.partial(_kernel, RAISED_ABOVE[rule]),
        grid=(blocks // BLOCKS,),
        in_specs=[pl.BlockSpec()] * 3,
        out_specs=[pl.BlockSpec((rows, BLOCKS), lambda i: (0, i)) for rows in (8 * m, m)],
        out_shape=[
            jax.ShapeDtypeStruct((8 * m, blocks), jnp.uint32),
            jax.ShapeDtypeStruct((m, blocks), jnp.uint8),
        ],
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
    )(layer.reshape(1), x, matrices)
    return Tokens(words, scale_bytes)


def _kernel(raised_above: int, layer: Any, x: Any, matrices: Any, words: Any, bytes: Any) -> None:
    at = pl.ds(pl.program_id(0) * BLOCKS, BLOCKS)
    own = matrices[layer[0], at, :, :]
    for token in range(len(bytes)):
        y = jnp.sum(x[token, at, :][:, :, None] * own, axis=1)
        exponent, bad = scale_of(jnp.max(magnitude(y), axis=1), raised_above)
        twice = 2 * nearest(jnp.abs(y) * power_of_two(-exponent)[:, None])
        value = with_sign(twice, y).astype(jnp.int32)
        byte = jnp.where(bad[:, None], 0, value) & 0xFF
        shifts = 8 * lax.broadcasted_iota(jnp.int32, (BLOCKS, 8, 4), 2)
        word = jnp.sum(byte.reshape(BLOCKS, 8, 4) << shifts, axis=2)
        words[pl.ds(8 * token, 8), :] = word.T.astype(jnp.uint32)
        bytes[token, :] = jnp.where(bad, 255, exponent + 127).astype(jnp.uint8)
