"""The key-value cache.

A `Store` is the format of the cache. Attention uses, in place of q, k and v,

    move(q),    decode(encode(move(k))),    decode(encode(v)),

where move is orthogonal, so that it does not change q k^T.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int32

from duquantpp_jax.models.attention import causal_attention
from duquantpp_jax.models.config import DecoderConfig
from duquantpp_jax.models.in_place import InPlace


class Store(abc.ABC):
    """Format of a cache. Frozen, hashable, without arrays: a static choice under jit.

    It encodes each head of each position by itself, so that the entry of a token does not depend
    on how many tokens were encoded together.
    """

    @abc.abstractmethod
    def move(self, x: Float[Array, "*batch head_dim"]) -> Float[Array, "*batch head_dim"]:
        """An orthogonal map of queries and keys."""

    @abc.abstractmethod
    def encode(self, x: Float[Array, "rows length heads head_dim"]) -> Any:
        """The entries for x: a pytree of arrays whose first axes are [rows, length].

        An empty cache is zeros, which must decode to finite numbers.
        """

    @abc.abstractmethod
    def decode(self, entries: Any) -> Float[Array, "rows length heads head_dim"]:
        """The numbers that the entries stand for."""

    def attend(
        self,
        q: Float[Array, "rows length kv_heads groups head_dim"],
        entries: InPlace,
        positions: Int32[Array, "*rows length"],
        window: Int32[Array | np.ndarray, ""] | None,
        scalar: float,
        sinks: Float[Array, "kv_heads groups"] | None,
    ) -> Float[Array, "rows length kv_heads groups head_dim"]:
        """`causal_attention` over the entries (keys, values) of a layer."""
        k, v = (self.decode(part).astype(q.dtype) for part in entries.own())
        return causal_attention(q, k, v, positions, window, scalar, sinks)


@struct.dataclass
class Cache:
    """Encoded keys and values of all layers and positions so far, in arrays of a fixed capacity.

    Attributes:
      entries: The pair (keys, values) of `Store.encode`, as arrays [layers, rows, capacity, ...].
      length: Positions that are filled, of all rows or of each.
    """

    entries: Any
    length: Int32[Array, "*rows"]
    store: Store = struct.field(pytree_node=False)


def empty_cache(config: DecoderConfig, store: Store, rows: int, capacity: int) -> Cache:
    """A cache with room for `capacity` positions of each row, none of them filled.

    >>> from duquantpp_jax.checkpoints import testbed
    >>> from duquantpp_jax.ptq import store
    >>> config = testbed.load().config
    >>> cache = empty_cache(config, store("mxfp8", config.head_dim), rows=2, capacity=64)
    >>> int(cache.length)
    0
    """
    shape = (rows, capacity, config.num_key_value_heads, config.head_dim)
    keys = jax.eval_shape(store.encode, jax.ShapeDtypeStruct(shape, jnp.float32))
    layers = config.num_hidden_layers
    zeros = jax.tree.map(lambda leaf: jnp.zeros((layers, *leaf.shape), leaf.dtype), (keys, keys))
    return Cache(zeros, jnp.int32(0), store)


def put(entries: InPlace, new: Any, start: Int32[Array, "*rows"] | int) -> InPlace:
    """The entries with new ones of a layer from position `start` on, of all rows or of each."""
    layer: Any = entries.layer

    def written(old: Array, other: Array) -> Array:
        other = other.astype(old.dtype)
        if jnp.size(start) == 1:
            place = (layer, 0, jnp.reshape(start, ()), *[0] * (old.ndim - 3))
            return jax.lax.dynamic_update_slice(old, other[None], place)
        rows, length = other.shape[:2]
        first = jnp.clip(jnp.asarray(start), 0, old.shape[2] - length)
        at = first[:, None] + jnp.arange(length)
        return old.at[layer, jnp.arange(rows)[:, None], at].set(other, unique_indices=True)

    return dataclasses.replace(entries, arrays=jax.tree.map(written, entries.arrays, new))
