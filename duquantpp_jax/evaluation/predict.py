"""Perplexity of a model on rows of tokens, and how far its predictions are from a reference's.

    NLL = mean over targets of -log q_target                      nats; PPL = exp(NLL)
    KL  = mean over targets of sum_v p_v (log p_v - log q_v)      p the reference, q the model
    agreement = share of targets at which both put the same token first

Each is computed at every target in float32 and summed over targets and rows in float64, so the mean
is over targets. Rows are spread over all devices, the models are on each of them.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Float64, Integer

from duquantpp_jax.models import Decoder, Linear, Store

LARGEST_LOGITS = 2**28
"""Logits on one device at once (1 GiB); a few such arrays are live together."""
MOST_ROWS = 16
"""Rows on one device at once, however small the vocabulary."""


class Predictor(NamedTuple):
    """A model as it predicts: `model(tokens, linear, state, store=store)`."""

    model: Decoder
    linear: Linear
    state: Any = None
    store: Store | None = None


class RowSums(NamedTuple):
    """Sums over each row's targets; those against a reference are None without one.

    Attributes:
      nll: -log q_target, in nats.
      reference_nll: The same of the reference.
      kl: KL(reference || model), in nats.
      agreement: Targets at which both put the same token first.
    """

    nll: Float64[np.ndarray, " rows"]
    reference_nll: Float64[np.ndarray, " rows"] | None = None
    kl: Float64[np.ndarray, " rows"] | None = None
    agreement: Float64[np.ndarray, " rows"] | None = None


def row_sums(
    predictor: Predictor,
    reference: Predictor | None,
    tokens: Integer[np.ndarray, "rows length"],
    *,
    devices: Sequence[Any] | None = None,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> RowSums:
    """What the model makes of each row.

    Args:
      tokens: All but the last of a row are inputs, all but the first are targets.
      devices: Over which rows are spread; all if not given.
      progress: Called after each batch with rows done and rows in all.
    """
    mesh = Mesh(np.asarray(devices or jax.devices()), ("rows",))
    spread = NamedSharding(mesh, PartitionSpec("rows"))
    everywhere = NamedSharding(mesh, PartitionSpec())
    models = [(one.model, one.state) for one in (predictor, reference) if one is not None]
    models = jax.device_put(models, everywhere)
    choices = tuple((one.linear, one.store) for one in (predictor, reference) if one is not None)

    count, length = tokens.shape
    at_once = LARGEST_LOGITS // (length * predictor.model.config.vocab_size)
    at_once = max(1, min(at_once, MOST_ROWS, -(-count // mesh.size))) * mesh.size
    sums = []
    for first in range(0, count, at_once):
        batch = tokens[first : first + at_once]
        rows = len(batch)
        full = np.concatenate([batch, np.repeat(batch[:1], at_once - rows, axis=0)])
        parts = _at_targets(models, jax.device_put(full, spread), choices=choices)
        sums.append([np.asarray(one, np.float64)[:rows].sum(axis=1) for one in parts])
        progress(first + rows, count)
    return RowSums(*(np.concatenate(one) for one in zip(*sums, strict=True)))


@functools.partial(jax.jit, static_argnames="choices")
def _at_targets(
    models: list[tuple[Decoder, Any]],
    tokens: Integer[Array, "rows length"],
    *,
    choices: tuple[tuple[Linear, Store | None], ...],
) -> list[Float[Array, "rows targets"]]:
    """The summands of `RowSums` at every target."""
    logs = []
    for (model, state), (linear, store) in zip(models, choices, strict=True):
        logits, _ = model(tokens[:, :-1], linear, state, store=store)
        logs.append(jax.nn.log_softmax(logits))
    nll = [
        -jnp.take_along_axis(log, tokens[:, 1:, None], axis=-1, mode="fill")[..., 0] for log in logs
    ]
    if len(logs) == 1:
        return nll
    log_q, log_p = logs
    kl = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    agree = jnp.argmax(log_p, axis=-1) == jnp.argmax(log_q, axis=-1)
    return [*nll, kl, agree.astype(jnp.float32)]
