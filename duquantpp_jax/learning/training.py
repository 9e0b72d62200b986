"""The training loop, for all objectives.

    learned <- learned + optimiser(gradient of the objective on a batch)

Batches are drawn with a key, without replacement within a pass over the rows. At every check the
parameters are brought within their bounds and the loss on held-out rows is measured; those with the
least such loss, the start included, are the result. Learning whose loss is NaN or Inf stops there.
"""

import abc
import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jaxtyping import Array, Float, Int, Integer, Key

from duquantpp_jax import files
from duquantpp_jax.core import Fitted
from duquantpp_jax.core.notices import warn
from duquantpp_jax.learning import state as states
from duquantpp_jax.learning.callbacks import Callback

Rows = Any
"""A pytree of arrays whose leading axes are the rows that batches are drawn from."""


class Objective(abc.ABC):
    """A function to minimise: a pytree of given arrays, whose static fields are choices."""

    @abc.abstractmethod
    def loss(self, learned: Any, batch: Rows) -> Float[Array, ""]:
        """Mean over the rows of a batch."""

    def bounded(self, learned: Any) -> Any:
        """The parameters, brought within their bounds."""
        return learned

    def prepared(self, rows: Rows, batch_rows: int, uses: float) -> Rows:
        """The rows, with what the loss would else make of them anew each time.

        Args:
          uses: How often the loss of each is asked for.
        """
        return rows


@struct.dataclass
class Progress:
    """The state of training; `best` are the parameters with the least held-out loss so far."""

    step: Int[Array, ""]
    learned: Any
    optimizer: optax.OptState
    best: Any
    best_loss: Float[Array, ""]


class Trained(NamedTuple):
    """The result of training.

    Attributes:
      learned: The parameters with the least held-out loss; None where several runs gave theirs.
      start_loss: Held-out loss before the first step.
      history: (step, training loss since the last, held-out loss) of every check.
      fits: By site, where sites have learned (`SitesObjective.learn`).
    """

    learned: Any
    start_loss: float
    history: list[tuple[int, float, float]]
    fits: dict[str, Fitted] = {}  # noqa: RUF012


def train(
    objective: Objective,
    learned: Any,
    rows: Rows,
    held_out: Rows,
    key: Key[Array, ""],
    *,
    steps: int,
    optimizer: optax.GradientTransformation,
    batch_rows: int = 16,
    check_every: int = 100,
    callback: Callback = lambda *_: None,
    checkpoint: Path | None = None,
) -> Trained:
    """Minimises the objective.

    >>> import optax
    >>> from flax import struct
    >>> @struct.dataclass
    ... class Line(Objective):
    ...     def loss(self, learned, batch):
    ...         x, y = batch
    ...         return jnp.mean((learned * x - y) ** 2)
    >>> x = jnp.linspace(-1, 1, 32)
    >>> rows = x, 3 * x
    >>> found = train(Line(), jnp.float32(0), rows, rows, jax.random.key(0), steps=8,
    ...               optimizer=optax.sgd(0.5), check_every=8)
    >>> found.history[-1][2] < found.start_loss
    True

    Args:
      rows, held_out: To learn from, and to choose by; never test text.
      optimizer: Of optax, with its schedule. Compiled code is kept while it is the same object.
      callback: Called at every check with its step and losses.
      checkpoint: A file, written at every check; a run that finds it goes on from there, to the
        same bits. It holds digests of all other arguments, which must be the same.

    Raises:
      ValueError: Too few rows, or none held out; a checkpoint of other settings.
    """
    objective, learned, rows = jax.tree.map(jnp.asarray, (objective, learned, rows))
    checked = objective.prepared(held_out, batch_rows, 1 + steps / check_every)
    best_loss = jnp.float32(held_out_loss(objective, learned, checked, batch_rows))
    state = Progress(jnp.int32(0), learned, optimizer.init(learned), learned, best_loss)
    start_loss, history = float(best_loss), []
    if not np.isfinite(start_loss):
        raise ValueError(
            f"where learning starts the loss of {_count(held_out)} held-out rows is NaN or Inf: "
            "start from another fit"
        )
    settings = {}
    if checkpoint is not None:
        settings = {
            "objective": f"{_said(objective)} of {states.digest(objective)}",
            "optimizer": states.describe(optimizer, learned),
            "pace": f"{steps} steps, batches of {batch_rows}, checked every {check_every}",
            "start": states.digest(learned),
            "key": states.digest(jax.random.key_data(key)),
            "rows": states.digest((rows, held_out)),
        }
        if checkpoint.exists():
            state, start_loss, history = states.load(checkpoint, state, settings)
    order = batches(key, _count(rows), batch_rows, steps)
    state = jax.tree.map(jnp.copy, state)  # for it is given away
    rows = objective.prepared(rows, batch_rows, steps * batch_rows / _count(rows))
    while (first := int(state.step)) < steps and not (history and _diverged(*history[-1])):
        part = jnp.asarray(order[first : first + check_every])
        state, losses = _advance(objective, state, rows, part, optimizer=optimizer)
        loss = held_out_loss(objective, state.learned, checked, batch_rows)
        if loss < float(state.best_loss):
            best = jax.tree.map(jnp.copy, state.learned)
            state = dataclasses.replace(state, best=best, best_loss=jnp.float32(loss))
        history.append((int(state.step), float(jnp.mean(losses)), loss))
        if checkpoint is not None:
            states.save(checkpoint, state, start_loss, history, settings)
        step, mean, _ = history[-1]
        callback(step, {"loss": mean, "held_out_loss": loss})
    if history and _diverged(*history[-1]):
        warn("learning diverged by step %d (loss %g, held out %g) and was stopped; the best so "
             "far is kept, of held-out loss %g: give a lower rate",
             *history[-1], float(state.best_loss))  # fmt: skip
    return Trained(state.best, start_loss, history)


def _diverged(step: int, loss: float, held_out: float) -> bool:
    return not (np.isfinite(loss) and np.isfinite(held_out))


def warmed_cosine(rate: float, steps: int) -> optax.Schedule:
    """Learning rates: warmed up over a twentieth of the steps, then down a cosine to zero.

    With fewer than twenty steps there is no warm-up: the first of them has the full rate.
    """
    return optax.warmup_cosine_decay_schedule(0.0, rate, steps // 20, steps + 1)


def held_out_loss(objective: Objective, learned: Any, rows: Rows, batch_rows: int) -> float:
    """Mean of the objective over all rows; ValueError if there are none."""
    count = _count(rows)
    if not count:
        raise ValueError("no rows are held out: give some to choose the best step by")
    total = 0.0
    for first in range(0, count, batch_rows):
        batch = jax.tree.map(lambda a: jnp.asarray(a[first : first + batch_rows]), rows)  # noqa: B023
        total += _count(batch) * float(_loss(objective, learned, batch))
    return total / count


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
    order = np.concatenate([shuffled[: per_pass * batch_rows] for shuffled in passes])
    return order.reshape(-1, batch_rows)[:steps]


@functools.partial(jax.jit, static_argnames="optimizer", donate_argnames="state")
def _advance(
    objective: Objective,
    state: Progress,
    rows: Rows,
    order: Integer[Array, "steps batch"],
    *,
    optimizer: optax.GradientTransformation,
) -> tuple[Progress, Float[Array, " steps"]]:
    """One chunk of steps."""
    update = optax.with_extra_args_support(optimizer).update

    def step(state: Progress, number: Integer[Array, " batch"]) -> tuple[Progress, Array]:
        batch = jax.tree.map(lambda a: a[number], rows)
        loss = functools.partial(objective.loss, batch=batch)
        value, gradient = jax.value_and_grad(loss)(state.learned)
        extra = {"value": value, "grad": gradient, "value_fn": loss}
        with jax.numpy_dtype_promotion("standard"):  # optax counts on it
            updates, kept = update(gradient, state.optimizer, state.learned, **extra)
            learned = optax.apply_updates(state.learned, updates)
        state = dataclasses.replace(state, step=state.step + 1, learned=learned, optimizer=kept)
        return state, value

    state, losses = jax.lax.scan(step, state, order)
    return dataclasses.replace(state, learned=objective.bounded(state.learned)), losses


@jax.jit
def _loss(objective: Objective, learned: Any, batch: Rows) -> Float[Array, ""]:
    return objective.loss(learned, batch)


def _said(objective: Objective) -> str:
    """The class, the hash of its file if that is not in the package, and the static fields."""
    kind, fields = type(objective), dataclasses.fields(objective)  # type: ignore[arg-type]
    static = [f.name for f in fields if not f.metadata.get("pytree_node", True)]
    choices = {name: getattr(objective, name) for name in static}
    return f"{kind.__module__}.{kind.__qualname__} {files.module_hashes(kind.__module__)} {choices}"


def _count(rows: Rows) -> int:
    return len(jax.tree.leaves(rows)[0])
