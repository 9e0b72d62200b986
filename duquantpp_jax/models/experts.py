"""Mixtures of experts: the router, tokens with their experts, and products by groups.

    r = W_r h + b_r                        logits of the router, always in float32
    e = the `chosen` largest of r          s = softmax(r) there, or softmax(r_e)
    y = sum_j s_j  down_{e_j}( act( gate_{e_j}(h), up_{e_j}(h) ) )

The weights of the experts of a layer are stacked, [experts, out, in], as layers are. A linear gets
a `Routed`: each token with the expert whose weight it meets. Its product sorts the tokens by expert
and multiplies group after group (`jax.lax.ragged_dot`; a CPU multiplies every token by every
expert, and masks).

Source: Shazeer et al., Outrageously Large Neural Networks (arXiv:1701.06538); Jiang et al., Mixtral
of Experts (arXiv:2401.04088), section 2.1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int

from duquantpp_jax.models.attention import HIGHEST


@struct.dataclass
class Routed:
    """Inputs of a linear, each with the expert that it goes to.

    Attributes:
      x: The inputs; `chosen` of each token.
      expert: Their experts, no two of a token the same.
    """

    x: Float[Array, "*tokens chosen k"]
    expert: Int[Array, "*tokens chosen"]

    def astype(self, dtype: DTypeLike) -> Routed:
        """The same in another type."""
        return self.replace(x=self.x.astype(dtype))  # type: ignore[attr-defined]

    def matmul(self, w: Float[Array, "experts n k"]) -> Float[Array, "*tokens chosen n"]:
        """x W_e^T with e the expert of each input, at the highest precision."""
        expert = self.expert.reshape(-1)
        order = jnp.argsort(expert)
        rows = self.x.reshape(-1, self.x.shape[-1])[order]
        sizes = jnp.bincount(expert, length=len(w)).astype(jnp.int32)
        y = jax.lax.ragged_dot(rows, w.swapaxes(1, 2), sizes, precision=HIGHEST)
        return jnp.zeros_like(y).at[order].set(y).reshape(*self.x.shape[:-1], -1)

    def each(self, of_expert: Callable[[Any, Array], Array], stacked: Any) -> Routed:
        """The inputs after `of_expert(part, x)`, with each expert's part of a stacked pytree."""
        if not (leaves := jax.tree.leaves(stacked)):
            return self.replace(x=of_expert(stacked, self.x))  # type: ignore[attr-defined]

        def step(moved: Array, scanned: Any) -> tuple[Array, None]:
            number, part = scanned
            own = (self.expert == number)[..., None]
            return jnp.where(own, of_expert(part, self.x), moved), None

        numbers = jnp.arange(len(leaves[0]), dtype=self.expert.dtype)
        shape = jax.eval_shape(of_expert, jax.tree.map(lambda a: a[0], stacked), self.x)
        x, _ = jax.lax.scan(step, jnp.zeros(shape.shape, shape.dtype), (numbers, stacked))
        return self.replace(x=x)  # type: ignore[attr-defined]

    def of(self, number: Int[Array, ""]) -> tuple[Float[Array, "*tokens k"], Array]:
        """The inputs of one expert, zeros for tokens that do not go to it, and which do."""
        own = self.expert == number
        return jnp.sum(jnp.where(own[..., None], self.x, 0), axis=-2), jnp.any(own, axis=-1)


def route(
    h: Float32[Array, "*tokens k"],
    weight: Float[Array, "experts k"],
    bias: Float[Array, " experts"] | None,
    chosen: int,
    *,
    renormalized: bool,
) -> tuple[Routed, Float32[Array, "*tokens chosen"]]:
    """The inputs of the experts, and the weights of their outputs; see the top of this file.

    Args:
      renormalized: Whether the weights of the chosen experts add up to 1.
    """
    logits = jnp.einsum("...k,ek->...e", h, weight.astype(jnp.float32), precision=HIGHEST)
    logits = logits if bias is None else logits + bias.astype(jnp.float32)
    top, expert = jax.lax.top_k(logits, chosen)
    whole = top if renormalized else logits
    scores = jnp.exp(top - jax.nn.logsumexp(whole, axis=-1, keepdims=True))
    x = jnp.broadcast_to(h[..., None, :], (*expert.shape, h.shape[-1]))
    return Routed(x, expert), scores
