"""A few tokens moved by a matrix for each block and quantized, in one kernel.

y_b = f(x)_b M_b,      Q(y_b) = (2^E_b, elements)        E_b by a rule from max |y_b|

f is a norm or an activation (models/prologue.py). Each program has a few blocks, and for a norm
adds the squares of all of them by itself: a token is read from the cache of the device.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
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
from duquantpp_jax.kernels.matvec.rows import in_blocks
from duquantpp_jax.kernels.matvec.tokens import Tokens
from duquantpp_jax.models.in_place import InPlace
from duquantpp_jax.models.prologue import Prologue

BLOCKS, WARPS, SUMMED = 2, 4, 128
"""Blocks of a program, and its warps; most blocks whose squares are added at a time."""


def to_tokens(
    x: Prologue,
    matrices: Float32[Array, "layers blocks 32 32"],
    layer: Int32[Array, ""],
    rule: ScaleRule,
    *,
    interpret: bool = False,
) -> Tokens:
    """Q(f(x)_b M_b) for each block, a multiple of BLOCKS of them; the residual is left alone."""
    from jax.experimental.pallas import triton as plt

    m, blocks = len(x.parts[0]), matrices.shape[1]
    given, ready = in_a_kernel(x, blocks)
    words, scale_bytes = pl.pallas_call(
        functools.partial(_kernel, ready, RAISED_ABOVE[rule]),
        grid=(blocks // BLOCKS,),
        in_specs=[pl.BlockSpec()] * (2 + len(given)),
        out_specs=[pl.BlockSpec((rows, BLOCKS), lambda i: (0, i)) for rows in (8 * m, m)],
        out_shape=[
            jax.ShapeDtypeStruct((8 * m, blocks), jnp.uint32),
            jax.ShapeDtypeStruct((m, blocks), jnp.uint8),
        ],
        compiler_params=plt.CompilerParams(num_warps=WARPS, num_stages=1),
        interpret=interpret,
    )(layer.reshape(1), matrices, *given)
    return Tokens(words, scale_bytes)


def in_a_kernel(x: Prologue, blocks: int) -> tuple[list[Array], Callable[..., Array]]:
    """What a kernel is given of x, and f(x) of some blocks by what stands for that in the kernel:
    a function of the layer, the token, the blocks, and what it was given."""
    given = [in_blocks(part, blocks) for part in x.parts]
    given += [in_blocks(x.gain.arrays, blocks)] if isinstance(x.gain, InPlace) else []
    bare = dataclasses.replace(x, parts=(None,) * len(x.parts), gain=None, residual=None)
    return given, functools.partial(_ready, bare, x.shape[1], x.gain is not None)


def _kernel(ready: Any, raised_above: int, layer: Any, matrices: Any, *refs: Any) -> None:
    *given, words, bytes = refs
    at = pl.ds(pl.program_id(0) * BLOCKS, BLOCKS)
    own = matrices[layer[0], at, :, :]
    for token in range(len(bytes)):
        x = ready(layer[0], token, at, given)
        y = jnp.sum(x[:, :, None] * own, axis=1)
        exponent, bad = scale_of(jnp.max(magnitude(y), axis=1), raised_above)
        twice = 2 * nearest(jnp.abs(y) * power_of_two(-exponent)[:, None])
        value = with_sign(twice, y).astype(jnp.int32)
        byte = jnp.where(bad[:, None], 0, value) & 0xFF
        shifts = 8 * lax.broadcasted_iota(jnp.int32, (BLOCKS, 8, 4), 2)
        word = jnp.sum(byte.reshape(BLOCKS, 8, 4) << shifts, axis=2)
        words[pl.ds(8 * token, 8), :] = word.T.astype(jnp.uint32)
        bytes[token, :] = jnp.where(bad, 255, exponent + 127).astype(jnp.uint8)


def _ready(
    prologue: Prologue, width: int, normed: bool, layer: Any, token: int, at: Any, given: list[Any]
) -> Float32[Array, "blocks 32"]:
    """f(x) of some blocks."""
    parts = [part[token, at, :] for part in given[: len(prologue.parts)]]
    x = parts[0] if prologue.activation is None else prologue.activation(*parts)
    if normed:
        blocks = given[0].shape[1]
        step = math.gcd(blocks, SUMMED)
        runs = [given[0][token, pl.ds(first, step), :] for first in range(0, blocks, step)]
        squares = [jnp.sum(run.astype(jnp.float32) * run.astype(jnp.float32)) for run in runs]
        factor = lax.rsqrt(sum(squares) / width + prologue.eps)
        gain = given[-1][layer, at, :].astype(jnp.float32) + prologue.offset
        x = x.astype(jnp.float32) * factor * gain
    return x.astype(prologue.dtype).astype(jnp.float32)
