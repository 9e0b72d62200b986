"""Experts in the walk: each is a site of its own, and a stack of them is treated one by one.

Stats of an expert are of the tokens that it gets. An expert that got fewer than FEWEST has too few
for a Gram matrix, or for a maximum: it takes the layer's, in which all experts are pooled. Counts
and sums add up, maxima are the largest, and the token sample is drawn evenly from the samples. A
sample that has room left repeats its tokens, for fits that hold the last of them out.

Each expert moves inputs by a transform of its own, so that inputs which other experts have moved
say nothing about it. Where Stats of moved inputs are needed, an expert with few tokens moves the
layer's sample itself.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from duquantpp_jax.core import Fitted, Format, Stats
from duquantpp_jax.models import DecoderConfig
from duquantpp_jax.models.layers import join_layers
from duquantpp_jax.models.parameters import experts
from duquantpp_jax.ptq.site import quantize_input

FEWEST = 64
"""Tokens that an expert must have seen for Stats of its own: two blocks of channels."""


def by_expert(config: DecoderConfig, site: str, of_one: Callable[..., Any]) -> Callable[..., Any]:
    """`of_one` of the part of each expert of stacks, stacked again; itself without experts."""
    if not (count := experts(config, site)):
        return of_one
    return lambda *stacked: join_layers(of_one(*parts) for parts in parts_of(count, *stacked))


def parts_of(count: int, *stacked: Any) -> list[tuple[Any, ...]]:
    """The part of each of `count` experts of stacked pytrees; of none, the pytrees themselves."""
    if not count:
        return [stacked]
    return [_part(stacked, np.int32(expert)) for expert in range(count)]


@jax.jit
def _part(stacked: Any, expert: Int[Array | np.ndarray, ""]) -> Any:
    """One program for all experts: an index that is a constant would compile one for each."""
    return jax.tree.map(lambda leaf: leaf[expert], stacked)


def pooled(config: DecoderConfig, site: str, stats: Stats, instead: Stats | None = None) -> Stats:
    """The Stats with others for experts that saw too few tokens; samples are full.

    Args:
      instead: What such experts take, for each of them; None for the Stats of the layer.
    """
    if not experts(config, site):
        return stats
    seen, samples = np.asarray(stats.count), np.asarray(stats.sample)
    room, few = samples.shape[1], seen < FEWEST
    kept = [x[: -(-n // stats.stride)] for x, n in zip(samples, seen, strict=True)]
    every = np.concatenate(kept)
    drawn = [every if short else own for own, short in zip(kept, few, strict=True)]
    full = np.stack([tokens[np.arange(room) * len(tokens) // room] for tokens in drawn])
    if instead is None:
        whole = jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), stats)
        instead = dataclasses.replace(whole, absmax=jnp.max(stats.absmax, axis=0))
    else:
        full[few] = np.asarray(instead.sample)[few]

    def chosen(own: jax.Array, other: jax.Array) -> jax.Array:
        return jnp.where(few.reshape(-1, *[1] * (own.ndim - 1)), other, own)

    return dataclasses.replace(jax.tree.map(chosen, stats, instead), sample=jnp.asarray(full))


def pooled_moved(
    config: DecoderConfig, site: str, moved: Stats, stats: Stats, fits: Fitted, format: Format
) -> Stats:
    """`pooled` of the Stats of moved and quantized inputs; see the top of this file.

    Args:
      stats: Of the inputs before they are moved, pooled.
      fits: What each expert moves its inputs by.
    """
    if not experts(config, site) or np.all(np.asarray(moved.count) >= FEWEST):
        return pooled(config, site, moved)

    def alone(own: Stats, plain: Stats, fitted: Fitted) -> Stats:
        if int(own.count) >= FEWEST:
            return own
        tokens = quantize_input(plain.sample, fitted, format)
        found = jax.tree.map(jnp.zeros_like, own).update(tokens[None], jnp.int32(0))
        return dataclasses.replace(found, sample=tokens)

    return pooled(config, site, moved, by_expert(config, site, alone)(moved, stats, fits))
