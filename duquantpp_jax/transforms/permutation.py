"""Permutations: which channels share a block.

A rotation spreads an outlier over its own block only, so who sits beside whom may matter. With
b blocks of B channels and one number for each channel,

    zigzag   channels sorted by max |x_j|, largest first, are dealt to the blocks in snake order,
             0 1 ... b-1 b-1 ... 1 0 0 1 ...; so each block is sorted too
    mass     channels sorted by their mass, the mean of |x_j|, largest first, go one after the
             other to the block whose total is least so far among those with room (of equal ones
             the first), so that all blocks carry about the same mass
    random   uniform, drawn with the key

`mass` has the goal of PeRQ, blocks of equal expected l1 norm, by the greedy rule stated here; that
paper's own algorithm may break ties or start elsewhere.

Sources: zigzag: DuQuant, arXiv 2406.01721; mass: PeRQ, arXiv 2601.22347.
"""

import dataclasses
import heapq
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int, Key

from duquantpp_jax.core import Channels, Cost, Fitted, Needs, Recipe, Stats, Transform, Weights
from duquantpp_jax.transforms.block import rotation_size


@struct.dataclass
class Permute(Transform):
    """T is a permutation matrix: channel j of the moved input is channel order[j] of the input."""

    order: Int[Array, "*layers k"]

    def activations(self, x: Float[Array, "*tokens k"]) -> Float[Array, "*tokens k"]:
        width = self.order.shape[-1]
        if x.shape[-1] != width:  # a gather would clamp what is out of range, and say nothing
            raise ValueError(f"a permutation of {width} channels got a width of {x.shape[-1]}")
        return jnp.take(x, self.order, axis=-1)

    def weights(self, w: Float[Array, "*outputs k"]) -> Float[Array, "*outputs k"]:
        return self.activations(w)

    def inverse(self) -> Transform:
        return Permute(jnp.argsort(self.order, axis=-1).astype(self.order.dtype))

    def maxima(
        self, absmax: Float[Array, " k"], moved: Float[Array, "tokens k"]
    ) -> Float[Array, " k"]:
        return self.activations(absmax)

    def cost(self, width: int) -> Cost:
        return Cost(0, self.order.nbytes, fuses=True)

    def as_channels(self, width: int) -> Channels:
        order = np.asarray(self.order)
        return Channels(order, np.ones(len(order), np.float32))


def zigzag(values: Float[np.ndarray, " k"], size: int) -> Int[np.ndarray, " k"]:
    """Channels dealt in snake order, the largest value first."""
    dealt = np.argsort(-values, kind="stable").reshape(size, -1)
    dealt[1::2] = dealt[1::2, ::-1]
    return dealt.T.ravel()


def balanced(mass: Float[np.ndarray, " k"], size: int) -> Int[np.ndarray, " k"]:
    """Channels dealt to the block of least total mass that has room, the largest mass first."""
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
    """Chooses which channels share a block; see the top of this file.

    Attributes:
      kind: How.
      size: Channels of a block: those that the rotation after it mixes.
    """

    kind: Literal["zigzag", "mass", "random"]
    size: int = 32
    needs = Needs.NOTHING

    @property
    def draws(self) -> bool:
        """Only one kind is random."""
        return self.kind == "random"

    def __call__(
        self, weights: Weights, stats: Stats, recipe: Recipe, key: Key[Array, ""]
    ) -> Fitted:
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
