"""Mixtures of experts: the router, tokens with their experts, and products by groups.

    r = W_r h + b_r                        logits of the router, always in float32
    e = the `chosen` largest of r          s = softmax(r) there, or softmax(r_e)
    y = sum_j s_j  down_{e_j}( act( gate_{e_j}(h), up_{e_j}(h) ) )

The weights of the experts of a layer are stacked, [experts, out, in], as layers are. A linear gets
a `Routed`: each token with the expert whose weight it meets. Its product sorts the tokens by expert
and multiplies them in tiles, each of tokens of one expert. (`jax.lax.ragged_dot` takes memory and
time for every token at every expert where XLA has no kernel for it, as on a CPU.)

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
from jaxtyping import Array, Float, Float32, Int, Int32

from duquantpp_jax.models.attention import HIGHEST

TILE = 128
"""Most tokens of a tile: enough to keep a device busy, and few beside those of most experts."""


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

    def each(self, of_expert: Callable[[Any, Array], Array], stacked: Any) -> Routed:
        """The inputs after `of_expert(part, x)`, with each expert's part of a stacked pytree.

        Args:
          of_expert: Of tokens [tile, k], each for itself.
        """
        if not (leaves := jax.tree.leaves(stacked)):
            return self.replace(x=of_expert(stacked, self.x))  # type: ignore[attr-defined]
        x, numbers = self.x.reshape(-1, self.x.shape[-1]), self.expert.reshape(-1)

        def made(tile: tuple[Array, Array]) -> Array:
            part = jax.tree.map(lambda leaf: leaf[tile[0]], stacked)
            return of_expert(part, x.at[tile[1]].get(mode="fill", fill_value=0))

        def step(y: Array, tile: tuple[Array, Array]) -> tuple[Array, None]:
            return y.at[tile[1]].set(made(tile), mode="drop"), None

        tiles = _tiles(numbers, len(leaves[0]))
        shape = jax.eval_shape(made, jax.tree.map(lambda leaf: leaf[0], tiles))
        empty = jnp.zeros((len(x), shape.shape[-1]), shape.dtype)
        y, _ = jax.lax.scan(step, empty, tiles)
        return self.replace(x=y.reshape(*self.x.shape[:-1], -1))  # type: ignore[attr-defined]

    def of(self, number: Int[Array, ""]) -> tuple[Float[Array, "*tokens k"], Array]:
        """The inputs of one expert, zeros for tokens that do not go to it, and which do."""
        own = self.expert == number
        return jnp.sum(jnp.where(own[..., None], self.x, 0), axis=-2), jnp.any(own, axis=-1)


def _tiles(
    expert: Int[Array, " tokens"], count: int
) -> tuple[Int32[Array, " tiles"], Int32[Array, "tiles tile"]]:
    """The expert of each tile and its tokens by number; numbers beyond the last where it has room.

    Of an expert's tiles only the last may have room, so that `tokens / tile` tiles and one for each
    expert that is met are enough.
    """
    tokens = len(expert)
    tile = min(TILE, tokens)
    order = jnp.argsort(expert).astype(jnp.int32)
    sizes = jnp.bincount(expert, length=count).astype(jnp.int32)
    ends, of_each = jnp.cumsum(sizes), -(-sizes // tile)
    last = jnp.cumsum(of_each)
    number = jnp.arange(tokens // tile + min(count, tokens), dtype=jnp.int32)
    own = jnp.searchsorted(last, number, side="right").astype(jnp.int32)
    own = jnp.minimum(own, count - 1)  # of tiles without a token
    first = (ends - sizes)[own] + (number - (last - of_each)[own]) * tile
    place = first[:, None] + jnp.arange(tile, dtype=jnp.int32)
    return own, jnp.where(place < ends[own][:, None], order[jnp.minimum(place, tokens - 1)], tokens)


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
