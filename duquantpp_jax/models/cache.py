"""Keys and values that are kept from one token to the next.

A `Store` says in what form they are kept; the decoder knows no more of it than that

    k, v are seen as read(hold(move(k))), read(hold(v)),    q as move(q),

with move orthogonal, so that it leaves every score q k^T alone. A `Cache` is what a store holds of
all positions so far, in arrays of a fixed capacity.
"""

from __future__ import annotations

import abc
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int32

from duquantpp_jax.models.config import DecoderConfig


class Store(abc.ABC):
    """How keys and values are kept. Frozen, hashable, without arrays: a static choice under jit.

    Each head of each position is kept by itself, so that what is held of a token does not depend
    on how many came with it.
    """

    @abc.abstractmethod
    def move(self, x: Float[Array, "*batch head_dim"]) -> Float[Array, "*batch head_dim"]:
        """An orthogonal map, for queries and keys alike."""

    @abc.abstractmethod
    def hold(self, x: Float[Array, "rows length heads head_dim"]) -> Any:
        """What is kept of x: a pytree of arrays that begin with [rows, length]; zeros must read as
        finite numbers, as a cache is filled with them."""

    @abc.abstractmethod
    def read(self, held: Any) -> Float[Array, "rows length heads head_dim"]:
        """The numbers that are kept."""


@struct.dataclass
class Cache:
    """What a store holds of the keys and values of all layers.

    Attributes:
      held: The pair (keys, values) of what `Store.hold` gives, each array with two axes more in
        front and a fixed length: [layers, rows, capacity, ...].
      length: Positions that are filled.
      store: How they are kept.
    """

    held: Any
    length: Int32[Array, ""]
    store: Store = struct.field(pytree_node=False)


def empty_cache(config: DecoderConfig, store: Store, rows: int, capacity: int) -> Cache:
    """A cache for so many rows that has room for `capacity` positions, and none filled."""
    shape = (rows, capacity, config.num_key_value_heads, config.head_dim)
    held = jax.eval_shape(store.hold, jax.ShapeDtypeStruct(shape, jnp.float32))
    layers = config.num_hidden_layers
    zeros = jax.tree.map(lambda leaf: jnp.zeros((layers, *leaf.shape), leaf.dtype), (held, held))
    return Cache(zeros, jnp.int32(0), store)


def written(held: Any, new: Any, start: Int32[Array, ""]) -> Any:
    """One layer's arrays with the positions from `start` on replaced by new ones."""
    return jax.tree.map(
        lambda old, one: jax.lax.dynamic_update_slice_in_dim(old, one, start, axis=1), held, new
    )
