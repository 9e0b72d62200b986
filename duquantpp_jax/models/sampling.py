"""Text generation with a key-value cache.

    z = logits of the last position / temperature, -inf for tokens that are not chosen
    next ~ softmax(z)            temperature 0: next = argmax z

The chosen tokens are the top_k largest, and of those the fewest whose probabilities reach top_p.

The rows of a batch are filled up on the right to a common length, a power of two. No query sees
what stands there: the entry of each new token replaces the first of those entries before a later
position is reached. So two programs, `begin` and `proceed`, serve all lengths up to a power of two,
and all samplings of a kind.

Source: Holtzman et al., The Curious Case of Neural Text Degeneration (arXiv:1904.09751), for top-p.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float32, Int32, Integer, Key

from duquantpp_jax.models import Decoder, Linear, Store, empty_cache

SHORTEST = 16
"""The shortest length to which rows are filled up."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn, as at the top of this file; a `top_k` of 0 takes all tokens."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"a temperature of {self.temperature}: give 0 or a positive number")
        if not 0 <= self.top_k < 2**31:
            raise ValueError(f"a top_k of {self.top_k}: give 0 for all tokens, or how many")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"a top_p of {self.top_p}: give a probability above 0, at most 1")


@struct.dataclass
class Draws:
    """The sampling of each row, as arrays.

    Attributes:
      random: Whether a row has a temperature above 0; static, as `chosen`.
      chosen: Whether such a row leaves out tokens, by top_k or top_p.
    """

    temperature: Float32[Array | np.ndarray, " rows"]
    top_k: Int32[Array | np.ndarray, " rows"]
    top_p: Float32[Array | np.ndarray, " rows"]
    random: bool = struct.field(pytree_node=False)
    chosen: bool = struct.field(pytree_node=False)

    @classmethod
    def of(cls, samplings: Sequence[Sampling]) -> "Draws":
        """That of rows which have a sampling each."""
        warm = [each for each in samplings if each.temperature]
        return cls(
            np.asarray([each.temperature for each in samplings], np.float32),
            np.asarray([each.top_k for each in samplings], np.int32),
            np.asarray([each.top_p for each in samplings], np.float32),
            bool(warm),
            any(each.top_k or each.top_p < 1 for each in warm),
        )


@struct.dataclass
class Unfinished:
    """Rows of text that are being continued.

    Attributes:
      tokens: Prompt and new tokens of each row; -1 for a token that was drawn from NaN.
      lengths: Number of those tokens; what stands after them means nothing.
      limits: Lengths at which rows end; at most the width of `tokens`.
      ended: Whether a row has ended: at its limit, with an end-of-sequence token or with NaN.
      step: Number of tokens that the rows which have not ended have got.
      cache: Holds all tokens but the last of each row.
      log_q: log softmax of the logits, before temperature, for the tokens that were drawn.
      likeliest: The tokens of the largest log q where a token was drawn, and these log q.
    """

    tokens: Int32[Array, "rows capacity"]
    lengths: Int32[Array, " rows"]
    limits: Int32[Array, " rows"]
    ended: Bool[Array, " rows"]
    step: Int32[Array, ""]
    cache: Any
    log_q: Float32[Array, "rows capacity"] | None
    likeliest: tuple[Int32[Array, "rows capacity top"], Float32[Array, "rows capacity top"]] | None


def bucket(length: int) -> int:
    """The power of two to which rows of this length are filled up."""
    return max(SHORTEST, 1 << (length - 1).bit_length())


def padded(
    prompts: Sequence[Sequence[int]], length: int
) -> tuple[Int32[np.ndarray, "rows length"], Int32[np.ndarray, " rows"]]:
    """Prompts of at least a token as rows, the last token of each repeated, and their lengths."""
    tokens = [[*prompt, *[prompt[-1]] * (length - len(prompt))] for prompt in prompts]
    return np.asarray(tokens, np.int32), np.asarray([len(p) for p in prompts], np.int32)


def draw(
    logits: Float32[Array, "rows vocab"], draws: Draws, key: Key[Array, "*rows"]
) -> Int32[Array, " rows"]:
    """The next token of each row, by the equations at the top of this file; -1 where one is NaN.

    Args:
      key: Of all rows together, or of each.
    """
    broken, token = jnp.isnan(logits).any(axis=-1), jnp.argmax(logits, axis=-1)
    if draws.random:
        cold = draws.temperature == 0
        logits = logits / jnp.where(cold, 1, draws.temperature)[:, None]
        if draws.chosen:
            logits = jnp.where(_chosen(logits, draws), logits, -jnp.inf)
        categorical = jax.vmap(jax.random.categorical) if key.ndim else jax.random.categorical
        token = jnp.where(cold, token, categorical(key, logits))
    return jnp.where(broken, -1, token).astype(jnp.int32)


def _chosen(logits: Float32[Array, "rows vocab"], draws: Draws) -> Bool[Array, "rows vocab"]:
    """Which tokens may be drawn; tokens that tie with the last of them may be, too."""
    descending = -jnp.sort(-logits, axis=-1)
    rank = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    top_k = jnp.where(draws.top_k == 0, logits.shape[-1], draws.top_k)[:, None]
    probability = jax.nn.softmax(jnp.where(rank < top_k, descending, -jnp.inf))
    before = jnp.cumsum(probability, axis=-1) - probability
    last = jnp.sum((before < draws.top_p[:, None]) & (rank < top_k), axis=-1, keepdims=True) - 1
    return logits >= jnp.take_along_axis(descending, last, axis=-1, mode="clip")


@functools.partial(jax.jit, static_argnames=("linear", "store", "capacity", "top"))
def begin(
    model: Decoder,
    prompt: Integer[Array | np.ndarray, "rows length"],
    lengths: Int32[Array | np.ndarray, " rows"],
    limits: Int32[Array | np.ndarray, " rows"],
    key: Key[Array, "*rows"],
    draws: Draws,
    *,
    store: Store,
    capacity: int,
    linear: Linear,
    state: Any = None,
    top: int | None = None,
) -> Unfinished:
    """Reads prompts of these lengths, and draws the first token after each.

    Args:
      capacity: Most tokens of a row, prompt and new ones; at least the length of `prompt`.
      linear, state: As for `Decoder.__call__`.
      top: How many of the likeliest tokens to keep, and log q; None to keep neither.
    """
    rows, length = prompt.shape
    fill = [(0, 0), (0, capacity - length)]
    tokens = jnp.pad(jnp.asarray(prompt, jnp.int32), fill)
    empty = empty_cache(model.config, store, rows, length)
    at = jnp.asarray(lengths, jnp.int32) - 1
    logits, cache = model.extend(tokens[:, :length], empty, linear, state, at)

    def grown(entries: Array) -> Array:
        zeros = jnp.zeros((*entries.shape[:2], capacity, *entries.shape[3:]), entries.dtype)
        return jax.lax.dynamic_update_slice_in_dim(zeros, entries, 0, axis=2)

    # Of the types that `proceed` gives, or it would be compiled twice.
    cache = replace(cache, entries=jax.tree.map(grown, cache.entries), length=at + 1)
    scores = (None, None)
    if top is not None:
        shape = (rows, capacity, top)
        best = jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)
        scores = jnp.zeros(tokens.shape, jnp.float32), best
    ended, step = jnp.zeros(rows, bool), jnp.int32(0)
    text = Unfinished(tokens, at + 1, jnp.asarray(limits), ended, step, cache, *scores)
    return _drawn(model, text, logits[:, 0], key, draws)


@functools.partial(jax.jit, static_argnames="linear", donate_argnames="text")
def proceed(
    model: Decoder,
    text: Unfinished,
    key: Key[Array, "*rows"],
    draws: Draws,
    steps: Int32[Array, ""] | int,
    *,
    linear: Linear,
    state: Any = None,
) -> Unfinished:
    """Draws up to `steps` further tokens of each row, fewer where all rows end."""
    last = text.step + steps

    def running(text: Unfinished) -> Bool[Array, ""]:
        return (text.step < last) & ~jnp.all(text.ended)

    def step(text: Unfinished) -> Unfinished:
        at = text.lengths - 1
        tokens = jnp.take_along_axis(text.tokens, at[:, None], axis=1, mode="clip")
        logits, cache = model.extend(tokens, replace(text.cache, length=at), linear, state)
        return _drawn(model, replace(text, cache=cache), logits[:, 0], key, draws)

    text = replace(text, cache=replace(text.cache, length=text.lengths - 1))
    return jax.lax.while_loop(running, step, text)


def _drawn(
    model: Decoder,
    text: Unfinished,
    logits: Float32[Array, "rows vocab"],
    key: Key[Array, "*rows"],
    draws: Draws,
) -> Unfinished:
    """The rows with a token more, drawn from the logits after each."""
    ends = model.config.eos_token_id
    ends = jnp.asarray([ends] if isinstance(ends, int) else ends or (), jnp.int32)
    fold = jax.vmap(jax.random.fold_in, (0, None)) if key.ndim else jax.random.fold_in
    token = draw(logits, draws, fold(key, text.step))
    going = ~text.ended
    here = (jnp.arange(text.tokens.shape[1]) == text.lengths[:, None]) & going[:, None]
    if text.log_q is not None and text.likeliest is not None:
        log_q = logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        drawn = jnp.take_along_axis(log_q, token[:, None], axis=1, mode="clip")
        best, ids = jax.lax.top_k(log_q, text.likeliest[0].shape[-1])
        new = ids[:, None].astype(jnp.int32), best[:, None]
        pairs = zip(new, text.likeliest, strict=True)
        kept = tuple(jnp.where(here[..., None], *pair) for pair in pairs)
        text = replace(text, log_q=jnp.where(here, drawn, text.log_q), likeliest=kept)
    lengths = text.lengths + going.astype(jnp.int32)
    ended = text.ended | jnp.isin(token, ends) | (token < 0) | (lengths >= text.limits)
    tokens = jnp.where(here, token[:, None], text.tokens)
    return replace(text, tokens=tokens, lengths=lengths, ended=ended, step=text.step + 1)


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    key: Key[Array, "*rows"],
    *,
    store: Store,
    new: int,
    linear: Linear,
    state: Any = None,
    sampling: Sampling = Sampling(),
    ready: Callable[[], None] | None = None,
) -> list[list[int]]:
    """Continues prompts of at least a token by up to `new` tokens, at least 1.

    Args:
      linear, state: As for `Decoder.__call__`.
      ready: Called when each row has its first new token and all programs are compiled.

    Returns:
      The new tokens of each row, the end-of-sequence token among them. Where the model gave NaN,
      -1 is a row's last.
    """
    longest = max(map(len, prompts))
    tokens, lengths = padded(prompts, bucket(longest))
    draws = Draws.of([sampling] * len(prompts))
    options: Any = {"linear": linear, "state": state}
    room: Any = {"store": store, "capacity": bucket(longest + new)}
    text = begin(model, tokens, lengths, lengths + new, key, draws, **room, **options)
    if ready is not None:
        text = jax.block_until_ready(proceed(model, text, key, draws, 0, **options))
        ready()
    text = proceed(model, text, key, draws, new - 1, **options)
    rows = zip(np.asarray(text.tokens), lengths, np.asarray(text.lengths), strict=True)
    return [row[first:last].tolist() for row, first, last in rows]
