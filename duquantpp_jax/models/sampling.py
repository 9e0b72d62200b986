"""Text generation with a key-value cache.

    z = logits of the last position / temperature, -inf for tokens that are not chosen
    next ~ softmax(z)            temperature 0: next = argmax z

The chosen tokens are the top_k largest, and of those the fewest whose probabilities reach top_p.
A single compiled program reads the prompt and then generates until every row has ended.

Source: Holtzman et al., The Curious Case of Neural Text Degeneration (arXiv:1904.09751), for top-p.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32, Integer, Key

from duquantpp_jax.models import Decoder, Linear, Store, empty_cache


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn, as at the top of this file; a `top_k` of 0 takes all tokens."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"a temperature of {self.temperature}: give 0 or a positive number")
        if self.top_k < 0:
            raise ValueError(f"a top_k of {self.top_k}: give 0 for all tokens, or how many")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"a top_p of {self.top_p}: give a probability above 0, at most 1")


def draw(
    logits: Float32[Array, "rows vocab"], sampling: Sampling, key: Key[Array, ""]
) -> Int32[Array, " rows"]:
    """The next token of each row, by the equations at the top of this file; -1 where one is NaN."""
    broken = jnp.isnan(logits).any(axis=-1)
    if sampling.temperature == 0:
        return jnp.where(broken, -1, jnp.argmax(logits, axis=-1)).astype(jnp.int32)
    logits = logits / jnp.float32(sampling.temperature)
    if sampling.top_k or sampling.top_p < 1:
        logits = jnp.where(_chosen(logits, sampling), logits, -jnp.inf)
    return jnp.where(broken, -1, jax.random.categorical(key, logits)).astype(jnp.int32)


def _chosen(logits: Float32[Array, "rows vocab"], sampling: Sampling) -> Bool[Array, "rows vocab"]:
    """Which tokens may be drawn; tokens that tie with the last of them may be, too."""
    descending = -jnp.sort(-logits, axis=-1)
    if sampling.top_k:
        descending = descending[:, : sampling.top_k]
    probability = jax.nn.softmax(descending)
    before = jnp.cumsum(probability, axis=-1) - probability
    last = jnp.sum(before < sampling.top_p, axis=-1, keepdims=True) - 1
    return logits >= jnp.take_along_axis(descending, last, axis=-1, mode="clip")


@functools.partial(jax.jit, static_argnames=("linear", "store", "new", "sampling"))
def generate(
    model: Decoder,
    prompt: Integer[Array, "rows length"],
    key: Key[Array, ""],
    *,
    store: Store,
    new: int,
    linear: Linear,
    state: Any = None,
    sampling: Sampling = Sampling(),
) -> tuple[Int32[Array, "rows new"], Int32[Array, " rows"]]:
    """Continues each row of a prompt, which has at least a token, by `new` tokens, at least 1.

    Args:
      linear, state: As for `Decoder.__call__`.

    Returns:
      The new tokens, and their number in each row, the end-of-sequence token among them; zeros
      follow. Where the model gave NaN, -1 is a row's last.
    """
    rows, length = prompt.shape
    ends = model.config.eos_token_id
    ends = jnp.asarray([ends] if isinstance(ends, int) else ends or (), jnp.int32)
    keys = jax.random.split(key, new)

    cache = empty_cache(model.config, store, rows, length + new - 1)
    logits, cache = model.extend(prompt, cache, linear, state)
    token = draw(logits[:, -1], sampling, keys[0])
    out = jnp.zeros((rows, new), jnp.int32).at[:, 0].set(token)
    ended = jnp.isin(token, ends) | (token < 0)

    def running(carry: Any) -> Bool[Array, ""]:
        done, _, _, ended, _ = carry
        return (done < new) & ~jnp.all(ended)

    def step(carry: Any) -> Any:
        done, out, counts, ended, cache = carry
        last = jax.lax.dynamic_slice_in_dim(out, done - 1, 1, axis=1)
        logits, cache = model.extend(last, cache, linear, state)
        token = jnp.where(ended, 0, draw(logits[:, -1], sampling, keys[done]))
        out = jax.lax.dynamic_update_slice_in_dim(out, token[:, None], done, axis=1)
        counts = counts + (~ended).astype(jnp.int32)
        ended = ended | jnp.isin(token, ends) | (token < 0)
        return done + 1, out, counts, ended, cache

    carry = (jnp.int32(1), out, jnp.ones(rows, jnp.int32), ended, cache)
    _, out, counts, _, _ = jax.lax.while_loop(running, step, carry)
    return out, counts
