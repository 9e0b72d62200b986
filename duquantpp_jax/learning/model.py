"""Learning through the whole model: KL(float || quantized) over calibration text is minimised.

    loss = mean over targets of KL(p || q)

p from the float model, q from the model whose linears round (moves.py). KL is computed as it is
everywhere (evaluation/predict.py); only the dtype of the matrix products may differ. The float
model's last hidden states are kept: a row that is seen again takes its head alone. The head runs
row by row, and its gradient is taken there and then: the logits of one row are in memory.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jaxtyping import Array, Float, Integer, Key

from duquantpp_jax.core import Format, MXArray
from duquantpp_jax.evaluation.predict import kl_divergence, normalized
from duquantpp_jax.learning.moves import PARTS, Learned, Moves, SitesObjective
from duquantpp_jax.learning.straight_through import product
from duquantpp_jax.learning.training import Trained
from duquantpp_jax.models import Decoder, Linear, dense
from duquantpp_jax.transforms.block import BlockAffine

Batch = Integer[Array | np.ndarray, "rows length"] | tuple[Array, Array]
"""Token ids, and what `Divergence.hidden` gives of them, or without it."""
KEPT_BYTES = 2 << 30
"""Most bytes of hidden states that are kept of the rows to learn from, and of those held out."""


@struct.dataclass
class Divergence(SitesObjective):
    """Mean KL over the targets of a batch of token ids, in nats.

    In bfloat16 the loss is off by 1e-4 of itself, unless a massive activation lies on a border
    between two elements in many channels at once. A Hadamard matrix does so to position 0 of the
    embedded model: there the loss was .18 nats in bfloat16 and .23 in float32.

    Attributes:
      rounded: Weights of each site that were rounded before; see `SiteState`.
      dtype: Of both models' other numbers.
      judged: The dtype in which held-out rows choose the best step, if it is another.
    """

    model: Decoder
    rounded: dict[str, tuple[MXArray, ...]] | None = None
    dtype: Any = struct.field(pytree_node=False, default=jnp.bfloat16)
    judged: Any = struct.field(pytree_node=False, default=None)

    def loss(self, learned: dict[str, Learned], batch: Batch) -> Float[Array, ""]:
        tokens, hidden = batch if isinstance(batch, tuple) else (batch, self.hidden(batch))
        model, state = self._computing(), self.states(learned, self.rounded)
        return head_divergence(model, _before_targets(model, tokens, self.linear, state), hidden)

    def hidden(
        self, tokens: Integer[Array | np.ndarray, "rows length"]
    ) -> Float[Array, "rows targets k"]:
        """What the head of the float model reads before every target."""
        plain = dense if self.dtype == jnp.float32 else _bfloat16_linear
        return _before_targets(self._computing(), tokens, plain)

    def _computing(self) -> Decoder:
        """The model in `dtype`, with the attention that is fastest."""
        return self.model.computing(self.dtype).with_fused_attention()

    def judging(self) -> "Divergence":
        return dataclasses.replace(self, dtype=self.dtype if self.judged is None else self.judged)

    def sparing(self) -> "Divergence":
        return dataclasses.replace(self, model=self.model.rematerializing())

    def prepared(self, rows: Batch, batch_rows: int, uses: float) -> Batch:
        """The rows with `hidden` of each, if they are used twice and take no more than KEPT_BYTES;
        see `Objective.prepared`."""
        if isinstance(rows, tuple) or uses < 2 or not len(rows):
            return rows
        count, length = rows.shape
        width = self.model.config.hidden_size * jnp.dtype(self.dtype).itemsize
        if count * (length - 1) * width > KEPT_BYTES:
            return rows
        tokens, some = np.asarray(rows), min(batch_rows, count)
        batches = [
            _hidden(self, tokens[np.arange(first, first + some) % count])
            for first in range(0, count, some)
        ]
        return jnp.asarray(tokens), jnp.concatenate(batches)[:count]


_hidden = jax.jit(Divergence.hidden)


def _before_targets(
    model: Decoder, tokens: Integer[Array | np.ndarray, "rows length"], linear: Linear, *state: Any
) -> Float[Array, "rows targets k"]:
    """What the head reads before every target.

    The last token, which is no input, is run as well: it changes no number before it, and a GPU
    multiplies 512 positions faster than 511.
    """
    return model.hidden(jnp.asarray(tokens), linear, *state)[:, :-1]


@jax.custom_vjp
def head_divergence(
    model: Decoder,
    hidden: Float[Array, "rows targets k"],
    wanted: Float[Array, "rows targets k"],
) -> Float[Array, ""]:
    """Mean KL(p || q) over targets, q the head's prediction from `hidden`, p that from `wanted`.

    Its gradient is that of `hidden` alone: neither the model nor what is wanted learns.
    """
    of_row = functools.partial(_row_divergence, model)
    return jnp.mean(jax.lax.map(lambda pair: of_row(*pair), (hidden, wanted)))


def _row_divergence(
    model: Decoder, hidden: Float[Array, "targets k"], wanted: Float[Array, "targets k"]
) -> Float[Array, ""]:
    log_q, log_p = (normalized(model.logits(h[None])) for h in (hidden, wanted))
    return jnp.mean(kl_divergence(log_p, log_q))


def _forward(model: Decoder, hidden: Array, wanted: Array) -> tuple[Array, Array]:
    of_row = jax.value_and_grad(functools.partial(_row_divergence, model))
    values, gradients = jax.lax.map(lambda pair: of_row(*pair), (hidden, wanted))
    return jnp.mean(values), gradients


def _backward(gradients: Array, g: Float[Array, ""]) -> tuple[None, Array, None]:
    scaled = gradients.astype(jnp.float32) * (g / np.float32(len(gradients)))
    return None, scaled.astype(gradients.dtype), None


head_divergence.defvjp(_forward, _backward)


def learn_model(
    model: Decoder,
    start: Mapping[str, BlockAffine],
    moves: Moves,
    formats: tuple[Format, Format],
    rows: Integer[np.ndarray, "rows length"],
    held_out: Integer[np.ndarray, "held length"],
    key: Key[Array, ""],
    *,
    dtype: Any = jnp.bfloat16,
    **options: Any,
) -> Trained:
    """Learns what `moves` names, from `start`.

    Args:
      start, formats, dtype: As of `Divergence`; start is stacked over layers.
      rows, held_out: Token ids to learn from, and to choose by; never test text.
      options: Of `training.train`; `at_rates` gives an optimiser with a rate for each part.
    """
    weights = {site: model.weights(site) for site in start}
    objective = Divergence(dict(start), moves, formats, model, dtype=dtype)
    return objective.learn(weights, rows, held_out, key, **options)


def at_rates(
    rates: Mapping[str, optax.Schedule], direction: optax.GradientTransformation | None = None
) -> optax.GradientTransformation:
    """An optimiser with a rate for each part of `Learned`; parts without a rate stay.

    Args:
      rates: By the names of PARTS.
      direction: Gives the updates that the rates multiply; Adam by default.

    Raises:
      ValueError: A rate is for no part.
    """
    if unknown := set(rates) - set(PARTS):
        raise ValueError(f"{min(unknown)} does not learn: rates are for {', '.join(PARTS)}")

    direction = direction or optax.scale_by_adam()
    scaled = {p: optax.chain(direction, optax.scale_by_learning_rate(r)) for p, r in rates.items()}
    return by_parts(dict.fromkeys(PARTS, optax.set_to_zero()) | scaled)


def by_parts(optimizers: Mapping[str, optax.GradientTransformation]) -> Any:
    """An optimiser that is another one for each part of `Learned`, by the names of PARTS."""

    def split(tree: Any) -> dict[str, list[Array]]:
        found: dict[str, list[Array]] = {part: [] for part in optimizers}
        for path, leaf in jax.tree.leaves_with_path(tree):
            found[_part(path)].append(leaf)
        return found

    def init(params: Any) -> Any:
        return {part: optimizers[part].init(leaves) for part, leaves in split(params).items()}

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        moved, kept, at = {}, {}, split(params)
        for part, given in split(updates).items():
            optimizer = optax.with_extra_args_support(optimizers[part])
            new: Any
            new, kept[part] = optimizer.update(given, state[part], at[part], **extra)
            moved[part] = iter(new)
        return jax.tree.map_with_path(lambda path, _: next(moved[_part(path)]), updates), kept

    return optax.GradientTransformationExtraArgs(init, update)


def _part(path: tuple[Any, ...]) -> str:
    """The part that an array belongs to, by where it is in a tree of `Learned`."""
    return next(entry.name for entry in path if getattr(entry, "name", None) in PARTS)


def _bfloat16_linear(
    site: str, x: Array, weights: tuple[Array, ...], state: Any
) -> tuple[tuple[Array, ...], None]:
    return tuple(product(x, w) for w in weights), None
