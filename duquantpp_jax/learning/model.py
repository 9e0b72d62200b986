"""Learning through the whole model: the least KL(float || quantized) over calibration text.

    loss = mean over targets of KL(p || q)

p from the float model, q from the model whose linears round (moves.py). Both predict, and KL is
computed, as everywhere (evaluation/predict.py); only the dtype of the matrix products may differ.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jaxtyping import Array, Float, Integer, Key

from duquantpp_jax.core import Fitted, Format, Weights
from duquantpp_jax.evaluation.predict import Predictor, kl_divergence
from duquantpp_jax.learning.moves import (
    PARTS,
    Learned,
    LearningLinear,
    Moves,
    SiteState,
    product,
)
from duquantpp_jax.learning.training import Objective, train
from duquantpp_jax.models import Decoder, dense
from duquantpp_jax.transforms.block import BlockAffine

Rates = Mapping[str, optax.Schedule]
"""Learning rates by what they move, of PARTS."""


@struct.dataclass
class Divergence(Objective):
    """Mean KL over the targets of a batch of token ids, in nats.

    In bfloat16 what is not rounded to 4 bits is off by 1e-4 of what that rounding does, unless a
    massive activation lies on a border between two elements in many channels at once, as Hadamard
    matrices make of position 0 of the embedded model: .18 nats were .23 there in float32.

    Attributes:
      model: The float model.
      start: Transform of each site, stacked over layers.
      moves: What learns.
      formats: Of activations and of weights.
      rounded: Of each site, weights that are held as they are; see `SiteState`.
      dtype: What both models compute in where they do not round.
    """

    model: Decoder
    start: dict[str, BlockAffine]
    moves: Moves = struct.field(pytree_node=False)
    formats: tuple[Format, Format] = struct.field(pytree_node=False)
    rounded: dict[str, Weights] | None = None
    dtype: Any = struct.field(pytree_node=False, default=jnp.bfloat16)

    def loss(
        self, learned: dict[str, Learned], batch: Integer[Array, "rows length"]
    ) -> Float[Array, ""]:
        """See the top of this file."""
        model = Decoder(self.model.config, self.model.parameters(), dtype=self.dtype)
        plain = dense if self.dtype == jnp.float32 else _bfloat16_linear
        log_p = jax.lax.stop_gradient(Predictor(model, plain).log_probabilities(batch))
        linear = LearningLinear(self.moves, *self.formats)
        held = self.rounded or {}
        state = {
            site: SiteState(self.start[site], one, held.get(site)) for site, one in learned.items()
        }
        log_q = Predictor(model, linear, state).log_probabilities(batch)
        return jnp.mean(kl_divergence(log_p, log_q))

    def bounded(self, learned: dict[str, Learned]) -> dict[str, Learned]:
        """Within `Moves.max_condition`."""
        return {site: self.moves.bounded(self.start[site], one) for site, one in learned.items()}


class Learning(NamedTuple):
    """What was learned.

    Attributes:
      fits: By site, stacked over layers.
      start_loss, history: As of `training.Trained`, in nats per target.
    """

    fits: dict[str, Fitted]
    start_loss: float
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
    optimizer: optax.GradientTransformation,
    dtype: Any = jnp.bfloat16,
    **options: Any,
) -> Learning:
    """Learns what `moves` says, from `start`.

    Args:
      start: Transform of each site, stacked over layers.
      formats: Of activations and of weights.
      rows: Token ids to learn from.
      held_out: Token ids to choose by; never test text.
      key: For the order of the batches.
      steps: Updates.
      optimizer: Of {site: Learned}; `at_rates` gives each part a rate of its own.
      dtype: As of `Divergence`.
      options: Others of `training.train`.
    """
    objective = Divergence(model, dict(start), moves, formats, dtype=dtype)
    learned = {site: moves.init(one, model.weights(site)) for site, one in start.items()}
    found = train(
        objective, learned, rows, held_out, key, steps=steps, optimizer=optimizer, **options
    )
    fits = {
        site: moves.fitted(start[site], one, model.weights(site))
        for site, one in found.learned.items()
    }
    return Learning(fits, found.start_loss, found.history)


def at_rates(
    rates: Rates, direction: optax.GradientTransformation | None = None
) -> optax.GradientTransformation:
    """An optimiser that moves each part of `Learned` at its own rate; parts without one stay.

    Args:
      rates: Multiply the updates, step by step.
      direction: What the updates are: Adam's by default.

    Raises:
      ValueError: A rate is for no part.
    """
    if unknown := set(rates) - set(PARTS):
        raise ValueError(f"{min(unknown)} does not learn: rates are for {', '.join(PARTS)}")

    def init(params: Any) -> Any:
        return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        def scaled(path: tuple[Any, ...], u: Array) -> Array:
            part = next(entry.name for entry in path if getattr(entry, "name", None) in PARTS)
            if part not in rates:
                return jnp.zeros_like(u)
            return -jnp.asarray(rates[part](state.count), u.dtype) * u

        moved = jax.tree_util.tree_map_with_path(scaled, updates)
        return moved, optax.ScaleByScheduleState(count=state.count + 1)

    scale = optax.GradientTransformation(init, update)
    return optax.chain(direction or optax.scale_by_adam(), scale)


def _bfloat16_linear(
    site: str, x: Array, weights: tuple[Array, ...], state: Any
) -> tuple[tuple[Array, ...], None]:
    return tuple(product(x, w) for w in weights), None
