"""The engine that measures how well a model predicts rows of tokens, and how far from a reference.

    NLL = mean over targets of -log q_target                      nats; PPL = exp(NLL)
    KL  = mean over targets of sum_v p_v (log p_v - log q_v)      p the reference, q the model
    agreement = share of targets at which both put the same token first

Each is computed at every target in float32 and summed over the targets of a row in float64.

Rows run in batches of `BATCH_ROWS`, or fewer if the logits of a batch would be too large. If the
scale of a format spans a tensor (log256), results depend on the batch. So a batch has the same rows
on any number of devices, and each device runs whole batches. Copies of the first row fill up the
last batch, which changes no scale of it; their sums are dropped.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Float64, Integer

from duquantpp_jax.core.mesh import DATA, everywhere, gathered, placed
from duquantpp_jax.kernels.flash_attention.api import flash_attention
from duquantpp_jax.models import (
    Decoder,
    DecoderConfig,
    Linear,
    Store,
    dense,
    parameter_shapes,
)
from duquantpp_jax.ptq.estimate import running_bytes
from duquantpp_jax.ptq.layout import decoded_once
from duquantpp_jax.ptq.sharding import MODEL, cut

LARGEST_LOGITS = 2**28
"""Most logits of a batch (1 GiB in float32); a few such arrays are in memory together."""
BATCH_ROWS = 16
"""Most rows of a batch."""

Progress = Callable[[int, int], None]
"""Called after each batch with the number of rows done and of all rows."""

ROWS = PartitionSpec(DATA)


@struct.dataclass
class Predictor:
    """A model that predicts with `model(tokens, linear, state, store=store)`.

    Attributes:
      attention: Implementation of `flash_attention`: "triton", "xla", or None for the first of
        these that runs here.
    """

    model: Decoder
    linear: Linear = struct.field(pytree_node=False, default=dense)
    state: Any = None
    store: Store | None = struct.field(pytree_node=False, default=None)
    attention: Literal["triton", "xla"] | None = struct.field(pytree_node=False, default=None)

    def log_probabilities(
        self, tokens: Integer[Array, "rows length"]
    ) -> Float[Array, "rows targets vocab"]:
        """log q of every token at every target; the targets are all tokens but the first."""
        model = self.model
        if self.attention != "xla":
            attention = functools.partial(flash_attention, implementation=self.attention)
            model = model.with_attention(attention)
        logits, _ = model(tokens[:, :-1], self.linear, self.state, store=self.store)
        return normalized(logits)


def normalized(logits: Float[Array, "*targets vocab"]) -> Float[Array, "*targets vocab"]:
    """log q: the logits less the logarithm of the sum of their exponentials."""
    return jax.nn.log_softmax(logits)


def kl_divergence(
    log_p: Float[Array, "*targets vocab"], log_q: Float[Array, "*targets vocab"]
) -> Float[Array, "*targets"]:
    """KL(p || q) = sum_v p_v (log p_v - log q_v) at every target, in nats.

    >>> p, q = jnp.asarray([0.5, 0.5]), jnp.asarray([0.25, 0.75])
    >>> f"{kl_divergence(jnp.log(p), jnp.log(q)):.4f}"
    '0.1438'
    """
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


class RowSums(NamedTuple):
    """Sums over the targets of each row, of a model compared with a reference; in nats.

    Attributes:
      agreement: Number of targets at which both put the same token first.
    """

    nll: Float64[np.ndarray, " rows"]
    reference_nll: Float64[np.ndarray, " rows"]
    kl: Float64[np.ndarray, " rows"]
    agreement: Float64[np.ndarray, " rows"]


def check_sums(sums: Float[np.ndarray, " rows"], who: str) -> None:
    """Raises ValueError if the sums of some rows are NaN or Inf; counts them."""
    if len(wrong := np.flatnonzero(~np.isfinite(sums))):
        raise ValueError(
            f"{who} gave NaN or Inf in {len(wrong)} of {len(sums)} rows, first in row {wrong[0]}: "
            "no result is reported"
        )


class _Predicted(NamedTuple):
    """Predictions of the reference on a batch: log p, its first token, and -log p_target."""

    log_p: Float[Array, "rows targets vocab"]
    first: Integer[Array, "rows targets"]
    nll: Float[Array, "rows targets"]


class Reference:
    """A model on rows of tokens, with which others are compared.

    The log-probabilities of the first batches are kept, as many as fit into the bound; the others
    are computed again for every model. (All visit the batches in the same order, so keeping the
    first ones saves more than keeping the latest.)
    """

    def __init__(
        self,
        predictor: Predictor,
        tokens: Integer[np.ndarray, "rows length"],
        *,
        batch_rows: int = BATCH_ROWS,
        keep_bytes: int = 0,
        devices: Sequence[Any] | None = None,
        mesh: Mesh | None = None,
    ):
        """Args:
          tokens: All but the last of a row are inputs, all but the first are targets.
          keep_bytes: Bound on the log-probabilities kept on each device.
          devices: They share the batches; all devices of all processes by default.
          mesh: In their place, of `ptq.sharding`: its groups share the batches, and the devices of
            a group the weights.

        Raises:
          ValueError: There are no rows, or a batch has none.
        """
        if not len(tokens) or batch_rows < 1:
            raise ValueError(
                f"{len(tokens)} rows in batches of {batch_rows} were given: give at least one"
            )
        self.tokens = tokens
        count, length = tokens.shape
        largest = most_rows(length, predictor.model.config)
        self.batch_rows = min(batch_rows, largest, count)
        self._mesh = mesh or Mesh(np.asarray(devices or jax.devices()), (DATA,))
        self._given, self._on_devices = predictor, self._placed(predictor)
        self._kept: dict[int, _Predicted] = {}
        self._left = keep_bytes * self._mesh.shape[DATA]

    def row_sums(self, predictor: Predictor, progress: Progress = lambda *_: None) -> RowSums:
        """`RowSums` of a model compared with the reference."""
        if predictor.model is self._given.model:  # it is on the devices already
            predictor = dataclasses.replace(predictor, model=self._on_devices.model)
        predictor = self._placed(predictor)
        parts = [
            _by_row(*_compared(predictor, tokens, base, mesh=self._mesh))
            for tokens, base in self._batches(progress)
        ]
        return RowSums(*self._joined(parts))

    def nll(self, progress: Progress = lambda *_: None) -> Float64[np.ndarray, " rows"]:
        """Sums of -log p_target over the targets of each row, of the reference itself."""
        return self._joined([_by_row(base.nll) for _, base in self._batches(progress)])[0]

    def _placed(self, predictor: Predictor) -> Predictor:
        """The predictor on the devices."""
        if MODEL not in self._mesh.axis_names:
            state = decoded_once(predictor.state, self._mesh.local_devices[0])
            return everywhere(dataclasses.replace(predictor, state=state), self._mesh)
        parts = predictor.model, predictor.linear, predictor.state
        return Predictor(*cut(self._mesh, *parts), predictor.store, attention="xla")

    def _batches(self, progress: Progress) -> Iterator[tuple[Array, _Predicted]]:
        """Tokens of a batch for every device, and the predictions of the reference."""
        count, step = len(self.tokens), self.batch_rows * self._mesh.shape[DATA]
        for first in range(0, count, step):
            rows = np.arange(first, first + step)
            batch = rows // self.batch_rows * self.batch_rows  # first row of each row's batch
            filled = np.where(rows < count, rows, np.where(batch < count, batch, 0))
            tokens = placed(self.tokens[filled], self._mesh, DATA)
            if (base := self._kept.get(first)) is None:
                base = _predicted(self._on_devices, tokens, mesh=self._mesh)
                if base.log_p.nbytes <= self._left:
                    self._left -= base.log_p.nbytes
                    self._kept[first] = base
            yield tokens, base
            progress(min(first + step, count), count)

    def _joined(self, parts: list[list[np.ndarray]]) -> list[Float64[np.ndarray, " rows"]]:
        """The sums of all batches, without the copies that fill up the last batch."""
        return [np.concatenate(sums)[: len(self.tokens)] for sums in zip(*parts, strict=True)]


def most_rows(length: int, config: DecoderConfig) -> int:
    """Most rows of a length whose logits are not too large for a batch."""
    return max(1, LARGEST_LOGITS // (length * config.vocab_size))


def evaluation_bytes(config: DecoderConfig, length: int, stored: float = 2.0) -> float:
    """Memory of the device while the float model is evaluated alone, roughly.

    That is all parameters, the log-probabilities of a batch of rows, and either a layer that runs
    or the head in float32 with the logits and one more array of their size.

    Args:
      length: Of a row.
      stored: Bytes of a parameter in the checkpoint.
    """
    rows, shapes = min(BATCH_ROWS, most_rows(length, config)), parameter_shapes(config)
    logits = 4.0 * rows * length * config.vocab_size
    head = 4.0 * (stored < 4) * config.vocab_size * config.hidden_size + 2 * logits
    whole = float(stored * sum(map(math.prod, shapes.values())))
    return whole + logits + max(running_bytes(config, rows, length, stored), head)


def on_each_device(of_batch: Callable[..., Any]) -> Any:
    """Compiles a function of a predictor and arrays; each device, or group of them, gets rows of
    its own."""

    @functools.partial(jax.jit, static_argnames="mesh")
    def run(predictor: Predictor, *arrays: Any, mesh: Mesh) -> Any:
        specs = (PartitionSpec(), *[ROWS] * len(arrays))
        options: Any = {"axis_names": {DATA}, "check_vma": False}
        mapped = jax.shard_map(of_batch, mesh=mesh, in_specs=specs, out_specs=ROWS, **options)
        return mapped(predictor, *arrays)

    return run


@on_each_device
def _predicted(predictor: Predictor, tokens: Integer[Array, "rows length"]) -> _Predicted:
    log_p = predictor.log_probabilities(tokens)
    return _Predicted(log_p, jnp.argmax(log_p, axis=-1), _nll(log_p, tokens))


@on_each_device
def _compared(
    predictor: Predictor, tokens: Integer[Array, "rows length"], base: _Predicted
) -> tuple[Float[Array, "rows targets"], ...]:
    """The terms of `RowSums` at every target."""
    log_q = predictor.log_probabilities(tokens)
    agree = (base.first == jnp.argmax(log_q, axis=-1)).astype(jnp.float32)
    return _nll(log_q, tokens), base.nll, kl_divergence(base.log_p, log_q), agree


def _by_row(*at_targets: Float[Array, "rows targets"]) -> list[Float64[np.ndarray, " rows"]]:
    """Sums over targets; waits for them, so that only one batch is on the devices."""
    return [gathered(values).astype(np.float64).sum(axis=1) for values in at_targets]


def _nll(
    log_q: Float[Array, "rows targets vocab"], tokens: Integer[Array, "rows length"]
) -> Float[Array, "rows targets"]:
    return -jnp.take_along_axis(log_q, tokens[:, 1:, None], axis=-1, mode="fill")[..., 0]
