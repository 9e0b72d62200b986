"""The attention of one token, a program for each head and run of positions, as far as it sees.

    s_j = q k_j / sqrt(c),   m = max_j s_j,   l = sum_j exp(s_j - m),   a = sum_j exp(s_j - m) v_j

are kept over tiles of positions, and of runs with (m, l, a) and (m', l', a') the whole is

    M = max(m, m'),    (e^(m - M) a + e^(m' - M) a') / (e^(m - M) l + e^(m' - M) l')

A single run is divided by its l at once, in the same kernel.

Source: Milakov and Gimelshein (arXiv:1805.02867), section 3; Dao et al., FlashAttention
(arXiv:2205.14135), and its form for decoding, which cuts positions into runs.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, BFloat16, Float, Int32

from duquantpp_jax.kernels.parts import parts_of

TILE, TILES, LEAST = 64, 4, 16
"""Positions of a tile, tiles of a run, and the fewest rows that tensor cores take."""


def decode_attention(
    q: Float[Array, "rows kv_heads groups d"],
    keys: BFloat16[Array, "layers rows capacity kv_heads d"],
    values: BFloat16[Array, "layers rows capacity kv_heads d"],
    layer: Int32[Array, ""],
    positions: Int32[Array, " rows"],
    window: Int32[Array, ""],
    scale: float,
    *,
    interpret: bool = False,
) -> Float[Array, "rows kv_heads groups d"]:
    """softmax(q k^T scale) v over the last `window` positions up to a row's own."""
    from jax.experimental.pallas import triton as plt

    (rows, heads, groups, d), capacity = q.shape, keys.shape[2]
    tile = math.gcd(capacity, TILE)
    runs = -(-capacity // (tile * TILES))
    shape = (rows, heads, runs, groups)
    found = [jax.ShapeDtypeStruct(s, jnp.float32) for s in (shape, shape, (*shape, d))]
    if runs == 1:
        found = [jax.ShapeDtypeStruct((rows, heads, groups, d), q.dtype)]
    found = pl.pallas_call(
        functools.partial(_kernel, tile, scale),
        grid=shape[:3],
        in_specs=[pl.BlockSpec()] * 6,
        out_specs=[pl.BlockSpec()] * len(found),
        out_shape=found,
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
    )(layer.reshape(1), positions, window.reshape(1), q, keys, values)
    if runs == 1:
        return found[0]
    most, total, sums = found
    share = jnp.exp(most - jnp.max(most, axis=2, keepdims=True))
    whole = jnp.sum(share[..., None] * sums, axis=2) / jnp.sum(share * total, axis=2)[..., None]
    return whole.astype(q.dtype)


def _kernel(
    tile: int, scale: float, layer: Any, positions: Any, window: Any, q: Any, keys: Any,
    values: Any, *out: Any,
) -> None:  # fmt: skip
    row, head, run = (pl.program_id(axis) for axis in range(3))
    own, last = layer[0], positions[row]
    first = jnp.maximum(last - window[0] + 1, 0)
    begin = jnp.maximum(run * TILES, first // tile)
    end = jnp.minimum((run + 1) * TILES, last // tile + 1)
    # The last query again and again, up to the rows of a product: all its results are the same.
    groups = q.shape[2]
    every = jnp.minimum(jnp.arange(1 << (max(groups, LEAST) - 1).bit_length()), groups - 1)
    query = q[row, head, every, :]

    def step(i: Any, before: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        m, total_before, a = before
        at = pl.ds(i * tile, tile)
        k, v = keys[own, row, at, head, :], values[own, row, at, head, :]
        s = _product(query, k.T) * jnp.float32(scale)
        place = i * tile + lax.broadcasted_iota(jnp.int32, s.shape, 1)
        s = jnp.where((place >= first) & (place <= last), s, -jnp.inf)
        new = jnp.maximum(m, jnp.max(s, axis=1))
        p, kept = jnp.exp(s - new[:, None]), jnp.exp(m - new)
        a = a * kept[:, None] + _product(p.astype(q.dtype), v)
        return new, total_before * kept + jnp.sum(p, axis=1), a

    count, d = query.shape
    zeros = jnp.zeros(count, jnp.float32)
    start = jnp.full(count, -jnp.inf, jnp.float32), zeros, jnp.zeros((count, d), jnp.float32)
    m, total, a = lax.fori_loop(begin, end, step, start)
    if len(out) == 1:
        out[0][row, head, every, :] = (a / total[:, None]).astype(q.dtype)
        return
    for ref, part in zip(out[:2], (m, total), strict=True):
        ref[row, head, run, every] = part
    out[2][row, head, run, every, :] = a


def _product(a: Array, b: Array) -> Array:
    """a b with sums in float32, b in bfloat16."""
    return functools.reduce(
        jnp.add,
        [jnp.dot(part, b, preferred_element_type=jnp.float32) for part in parts_of(a)[::-1]],
    )
