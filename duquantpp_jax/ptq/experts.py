"""Experts in the walk: each is a site of its own, and a stack of them is treated one by one.

Stats of an expert are of the tokens that it gets. An expert that got fewer than FEWEST has too few
for a Gram matrix, or for a maximum: it takes the layer's, in which all experts are pooled. Counts
and sums add up, maxima are the largest, and the token sample is drawn evenly from the samples. A
sample that has room left repeats its tokens, for fits that hold the last of them out.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from duquantpp_jax.core import Stats
from duquantpp_jax.models import DecoderConfig
from duquantpp_jax.models.layers import join_layers
from duquantpp_jax.models.parameters import experts

FEWEST = 64
"""Tokens that an expert must have seen for Stats of its own: two blocks of channels."""


def by_expert(config: DecoderConfig, site: str, of_one: Callable[..., Any], *stacked: Any) -> Any:
    """`of_one` of the part of each expert, stacked again; of the whole where there are none."""
    if not (count := experts(config, site)):
        return of_one(*stacked)
    return join_layers(of_one(*parts) for parts in parts_of(count, *stacked))


def parts_of(count: int, *stacked: Any) -> list[tuple[Any, ...]]:
    """The part of each of `count` experts of stacked pytrees; of none, the pytrees themselves."""
    if not count:
        return [stacked]
    return [_part(stacked, np.int32(expert)) for expert in range(count)]


@jax.jit
def _part(stacked: Any, expert: Int[Array | np.ndarray, ""]) -> Any:
    """One program for all experts: an index that is a constant would compile one for each."""
    return jax.tree.map(lambda leaf: leaf[expert], stacked)


def pooled(config: DecoderConfig, site: str, stats: Stats) -> Stats:
    """The Stats with those of the layer for experts that saw too few tokens; samples are full."""
    if not experts(config, site):
        return stats
    seen, samples = np.asarray(stats.count), np.asarray(stats.sample)
    room, few = samples.shape[1], seen < FEWEST
    kept = [x[: -(-n // stats.stride)] for x, n in zip(samples, seen, strict=True)]
    every = np.concatenate(kept)
    drawn = [every if short else own for own, short in zip(kept, few, strict=True)]
    full = np.stack([tokens[np.arange(room) * len(tokens) // room] for tokens in drawn])
    whole = jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), stats)
    whole = dataclasses.replace(whole, absmax=jnp.max(stats.absmax, axis=0))

    def chosen(own: jax.Array, shared: jax.Array) -> jax.Array:
        return jnp.where(few.reshape(-1, *[1] * shared.ndim), shared, own)

    return dataclasses.replace(jax.tree.map(chosen, stats, whole), sample=jnp.asarray(full))
