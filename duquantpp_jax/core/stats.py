"""The noun Stats: what calibration keeps of one input site. A fold whose merge is associative."""

from __future__ import annotations

import dataclasses
import enum
import functools

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from duquantpp_jax.core.transform import Transform


class Needs(enum.Flag):
    """What a fit or a rounding reads besides the token sample and the channel maxima.

    Attributes:
      GRAM: The Gram matrix X^T X.
      POSITIONS: The sum over rows of the token at each position.
      FORMATS: The recipe's formats, so that each pair of formats has a fit of its own.
      CROSS: The cross Gram matrix X^T X^ of the float path's moved input with the quantized one's.
    """

    NOTHING = 0
    GRAM = enum.auto()
    POSITIONS = enum.auto()
    FORMATS = enum.auto()
    CROSS = enum.auto()


@struct.dataclass
class Stats:
    """What calibration keeps of one input site: a fold over batches of tokens.

    `merge` is associative and commutative (up to the order of float additions in sums; exactly for
    the rest), so that batches may be split over devices.

    Attributes:
      count: Tokens seen.
      absmax: Largest magnitude of each channel.
      sample: Every `stride`-th token, by its index in the whole calibration set.
      gram: X^T X over all tokens; None where nothing needs it, as the next three.
      position_sum: Sum over rows of the token at each position.
      position_count: Rows that have one there.
      cross: X^T X^, with X^ the input on the quantized path and X that on the float path.
      stride: Tokens of the calibration set for one of the sample.
    """

    count: Int[Array, "*layers"]
    absmax: Float[Array, "*layers k"]
    sample: Float[Array, "*layers samples k"]
    gram: Float[Array, "*layers k k"] | None
    position_sum: Float[Array, "*layers length k"] | None
    position_count: Int[Array, "*layers length"] | None
    cross: Float[Array, "*layers k k"] | None
    stride: int = struct.field(pytree_node=False)

    @classmethod
    def init(
        cls,
        width: int,
        rows: int,
        length: int,
        *,
        sample_limit: int = 2048,
        needs: Needs = Needs.NOTHING,
    ) -> Stats:
        """Empty Stats of k = width channels, for a calibration set of rows x length tokens.

        Args:
          sample_limit: Most tokens kept as they are.

        Raises:
          ValueError: `needs` is no Needs.
        """
        if not isinstance(needs, Needs):
            raise ValueError(f"needs={needs!r}: give Needs, as in Needs.GRAM | Needs.POSITIONS")
        stride = -(-rows * length // sample_limit)
        sums = {Needs.GRAM: width, Needs.POSITIONS: length, Needs.CROSS: width}
        zeros = {n: jnp.zeros((r, width), jnp.float32) for n, r in sums.items() if n in needs}
        return cls(
            count=jnp.zeros((), jnp.int32),
            absmax=jnp.zeros(width, jnp.float32),
            sample=jnp.zeros((-(-rows * length // stride), width), jnp.float32),
            gram=zeros.get(Needs.GRAM),
            position_sum=zeros.get(Needs.POSITIONS),
            position_count=jnp.zeros(length, jnp.int32) if Needs.POSITIONS in needs else None,
            cross=zeros.get(Needs.CROSS),
            stride=stride,
        )

    def update(
        self,
        x: Float[Array, "rows length k"],
        first: Int[Array, ""],
        exact: Float[Array, "rows length k"] | None = None,
        chosen: Bool[Array, "rows length"] | None = None,
    ) -> Stats:
        """Folds in whole rows of tokens.

        Args:
          first: Index of x's first token in the whole calibration set.
          exact: Of the float path for the same tokens, for CROSS.
          chosen: Which tokens the calibration set has; the others must be zero. None for all.

        Raises:
          ValueError: `exact` is not given just where it is needed.
        """
        if (exact is None) != (self.cross is None):
            raise ValueError("inputs of the float path are for Stats with Needs.CROSS, only them")
        tokens = x.reshape(-1, x.shape[-1])
        own = jnp.ones(tokens.shape[0], bool) if chosen is None else chosen.reshape(-1)
        index = first + jnp.cumsum(own) - 1
        sampled = own & (index % self.stride == 0)
        slot = jnp.where(sampled, index // self.stride, self.sample.shape[0])
        product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
        sums = {}
        if self.gram is not None:
            sums["gram"] = self.gram + product(tokens.T, tokens)
        if self.cross is not None and exact is not None:
            sums["cross"] = self.cross + product(exact.reshape(tokens.shape).T, tokens)
        if self.position_sum is not None and self.position_count is not None:
            sums["position_sum"] = self.position_sum + jnp.sum(x, axis=0)
            rows = jnp.sum(own.reshape(x.shape[:2]), axis=0)
            sums["position_count"] = self.position_count + rows
        return dataclasses.replace(
            self,
            count=self.count + jnp.sum(own),
            absmax=jnp.maximum(self.absmax, jnp.max(jnp.abs(tokens), axis=0)),
            sample=self.sample.at[slot].add(tokens, mode="drop"),
            **sums,
        )

    def require(self, need: Needs, who: str) -> Array:
        """What was kept for this need: GRAM, POSITIONS or CROSS.

        Raises:
          ValueError: It was not kept; says `who` needs what.
        """
        kept = {Needs.GRAM: self.gram, Needs.POSITIONS: self.position_sum, Needs.CROSS: self.cross}
        if (array := kept.get(need)) is None:
            raise ValueError(
                f"{who} needs Needs.{need.name}, which these Stats do not hold: calibrate with "
                f"needs=Needs.{need.name}"
            )
        return array

    def position_mean(self, who: str) -> Float[Array, "length k"]:
        """The mean token of each position, zeros where there is none; raises as `require`."""
        sums, rows = self.require(Needs.POSITIONS, who), jnp.asarray(self.position_count)
        return sums / jnp.maximum(rows, 1).astype(jnp.float32)[:, None]

    def merge(self, other: Stats) -> Stats:
        """Stats of both sets of tokens (disjoint parts of one calibration set)."""
        total = jax.tree.map(jnp.add, self, other)
        return dataclasses.replace(total, absmax=jnp.maximum(self.absmax, other.absmax))

    @jax.jit
    def through(self, transform: Transform) -> Stats:
        """Stats of the moved input; the maxima are those of the sample where channels mix."""
        move = transform.activations
        sample = move(self.sample)
        maxima = jnp.max(jnp.abs(sample), axis=0)
        return dataclasses.replace(
            self,
            sample=sample,
            absmax=maxima if transform.mixes_channels else jnp.abs(move(self.absmax)),
            gram=None if self.gram is None else move(move(self.gram).T).T,
            position_sum=None if self.position_sum is None else move(self.position_sum),
            cross=None if self.cross is None else move(move(self.cross).T).T,
        )
