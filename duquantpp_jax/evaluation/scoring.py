"""How likely a model finds the tokens of rows of any length, and which it finds likelier.

    log q_t = log softmax(logits after tokens 0 .. t - 1)_t,    t = 1, 2, ...

Rows are scored by length, each filled up on the right to a power of two and a token, so that few
programs serve all lengths. A model is causal: what stands on the right changes nothing before it.
Formats whose scale spans a tensor (log256, NVFP4) are the exception: their results depend on the
rows of a batch and on what fills them up.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float32, Int32, Integer

from duquantpp_jax.evaluation.predict import (
    BATCH_ROWS,
    LARGEST_LOGITS,
    ROWS,
    Predictor,
    Progress,
    on_each_device,
)
from duquantpp_jax.models.sampling import bucket, padded

TOP = 5
"""How many of the likeliest tokens are found at each target."""


class RowScores(NamedTuple):
    """Log-probabilities at the targets of a row, which are all of its tokens but the first.

    Attributes:
      log_q: Of the target.
      likeliest: The likeliest tokens, the first of equals first.
      largest: Their log q.
    """

    log_q: Float32[np.ndarray, " targets"]
    likeliest: Int32[np.ndarray, "targets top"]
    largest: Float32[np.ndarray, "targets top"]


class Scorer:
    """Scores rows on all devices of this process, each of which runs whole batches.

    Attributes:
      predictor: The model, on all devices.
      sharding: Of arrays whose first axis is rows, a share on each device.
    """

    def __init__(
        self,
        predictor: Predictor,
        *,
        batch_rows: int = BATCH_ROWS,
        devices: Sequence[Any] | None = None,
    ):
        """Args:
        batch_rows: Most rows of a batch.
        devices: All devices of this process by default.
        """
        self._mesh = Mesh(np.asarray(devices or jax.local_devices()), ("rows",))
        self.predictor = jax.device_put(predictor, NamedSharding(self._mesh, PartitionSpec()))
        self.sharding = NamedSharding(self._mesh, ROWS)
        self.batch_rows = batch_rows

    def __call__(
        self, rows: Sequence[Sequence[int]], progress: Progress = lambda *_: None
    ) -> list[RowScores]:
        """Those of rows of at least two tokens each, in the order of the rows.

        Raises:
          ValueError: A row has fewer tokens, or the model gave NaN for one.
        """
        if short := [number for number, row in enumerate(rows) if len(row) < 2]:
            raise ValueError(f"row {short[0]} has no target: give at least two tokens")
        found: dict[int, RowScores] = {}
        for numbers, length in self._batches(rows):
            filled = [rows[number] for number in numbers]
            count = self._count(length) * self._mesh.size
            tokens, _ = padded(filled + filled[:1] * (count - len(filled)), length + 1)
            placed = jax.device_put(tokens, self.sharding)
            values = jax.tree.map(np.asarray, _scored(self.predictor, placed, mesh=self._mesh))
            for number, *row in zip(numbers, *values, strict=False):
                found[number] = RowScores(*(each[: len(rows[number]) - 1] for each in row))
                if wrong := np.count_nonzero(np.isnan(found[number].log_q)):
                    raise ValueError(
                        f"the model gave NaN for {wrong} tokens of row {number}: no score is "
                        "reported"
                    )
            progress(len(found), len(rows))
        return [found[number] for number in range(len(rows))]

    def _count(self, length: int) -> int:
        """Rows of a batch on a device, by the number of their inputs."""
        largest = LARGEST_LOGITS // (length * self.predictor.model.config.vocab_size)
        return max(1, min(self.batch_rows, largest))

    def _batches(self, rows: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], int]]:
        """Numbers of rows for all devices, the longest first, and to how many inputs to fill up."""
        lengths = [bucket(len(row) - 1) for row in rows]
        for length in sorted(set(lengths), reverse=True):
            numbers = [number for number, own in enumerate(lengths) if own == length]
            step = self._count(length) * self._mesh.size
            for first in range(0, len(numbers), step):
                yield numbers[first : first + step], length


@on_each_device
def _scored(predictor: Predictor, tokens: Integer[Array, "rows length"]) -> tuple[Array, ...]:
    """The parts of `RowScores` of each row."""
    log_q = predictor.log_probabilities(tokens)
    own = jnp.take_along_axis(log_q, tokens[:, 1:, None], axis=-1, mode="fill")[..., 0]
    largest, likeliest = jax.lax.top_k(log_q, min(TOP, log_q.shape[-1]))
    return own, likeliest.astype(jnp.int32), largest
