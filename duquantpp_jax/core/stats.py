"""The noun Stats: what calibration keeps of one input site. A fold whose merge is associative."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from duquantpp_jax.core.transform import Transform


@struct.dataclass
class Stats:
    """What calibration keeps of one input site: a fold over batches of tokens.

    `merge` is associative and commutative (up to the order of float additions in `gram` and
    `position_sum`; exactly for the rest), so that batches may be split over devices.

    Attributes:
      count: Tokens seen.
      absmax: Largest magnitude of each channel.
      sample: Every `stride`-th token, by its index in the whole calibration set.
      gram: X^T X over all tokens, where a fit asks for it.
      position_sum: Sum over rows of the token at each position, where a fit asks for it.
      stride: Tokens of the calibration set for one of the sample.
    """

    count: Int[Array, "*layers"]
    absmax: Float[Array, "*layers k"]
    sample: Float[Array, "*layers samples k"]
    gram: Float[Array, "*layers k k"] | None
    position_sum: Float[Array, "*layers length k"] | None
    stride: int = struct.field(pytree_node=False)

    @classmethod
    def init(
        cls,
        width: int,
        rows: int,
        length: int,
        *,
        sample_limit: int = 2048,
        needs: frozenset[str] = frozenset(),
    ) -> Stats:
        """Stats of no token yet, for a calibration set of rows x length tokens.

        Args:
          width: Channels k of the site.
          sample_limit: Most tokens kept as they are.
          needs: Of "gram" and "positions", what is to be kept besides.
        """
        stride = -(-rows * length // sample_limit)
        return cls(
            count=jnp.zeros((), jnp.int32),
            absmax=jnp.zeros(width, jnp.float32),
            sample=jnp.zeros((-(-rows * length // stride), width), jnp.float32),
            gram=jnp.zeros((width, width), jnp.float32) if "gram" in needs else None,
            position_sum=(
                jnp.zeros((length, width), jnp.float32) if "positions" in needs else None
            ),
            stride=stride,
        )

    def update(self, x: Float[Array, "rows length k"], first: Int[Array, ""]) -> Stats:
        """Folds in whole rows of tokens.

        Args:
          x: Inputs of the site.
          first: Index of x's first token in the whole calibration set.
        """
        tokens = x.reshape(-1, x.shape[-1])
        index = first + jnp.arange(tokens.shape[0])
        slot = jnp.where(index % self.stride == 0, index // self.stride, self.sample.shape[0])
        gram, position_sum = self.gram, self.position_sum
        if gram is not None:
            gram = gram + jnp.matmul(tokens.T, tokens, precision=jax.lax.Precision.HIGHEST)
        if position_sum is not None:
            position_sum = position_sum + jnp.sum(x, axis=0)
        return dataclasses.replace(
            self,
            count=self.count + tokens.shape[0],
            absmax=jnp.maximum(self.absmax, jnp.max(jnp.abs(tokens), axis=0)),
            sample=self.sample.at[slot].add(tokens, mode="drop"),
            gram=gram,
            position_sum=position_sum,
        )

    def merge(self, other: Stats) -> Stats:
        """Stats of both sets of tokens (disjoint parts of one calibration set)."""
        total = jax.tree.map(jnp.add, self, other)
        return dataclasses.replace(total, absmax=jnp.maximum(self.absmax, other.absmax))

    @jax.jit
    def through(self, transform: Transform) -> Stats:
        """Stats of the moved input: sample, Gram matrix and positions exactly, maxima as
        `Transform.maxima` has them."""
        move = transform.activations
        sample = move(self.sample)
        return dataclasses.replace(
            self,
            sample=sample,
            absmax=transform.maxima(self.absmax, sample),
            gram=None if self.gram is None else move(move(self.gram).T).T,
            position_sum=None if self.position_sum is None else move(self.position_sum),
        )
