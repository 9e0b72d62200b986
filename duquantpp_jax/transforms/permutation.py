"""Permutations, which choose the channels that share a block.

A rotation spreads an outlier over its own block only, so the choice of blocks may matter. For b
blocks,

    zigzag   sorts channels by max |x_j|, largest first, and deals them to the blocks in snake
             order, 0 1 ... b-1 b-1 ... 1 0 0 1 ...; so each block is sorted too
    mass     sorts channels by mass, the mean of |x_j|, largest first, and gives each to the block
             with room whose total mass is least (the first of equals), so that all blocks have
             about the same mass
    random   is uniform, drawn with the key

`mass` has the aim of PeRQ, blocks of equal expected l1 norm; the algorithm of that paper may break
ties differently or start elsewhere.

Sources: zigzag: DuQuant, arXiv 2406.01721; mass: PeRQ, arXiv 2601.22347.
"""

import dataclasses
import heapq
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from duquantpp_jax.core import Fitted, Needs, RandomKey, Recipe, Stats, Weights
from duquantpp_jax.transforms.basic import Permute
from duquantpp_jax.transforms.block import rotation_size


def zigzag(values: Float[np.ndarray, " k"], size: int) -> Int[np.ndarray, " k"]:
    """The order that deals channels to blocks in snake order, the largest value first."""
    dealt = np.argsort(-values, kind="stable").reshape(size, -1)
    dealt[1::2] = dealt[1::2, ::-1]
    return dealt.T.ravel()


def balanced(mass: Float[np.ndarray, " k"], size: int) -> Int[np.ndarray, " k"]:
    """The order that gives each channel, largest mass first, to the lightest block with room."""
    blocks: list[list[int]] = [[] for _ in range(len(mass) // size)]
    totals = [(0.0, block) for block in range(len(blocks))]
    for channel in np.argsort(-mass, kind="stable"):
        total, block = heapq.heappop(totals)
        blocks[block].append(int(channel))
        if len(blocks[block]) < size:
            heapq.heappush(totals, (total + float(mass[channel]), block))
    return np.concatenate(blocks)


@dataclasses.dataclass(frozen=True)
class FitPermutation:
    """Reorders channels, which chooses those that share a block.

    Attributes:
      size: Channels of a block, which a later rotation mixes.
    """

    kind: Literal["zigzag", "mass", "random"]
    size: int = 32
    needs = Needs.NOTHING

    @property
    def draws(self) -> bool:
        return self.kind == "random"

    def __call__(self, weights: Weights, stats: Stats, recipe: Recipe, key: RandomKey) -> Fitted:
        width = weights[0].shape[-1]
        size = rotation_size(self.size, width)
        match self.kind:
            case "zigzag":
                order = zigzag(np.asarray(stats.absmax), size)
            case "mass":
                order = balanced(np.abs(np.asarray(stats.sample, np.float64)).mean(axis=0), size)
            case "random":
                order = jax.random.permutation(key, width)
        return Fitted(Permute(jnp.asarray(order, jnp.int32)))
