"""Causal attention of many queries, a program for each head and block of queries.

    s_ij = q_i k_j / sqrt(c),   m_i = max_j s_ij,   l_i = sum_j e^(s_ij - m_i),
    a_i  = sum_j e^(s_ij - m_i) v_j,                and the output is a_i / l_i,

over blocks of keys, from the first that a query of the block sees to the last: with (m, l, a) of
those before and s of the next, the new maximum is m' = max(m, max_j s_j), and

    l' = e^(m - m') l + sum_j e^(s_j - m'),         a' = e^(m - m') a + sum_j e^(s_j - m') v_j.

So the scores of all pairs are never in memory. A sink is a key without a value, and comes first.
Exponentials are powers of two: e^x = 2^(x log2 e). Tensor cores multiply bfloat16: a factor in
float32 is the sum of three such parts (parts.py), and the six largest of nine products are added.

Source: Milakov and Gimelshein (arXiv:1805.02867), section 3; Dao, FlashAttention-2
(arXiv:2307.08691), algorithm 1.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.typing import DTypeLike
from jaxtyping import Array, BFloat16, Float, Float32, Int32

from duquantpp_jax.kernels.parts import PARTS, parts_of

LEAST = 16
"""Fewest rows and columns of a product on tensor cores."""
LOWEST = -1e30
"""Less than any score, and finite: the maximum of no key."""
LOG2_E = math.log2(math.e)
WIDEST = {jnp.dtype(jnp.float32): 128, jnp.dtype(jnp.bfloat16): 256}
"""The widest heads, by type, whose sums and factors a multiprocessor holds."""


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How the work is cut.

    Attributes:
      queries: Of a program.
      keys: Of a step.
      warps: Of a program.
      stages: Steps whose keys are read at a time.
    """

    queries: int
    keys: int
    warps: int
    stages: int


def tiling(dtype: DTypeLike, d: int, *, hopper: bool) -> Tiling:
    """The tiling for heads of width d; other GPUs have less room for factors than Hopper's."""
    if not hopper or dtype == jnp.float32:
        return Tiling(64, 32, 4, 1)
    return Tiling(64, 64, 4, 3) if d <= 128 else Tiling(64, 64, 8, 2)


def flash_attention(
    q: Float[Array, "rows length kv_heads groups d"],
    k: Float[Array, "rows keys kv_heads d"],
    v: Float[Array, "rows keys kv_heads d"],
    first: Int32[Array, " rows"],
    window: Int32[Array, ""],
    sinks: Float[Array, "kv_heads groups"] | None,
    scale: float,
    tiling: Tiling,
    *,
    interpret: bool = False,
) -> Float[Array, "rows length kv_heads groups d"]:
    """softmax(q k^T scale) v over the last `window` keys up to a query's own, from `first` on."""
    from jax.experimental.pallas import triton as plt

    rows, length, kv_heads, groups, _ = q.shape
    factors = [part for x in (q, k, v) for part in parts_of(x)]
    added = [] if sinks is None else [sinks.astype(jnp.float32)]
    given = [first, window.reshape(1), *factors, *added]
    return pl.pallas_call(
        functools.partial(_kernel, tiling, scale, len(factors) // 3),
        # The last queries see most keys: their programs start first.
        grid=(kv_heads * groups, rows, -(-length // tiling.queries)),
        in_specs=[pl.BlockSpec()] * len(given),
        out_specs=pl.BlockSpec(),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=plt.CompilerParams(num_warps=tiling.warps, num_stages=tiling.stages),
        interpret=interpret,
    )(*given)


def _kernel(
    tiling: Tiling, scale: float, parts: int, first: Any, window: Any, *others: Any
) -> None:
    q, k, v = (others[i * parts : (i + 1) * parts] for i in range(3))
    *sinks, out = others[3 * parts :]
    (_, length, _, groups, d), keys = out.shape, k[0].shape[1]
    row, block = pl.program_id(1), pl.num_programs(2) - 1 - pl.program_id(2)
    head, group = pl.program_id(0) // groups, pl.program_id(0) % groups

    # Beyond the end the last query again and again: all its results are the same.
    i = jnp.minimum(block * tiling.queries + jnp.arange(tiling.queries), length - 1)
    query, place = [part[row, i, head, group, :] for part in q], first[row] + i
    last = jnp.minimum(place, keys - 1)

    def step(number: Any, before: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        m, total, a = before
        j = number * tiling.keys + jnp.arange(tiling.keys)
        at = jnp.minimum(j, keys - 1)
        s = jnp.zeros((tiling.queries, tiling.keys), jnp.float32)
        s = _plus_product(s, query, [part[row, at, head, :].T for part in k])
        s = s * jnp.float32(scale * LOG2_E)
        seen = (j[None] <= last[:, None]) & (j[None] > place[:, None] - window[0])
        s = jnp.where(seen, s, -jnp.inf)
        new = jnp.maximum(m, jnp.max(s, axis=1))
        p, kept = jnp.exp2(s - new[:, None]), jnp.exp2(m - new)
        weights = parts_of(p.astype(out.dtype))
        a = _plus_product(a * kept[:, None], weights, [part[row, at, head, :] for part in v])
        return new, total * kept + jnp.sum(p, axis=1), a

    m = jnp.full(tiling.queries, LOWEST, jnp.float32)
    total = jnp.zeros(tiling.queries, jnp.float32)
    if sinks:
        m, total = jnp.maximum(m, sinks[0][head, group] * jnp.float32(LOG2_E)), total + 1
    start = m, total, jnp.zeros((tiling.queries, d), jnp.float32)
    begin = jnp.maximum(first[row] + block * tiling.queries - window[0] + 1, 0) // tiling.keys
    end = jnp.minimum(first[row] + jnp.minimum((block + 1) * tiling.queries, length), keys)
    m, total, a = lax.fori_loop(begin, pl.cdiv(end, tiling.keys), step, start)
    out[row, i, head, group, :] = (a / total[:, None]).astype(out.dtype)


def _plus_product(
    start: Float32[Array, "m n"], a: list[BFloat16[Array, "m k"]], b: list[BFloat16[Array, "k n"]]
) -> Float32[Array, "m n"]:
    """start + a b, of factors that are sums of parts; small products are added first."""
    pairs = [(x, y) for x in range(len(a)) for y in range(len(b)) if x + y < PARTS]
    for x, y in sorted(pairs, key=sum, reverse=True):
        start += jnp.dot(a[x], b[y], preferred_element_type=jnp.float32)
    return start
