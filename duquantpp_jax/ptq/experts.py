"""Experts in the walk: each is a site of its own, and a stack of them is treated one by one.

Stats of an expert are of the tokens that it gets. An expert that got fewer than FEWEST has too few
for a Gram matrix, or for a maximum: it takes the layer's, in which all experts are pooled. Counts
and sums add up, maxima are the largest, and the token sample is drawn evenly from the samples.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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
    return [jax.tree.map(lambda leaf: leaf[e], stacked) for e in range(count)]  # noqa: B023


def pooled(config: DecoderConfig, site: str, stats: Stats) -> Stats:
    """The Stats with those of the layer for experts that saw too few tokens."""
    seen = np.asarray(stats.count)
    if not experts(config, site) or not (short := seen < FEWEST).any():
        return stats
    whole = jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), stats)
    room = stats.sample.shape[1]
    counts = np.minimum(-(-seen // stats.stride), room)
    kept = np.concatenate([x[:n] for x, n in zip(np.asarray(stats.sample), counts, strict=True)])
    spaced = np.arange(room) * len(kept) // room
    whole = dataclasses.replace(
        whole, sample=jnp.asarray(kept[spaced]), absmax=jnp.max(stats.absmax, axis=0)
    )

    def chosen(own: jax.Array, shared: jax.Array) -> jax.Array:
        return jnp.where(short.reshape(-1, *[1] * shared.ndim), shared, own)

    return jax.tree.map(chosen, stats, whole)
