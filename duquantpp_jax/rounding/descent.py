"""Coordinate descent after GPTQ: each column is rounded again, given all others.

With E = W - Q and H as in GPTQ, the least of E H E^T over one column j of Q is at

    q_j + (E H)_j / H_jj,

which is rounded in the scale that the block has. A column changes only where that lowers the
error, so that no pass raises it.

Source: the discrete step of Behdin et al., QuantEase, arXiv 2309.01885.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from duquantpp_jax.core import Format, MXArray, Needs, Stats
from duquantpp_jax.formats.elements import encode
from duquantpp_jax.rounding.gptq import GPTQ, HIGHEST, damped, mean_gram


@dataclasses.dataclass(frozen=True)
class GPTQDescent:
    """GPTQ, then `passes` over all columns; needs and damping are those of GPTQ."""

    damping: float = 0.01
    passes: int = 4
    needs = Needs.GRAM

    def __call__(self, w: Float[Array, "n k"], format: Format, stats: Stats) -> MXArray:
        """See `descend`; ValueError if the Stats hold no Gram matrix."""
        h = damped(mean_gram(stats, "descent"), self.damping)
        return descend(w, GPTQ(self.damping)(w, format, stats), h, self.passes)


def descend(w: Float[Array, "n k"], start: MXArray, h: Float[Array, "k k"], passes: int) -> MXArray:
    """`start` with other elements in the same MX scales, for a lower (w - q) H (w - q)^T."""
    scale = start.limit() / jnp.float32(start.element.max)
    codes = start.codes()
    q = start.dequantize()
    pull = jnp.matmul(w - q, h, precision=HIGHEST)

    def column(carry: Any, j: Array) -> tuple[Any, None]:
        codes, q, pull = carry
        wanted = q[:, j] + pull[:, j] / h[j, j]
        # A block of zeros has the least scale there is: it stays as it is.
        code = encode(wanted / scale[:, j], jnp.zeros((), jnp.int32), start.element)
        new = start.element.decode(code) * scale[:, j]
        step = new - q[:, j]
        lower = step * (step * h[j, j] - 2 * pull[:, j]) < 0
        step = jnp.where(lower, step, 0.0)
        return (
            codes.at[:, j].set(jnp.where(lower, code, codes[:, j])),
            q.at[:, j].set(jnp.where(lower, new, q[:, j])),
            pull - step[:, None] * h[j],
        ), None

    columns = jnp.tile(jnp.arange(w.shape[1]), passes)
    (codes, _, _), _ = jax.lax.scan(column, (codes, q, pull), columns)
    return dataclasses.replace(start, elements=codes).stored()
