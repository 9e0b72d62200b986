"""Learning through the whole model: the least KL(float || quantized) over calibration text.

    loss = mean over targets of sum_v p_v (log p_v - log q_v)

p from the float model, q from the model whose linears round (moves.py). Batches are drawn with a
key, without replacement within a pass over the rows. After every `check_every` steps the loss on
held-out rows is measured, and what is least there is kept.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jaxtyping import Array, Float, Int, Integer, Key

from duquantpp_jax.core import Fitted, Format
from duquantpp_jax.learning.moves import Learned, LearningLinear, Moves, product
from duquantpp_jax.models import Decoder
from duquantpp_jax.transforms.block import BlockAffine

Rates = Mapping[str, optax.Schedule]
"""Learning rates by what they move: "transform", "weights", "log_scale"."""


@struct.dataclass
class Progress:
    """Where learning stands; all that is needed to go on.

    Attributes:
      step: Steps taken.
      learned: By site, stacked over layers.
      optimizer: Its state.
      best: What had the least held-out loss so far.
      best_loss: That loss, in nats per target.
    """

    step: Int[Array, ""]
    learned: dict[str, Learned]
    optimizer: optax.OptState
    best: dict[str, Learned]
    best_loss: Float[Array, ""]


class Learning(NamedTuple):
    """What was learned.

    Attributes:
      fits: By site, stacked over layers.
      history: (step, training loss since the last, held-out loss) of every check.
    """

    fits: dict[str, Fitted]
    history: list[tuple[int, float, float]]


def learn_model(
    model: Decoder,
    start: Mapping[str, BlockAffine],
    moves: Moves,
    formats: tuple[Format, Format],
    rows: Integer[np.ndarray, "rows length"],
    held_out: Integer[np.ndarray, "held length"],
    key: Key[Array, ""],
    *,
    steps: int,
    rates: Rates,
    optimizer: optax.GradientTransformation | None = None,
    batch_rows: int = 16,
    check_every: int = 100,
    report: Callable[[int, float, float], None] = lambda *_: None,
) -> Learning:
    """Learns what `moves` says, from `start`.

    Args:
      start: Transform of each site, stacked over layers.
      formats: Of activations and of weights.
      rows: Token ids to learn from.
      held_out: Token ids to choose by; never test text.
      key: For the order of the batches.
      steps: Updates.
      rates: Multiply the optimiser's updates, step by step.
      optimizer: Gives directions of descent; Adam's by default.
      report: Called at every check.
    """
    optimizer = optimizer or optax.scale_by_adam()
    learned = {site: moves.init(one, model.weights(site)) for site, one in start.items()}
    state = Progress(
        step=jnp.int32(0),
        learned=learned,
        optimizer=optimizer.init(cast(Any, learned)),
        best=jax.tree.map(jnp.copy, learned),
        best_loss=jnp.float32(jnp.inf),
    )
    order = batches(key, len(rows), batch_rows, steps)
    table = {
        name: np.array([schedule(i) for i in range(steps)], np.float32)
        for name, schedule in rates.items()
    }
    static: dict[str, Any] = {"moves": moves, "formats": formats}
    device_rows, start = jnp.asarray(rows), dict(start)
    history = []
    while (first := int(state.step)) < steps:
        chunk = slice(first, min(first + check_every, steps))
        part = {name: jnp.asarray(values[chunk]) for name, values in table.items()}
        state, losses = _advance(
            model,
            start,
            state,
            device_rows,
            jnp.asarray(order[chunk]),
            part,
            optimizer=optimizer,
            **static,
        )
        loss = held_out_loss(model, start, state.learned, held_out, batch_rows, **static)
        if loss < float(state.best_loss):
            kept = jax.tree.map(jnp.copy, state.learned)
            state = dataclasses.replace(state, best=kept, best_loss=jnp.float32(loss))
        history.append((int(state.step), float(jnp.mean(losses)), loss))
        report(*history[-1])
    return Learning(fitted_model(model, start, state.best, moves), history)


def fitted_model(
    model: Decoder, start: Mapping[str, BlockAffine], learned: Mapping[str, Learned], moves: Moves
) -> dict[str, Fitted]:
    """What has been learned, as `quantize_model` takes it."""
    return {
        site: jax.vmap(moves.fitted)(start[site], learned[site], model.weights(site))
        for site in learned
    }


def batches(
    key: Key[Array, ""], rows: int, batch_rows: int, steps: int
) -> Integer[np.ndarray, "steps batch"]:
    """Rows of every batch: pass after pass over all rows, each in an order of its own."""
    if rows < batch_rows:
        raise ValueError(f"{rows} rows are less than a batch of {batch_rows}: give more text")
    per_pass = rows // batch_rows
    passes = [
        np.asarray(jax.random.permutation(jax.random.fold_in(key, number), rows))
        for number in range(-(-steps // per_pass))
    ]
    order = np.concatenate([one[: per_pass * batch_rows] for one in passes])
    return order.reshape(-1, batch_rows)[:steps]


def _bfloat16_linear(
    site: str, x: Array, weights: tuple[Array, ...], state: Any
) -> tuple[tuple[Array, ...], None]:
    return tuple(product(x, w) for w in weights), None


def divergence(
    model: Decoder,
    start: Mapping[str, BlockAffine],
    learned: Mapping[str, Learned],
    tokens: Integer[Array, "rows length"],
    *,
    moves: Moves,
    formats: tuple[Format, Format],
) -> Float[Array, ""]:
    """The loss of one batch: mean KL over its targets, in nats.

    Both models compute in bfloat16 where they do not round: 1e-4 of what rounding to 4 bits does.
    """
    inputs = tokens[:, :-1]
    log_p = jax.nn.log_softmax(jax.lax.stop_gradient(model(inputs, _bfloat16_linear)[0]))
    linear = LearningLinear(moves, *formats)
    logits, _ = model(inputs, linear, {site: (start[site], learned[site]) for site in learned})
    log_q = jax.nn.log_softmax(logits)
    return jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))


@functools.partial(jax.jit, static_argnames=("moves", "formats"))
def _loss(model, start, learned, tokens, *, moves, formats):
    return divergence(model, start, learned, tokens, moves=moves, formats=formats)


def held_out_loss(
    model: Decoder,
    start: Mapping[str, BlockAffine],
    learned: Mapping[str, Learned],
    rows: Integer[np.ndarray, "rows length"],
    batch_rows: int,
    *,
    moves: Moves,
    formats: tuple[Format, Format],
) -> float:
    """Mean KL over the targets of all rows.

    Raises:
      ValueError: There are no rows.
    """
    if not len(rows):
        raise ValueError("no rows are held out: give some to choose the best step by")
    model = computing_in(model, jnp.bfloat16)
    total = 0.0
    for first in range(0, len(rows), batch_rows):
        batch = jnp.asarray(rows[first : first + batch_rows])
        loss = _loss(model, start, learned, batch, moves=moves, formats=formats)
        total += len(batch) * float(loss)
    return total / len(rows)


@functools.partial(
    jax.jit, static_argnames=("moves", "formats", "optimizer"), donate_argnames="state"
)
def _advance(
    model: Decoder,
    start: Mapping[str, BlockAffine],
    state: Progress,
    rows: Integer[Array, "rows length"],
    order: Integer[Array, "steps batch"],
    rates: Mapping[str, Float[Array, " steps"]],
    *,
    moves: Moves,
    formats: tuple[Format, Format],
    optimizer: optax.GradientTransformation,
) -> tuple[Progress, Float[Array, " steps"]]:
    """One chunk of steps."""
    model = computing_in(model, jnp.bfloat16)

    def loss(learned: dict[str, Learned], tokens: Array) -> Array:
        return divergence(model, start, learned, tokens, moves=moves, formats=formats)

    def step(state: Progress, scanned: Any) -> tuple[Progress, Array]:
        batch, rate = scanned
        value, gradient = jax.value_and_grad(loss)(state.learned, rows[batch])
        with jax.numpy_dtype_promotion("standard"):  # optax counts on it
            updates, kept = optimizer.update(gradient, state.optimizer, cast(Any, state.learned))
        learned = {
            site: _moved(one, cast(Any, updates)[site], rate) for site, one in state.learned.items()
        }
        state = dataclasses.replace(state, step=state.step + 1, learned=learned, optimizer=kept)
        return state, value

    return jax.lax.scan(step, state, cast(Any, (order, rates)))


def _moved(learned: Learned, updates: Learned, rate: Mapping[str, Array]) -> Learned:
    """A step against the updates, each part at its own rate; parts without a rate stay."""
    parts = {}
    for name in ("transform", "weights", "log_scale"):
        part = getattr(learned, name)
        if name in rate:
            r = rate[name]
            part = jax.tree.map(lambda p, u, r=r: p - r * u, part, getattr(updates, name))
        parts[name] = part
    return Learned(**parts)


def computing_in(model: Decoder, dtype: Any) -> Decoder:
    """The same parameters, other products computed in `dtype`."""
    return Decoder(model.config, model.parameters(), dtype=dtype)
