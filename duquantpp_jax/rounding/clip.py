"""Search for the scale of each block, among a few, with the least error of the output.

With h = diag(H) of the moved input, the mean square of each channel, and Q_c the format with its
scale chosen from c times the block's largest magnitude (clip), or times 2^c (scale),

    c of a block = argmin over c of  sum_j h_j (w_j - Q_c(w)_j)^2,

or of a row, with the sum over all its blocks. The first c changes nothing and wins ties, so no
block (or row) has a larger error than with round-to-nearest. A power-of-two scale only changes when
c takes the block's maximum over a border; so for MX formats `scale` tries all that `clip` can, and
larger scales too.

Source: clipping by weighted squared error as in AWQ, Lin et al., arXiv 2306.00978; offsets of MX
scales as in `scale_offset` of core/arrays.py.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from duquantpp_jax.core import Format, MXArray, Needs, Stats

Importance = Float[Array, " k"]
"""Weight of each channel's squared error."""


@dataclasses.dataclass(frozen=True)
class Search:
    """The scale of each block or row, of a few that are tried, with the least error.

    Attributes:
      option: What of `Format.quantize` is searched.
      candidates: Its values; the first changes nothing.
      per: What shares a value.
    """

    option: Literal["clip", "scale_offset"] = "clip"
    candidates: tuple[float | int, ...] = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
    per: Literal["block", "row"] = "block"
    needs = Needs.NOTHING

    def __call__(self, w: Float[Array, "n k"], format: Format, stats: Stats) -> MXArray:
        """See the top of this file; the mean squares are those of the sample."""
        return self.encode(w, format, jnp.mean(jnp.square(stats.sample), axis=0)).stored()

    def encode(
        self, w: Float[Array, "n k"], format: Format, importance: Importance, **given: Any
    ) -> MXArray:
        """The moved weight with the least error of all candidates, its elements as codes; `given`
        are other options of `Format.quantize`."""
        kind = jnp.int32 if self.option == "scale_offset" else jnp.float32
        first = format.encode(w, **given)

        def better(kept: tuple[MXArray, Array], value: Array) -> tuple[tuple[MXArray, Array], None]:
            best, least = kept
            other = format.encode(w, **given, **{self.option: value})
            less = (error := self._error(w, other, importance)) < least
            return (other.where(less, best), jnp.where(less, error, least)), None

        start = first, self._error(w, first, importance)
        (best, _), _ = jax.lax.scan(better, start, jnp.asarray(self.candidates[1:], kind))
        return best

    def _error(self, w: Array, q: MXArray, importance: Importance) -> Float[Array, "n _"]:
        """Of each block, or of each row."""
        weighted = importance * jnp.square(w - q.dequantize())
        error = jnp.sum(weighted.reshape(*q.scales.shape, q.block_size), axis=-1)
        return error if self.per == "block" else jnp.sum(error, axis=-1, keepdims=True)


SCALE = Search("scale_offset", (0, -1, 1))
"""The power of two that the rule gives, half of it, or twice."""
