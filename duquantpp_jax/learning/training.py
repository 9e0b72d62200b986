"""The training loop, for all objectives.

    learned <- learned + optimiser(gradient of the objective on a batch)

Batches are drawn with a key, without replacement within a pass over the rows. At every check the
parameters are brought within their bounds and the loss on held-out rows is measured; those with the
least such loss, the start included, are the result. Learning whose loss is NaN or Inf stops there.
All devices share the rows of a batch (sharing.py).
"""

import abc
import dataclasses
import functools
from collections.abc import Sequence
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
from duquantpp_jax.core.mesh import DATA, placed
from duquantpp_jax.core.notices import warn
from duquantpp_jax.learning import state as states
from duquantpp_jax.learning.callbacks import Callback
from duquantpp_jax.learning.sharing import (
    Sharing,
    home,
    kept_bytes,
    mean_loss,
    memory_of,
    value_and_grad,
)

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

    def judging(self) -> "Objective":
        """One whose loss chooses the best step, if that is nearer to what will be measured."""
        return self

    def sparing(self) -> "Objective":
        """One with the same loss that keeps less for the backward pass, if there is one."""
        return self


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
    accumulate: int = 1,
    devices: Sequence[Any] | None = None,
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
      accumulate: Parts that a batch is taken in, which bounds memory; see `sharing`.
      devices: They share the rows of a batch; all by default, or as many as can evenly.
      callback: Called at every check with its step and losses.
      checkpoint: A file, written at every check; a run that finds it goes on from there, to the
        same bits. It holds digests of all other arguments, which must be the same.

    Raises:
      ValueError: Too few rows, or none held out; a batch that has no such parts; a checkpoint of
        other settings.
    """
    objective, learned, rows = jax.tree.map(jnp.asarray, (objective, learned, rows))
    sharing, some = Sharing.of(batch_rows, accumulate, devices), batch_rows // accumulate
    checked = objective.judging().prepared(held_out, some, 1 + steps / check_every)
    checked = _cut(checked, some, sharing)
    given = objective
    if _tight(objective, learned, rows, sharing, sharing.rows(batch_rows)):
        objective = objective.sparing()
    objective = sharing.put(objective)
    judging = objective.judging()
    best_loss = _loss_of(judging, sharing.put(learned), checked, sharing)
    state = Progress(
        jnp.int32(0), learned, optimizer.init(learned), learned, jnp.float32(best_loss)
    )
    start_loss, history = float(best_loss), []
    if not np.isfinite(start_loss):
        raise ValueError(
            f"where learning starts the loss of {_count(held_out)} held-out rows is NaN or Inf: "
            "start from another fit"
        )
    settings = {}
    if checkpoint is not None:
        parts = "" if accumulate == 1 else f" in {accumulate} parts"
        settings = {
            "objective": f"{_said(given)} of {states.digest(given)}",
            "optimizer": states.describe(optimizer, learned),
            "pace": f"{steps} steps, batches of {batch_rows}{parts}, checked every {check_every}",
            "start": states.digest(learned),
            "key": states.digest(jax.random.key_data(key)),
            "rows": states.digest((rows, held_out)),
        }
        if checkpoint.exists():
            state, start_loss, history = states.load(checkpoint, state, settings)
    order = batches(key, _count(rows), batch_rows, steps)
    state = jax.tree.map(jnp.copy, sharing.put(state))  # for it is given away
    rows = sharing.put(given.prepared(rows, some, steps * batch_rows / _count(rows)))
    while (first := int(state.step)) < steps and not (history and _diverged(*history[-1])):
        part = sharing.put(order[first : first + check_every])
        state, losses = _advance(objective, state, rows, part, optimizer=optimizer, sharing=sharing)
        loss = _loss_of(judging, state.learned, checked, sharing)
        if loss < float(state.best_loss):
            best = jax.tree.map(jnp.copy, state.learned)
            state = dataclasses.replace(state, best=best, best_loss=sharing.put(np.float32(loss)))
        history.append((int(state.step), float(jnp.mean(losses)), loss))
        if checkpoint is not None and jax.process_index() == 0:
            states.save(checkpoint, state, start_loss, history, settings)
        step, mean, _ = history[-1]
        callback(step, {"loss": mean, "held_out_loss": loss})
    if history and _diverged(*history[-1]):
        warn("learning diverged by step %d (loss %g, held out %g) and was stopped; the best so "
             "far is kept, of held-out loss %g: give a lower rate",
             *history[-1], float(state.best_loss))  # fmt: skip
    return Trained(home(state.best), start_loss, history)


def _diverged(step: int, loss: float, held_out: float) -> bool:
    return not (np.isfinite(loss) and np.isfinite(held_out))


def warmed_cosine(rate: float, steps: int) -> optax.Schedule:
    """Learning rates: warmed up over a twentieth of the steps, then down a cosine to zero.

    With fewer than twenty steps there is no warm-up: the first of them has the full rate.
    """
    return optax.warmup_cosine_decay_schedule(0.0, rate, steps // 20, steps + 1)


def held_out_loss(objective: Objective, learned: Any, rows: Rows, batch_rows: int) -> float:
    """Mean of the objective over all rows; ValueError if there are none."""
    alone = Sharing.of(1, 1)
    objective, learned = alone.put((objective, learned))
    return _loss_of(objective, learned, _cut(rows, batch_rows, alone), alone)


def _cut(rows: Rows, batch_rows: int, sharing: Sharing) -> list[Rows]:
    """Batches on the devices, which share those of as many rows as they can share."""
    if not (count := _count(rows)):
        raise ValueError("no rows are held out: give some to choose the best step by")
    mesh, found = sharing.mesh, []
    for first in range(0, count, batch_rows):
        batch = jax.tree.map(lambda a: a[first : first + batch_rows], rows)  # noqa: B023
        found.append(placed(batch, mesh, *[DATA] * (_count(batch) % mesh.size == 0)))
    return found


def _loss_of(objective: Objective, learned: Any, batches: list[Rows], sharing: Sharing) -> float:
    """Mean over the rows of all batches."""
    sizes = [_count(batch) for batch in batches]
    losses = [float(_loss(objective, learned, batch, sharing=sharing)) for batch in batches]
    return float(np.dot(sizes, losses)) / sum(sizes)


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


@functools.partial(jax.jit, static_argnames=("optimizer", "sharing"), donate_argnames="state")
def _advance(
    objective: Objective,
    state: Progress,
    rows: Rows,
    order: Integer[Array, "steps batch"],
    *,
    optimizer: optax.GradientTransformation,
    sharing: Sharing,
) -> tuple[Progress, Float[Array, " steps"]]:
    """One chunk of steps."""
    update = optax.with_extra_args_support(optimizer).update

    def step(state: Progress, number: Integer[Array, " batch"]) -> tuple[Progress, Array]:
        batch = jax.tree.map(lambda a: a[number], rows)
        loss = functools.partial(mean_loss, objective, batch=batch, sharing=sharing)
        value, gradient = value_and_grad(objective, state.learned, batch, sharing)
        extra = {"value": value, "grad": gradient, "value_fn": loss}
        with jax.numpy_dtype_promotion("standard"):  # optax counts on it
            updates, kept = update(gradient, state.optimizer, state.learned, **extra)
            learned = optax.apply_updates(state.learned, updates)
        state = dataclasses.replace(state, step=state.step + 1, learned=learned, optimizer=kept)
        return state, value

    state, losses = jax.lax.scan(step, state, order)
    return dataclasses.replace(state, learned=objective.bounded(state.learned)), losses


@functools.partial(jax.jit, static_argnames="sharing")
def _loss(objective: Objective, learned: Any, batch: Rows, *, sharing: Sharing) -> Float[Array, ""]:
    """Of a batch of any size; one that cannot be shared is run on every device."""
    if _count(batch) % sharing.mesh.size:
        return objective.loss(learned, batch)
    return mean_loss(objective, learned, batch, sharing._replace(parts=1))


def _tight(objective: Objective, learned: Any, rows: Rows, sharing: Sharing, each: int) -> bool:
    """Whether what the backward pass would be given takes more than half of a device's memory."""
    memory = memory_of(sharing.mesh.devices.flat[0])
    if memory is None:
        return False
    some = jax.tree.map(lambda a: jax.ShapeDtypeStruct((each, *a.shape[1:]), a.dtype), rows)
    return 2 * kept_bytes(objective, learned, some) > memory


def _said(objective: Objective) -> str:
    """The class, the hash of its file if that is not in the package, and the static fields."""
    kind, fields = type(objective), dataclasses.fields(objective)  # type: ignore[arg-type]
    static = [f.name for f in fields if not f.metadata.get("pytree_node", True)]
    choices = {name: getattr(objective, name) for name in static}
    return f"{kind.__module__}.{kind.__qualname__} {files.module_hashes(kind.__module__)} {choices}"


def _count(rows: Rows) -> int:
    return len(jax.tree.leaves(rows)[0])
