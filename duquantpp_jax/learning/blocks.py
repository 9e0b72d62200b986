"""Learning a decoder block after the other: one block's weights are in memory, and the hidden
states of all rows before and after it.

    loss = mean over tokens of |y - y^|^2 / |y|^2,      y = block(h),  y^ = rounding block(h^)

h are the float model's hidden states before the block and y those after it, each token's error
against its own energy, for the next norm divides by it. h^ is what the block is given:

    prefix = "float"        h^ = h: blocks do not know of each other
    prefix = "quantized"    h^ from the blocks before as they were learned and round, so that each
                            learns to make good what they have done

Source: block by block with quantized inputs and float targets, as in OmniQuant, arXiv 2308.13137.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jaxtyping import Array, Float, Float32, Int, Integer, Key

from duquantpp_jax.core import Fitted, Format
from duquantpp_jax.learning.model import Learning
from duquantpp_jax.learning.moves import Learned, LearningLinear, Moves, SiteState
from duquantpp_jax.learning.training import Objective, Trained, train
from duquantpp_jax.models import SITE_WEIGHTS, SITES, Decoder, DecoderConfig, dense
from duquantpp_jax.models.layers import layer, window
from duquantpp_jax.ptq.site import layer_of
from duquantpp_jax.transforms.block import BlockAffine

Parameters = Mapping[str, Float[Array | np.ndarray, "..."]]
"""Of one block, by name inside it."""


@struct.dataclass
class BlockError(Objective):
    """The loss at the top of this file, of a batch of (h^, y).

    Attributes:
      parameters: Of the block.
      window: As of `lazy.window`.
      start: Transform of each site.
      config: Of the model.
      moves: What learns.
      formats: Of activations and of weights.
    """

    parameters: dict[str, Array]
    window: Int[Array, ""] | None
    start: dict[str, BlockAffine]
    config: DecoderConfig = struct.field(pytree_node=False)
    moves: Moves = struct.field(pytree_node=False)
    formats: tuple[Format, Format] = struct.field(pytree_node=False)

    def target(self, x: Float[Array, "rows length k"]) -> Float[Array, "rows length k"]:
        """What the float block makes of x."""
        nothing: dict[str, Any] = {site: None for site in SITES}  # noqa: C420
        return layer(self.config, x, self.parameters, self.window, dense, nothing)[0]

    def output(
        self, learned: dict[str, Learned], x: Float[Array, "rows length k"]
    ) -> Float[Array, "rows length k"]:
        """What the rounding block makes of x."""
        linear = LearningLinear(self.moves, *self.formats)
        state = {site: SiteState(self.start[site], one) for site, one in learned.items()}
        return layer(self.config, x, self.parameters, self.window, linear, state)[0]

    def loss(self, learned: dict[str, Learned], batch: tuple[Array, Array]) -> Float[Array, ""]:
        """See the top of this file."""
        given, wanted = batch
        off = jnp.sum(jnp.square(self.output(learned, given) - wanted), axis=-1)
        return jnp.mean(off / jnp.sum(jnp.square(wanted), axis=-1))

    def bounded(self, learned: dict[str, Learned]) -> dict[str, Learned]:
        """Within `Moves.max_condition`."""
        return {site: self.moves.bounded(self.start[site], one) for site, one in learned.items()}


def learn_blocks(
    config: DecoderConfig,
    blocks: Iterable[tuple[Parameters, Mapping[str, BlockAffine]]],
    moves: Moves,
    formats: tuple[Format, Format],
    rows: Float32[np.ndarray, "rows length k"],
    held_out: Float32[np.ndarray, "held length k"],
    key: Key[Array, ""],
    *,
    steps: int,
    optimizer: optax.GradientTransformation,
    prefix: Literal["float", "quantized"] = "quantized",
    batch_rows: int = 4,
    checkpoint: Path | None = None,
    **options: Any,
) -> Iterator[tuple[dict[str, Fitted], Trained]]:
    """Learns block after block; of each, gives what was learned and how.

    Args:
      config: Of the model.
      blocks: Of each block its parameters, in any float type, and the transform that each site
        starts from; asked for one at a time.
      moves: What learns.
      formats: Of activations and of weights.
      rows, held_out: Embedded tokens, to learn from and to choose by.
      key: For the order of the batches.
      steps: Of each block.
      optimizer: Of {site: Learned}.
      prefix: See the top of this file; blocks before round their weights to nearest.
      batch_rows: Rows of a batch.
      checkpoint: A directory, with a file for each block as of `training.train`.
      options: Others of `training.train`.
    """
    plain = given = (rows, held_out)
    for number, (parameters, start) in enumerate(blocks):
        arrays = {name: jnp.asarray(array, jnp.float32) for name, array in parameters.items()}
        weights = {site: tuple(arrays[name] for name in SITE_WEIGHTS[site]) for site in start}
        seen = window(config, number)
        objective = BlockError(arrays, seen, dict(start), config, moves, formats)
        after = tuple(_run(objective, None, hidden, batch_rows) for hidden in plain)
        found = train(
            objective,
            {site: moves.init(one, weights[site]) for site, one in start.items()},
            (given[0], after[0]),
            (given[1], after[1]),
            jax.random.fold_in(key, number),
            steps=steps,
            optimizer=optimizer,
            batch_rows=batch_rows,
            checkpoint=checkpoint and checkpoint / f"block_{number}.safetensors",
            **options,
        )
        yield (
            {
                site: moves.fitted(start[site], one, weights[site])
                for site, one in found.learned.items()
            },
            found,
        )
        if prefix == "quantized":
            given = tuple(_run(objective, found.learned, hidden, batch_rows) for hidden in given)
        else:
            given = after
        plain = after


def learn_model_by_blocks(
    model: Decoder,
    start: Mapping[str, BlockAffine],
    moves: Moves,
    formats: tuple[Format, Format],
    rows: Integer[np.ndarray, "rows length"],
    held_out: Integer[np.ndarray, "held length"],
    key: Key[Array, ""],
    **options: Any,
) -> Learning:
    """`learn_blocks` for a model in memory, called as `learn_model`.

    Args:
      start: Transform of each site, stacked over layers.
      formats: Of activations and of weights.
      rows, held_out: Token ids; the last of each row is a target and not an input.
      key: For the order of the batches.
      options: Of `learn_blocks`.

    Returns:
      Fits stacked over layers; losses as means over blocks, check by check, up to where the first
      of them ran out of patience.
    """
    embedding = np.asarray(model.embedding[...], np.float32)
    arrays = {name: array[...] for name, array in model.layers.items()}
    blocks = (layer_of((arrays, dict(start)), n) for n in range(model.config.num_hidden_layers))
    learned = list(
        learn_blocks(
            model.config,
            blocks,
            moves,
            formats,
            embedding[rows[:, :-1]],
            embedding[held_out[:, :-1]],
            key,
            **options,
        )
    )
    return stack_blocks(learned)


def stack_blocks(learned: Sequence[tuple[dict[str, Fitted], Trained]]) -> Learning:
    """What `learn_blocks` gave: fits stacked over layers, losses as means over blocks."""
    fits = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(fitted for fitted, _ in learned))
    found = [trained for _, trained in learned]
    history = [
        (
            checks[0][0],
            float(np.mean([c[1] for c in checks])),
            float(np.mean([c[2] for c in checks])),
        )
        for checks in zip(*(trained.history for trained in found), strict=False)
    ]
    return Learning(fits, float(np.mean([trained.start_loss for trained in found])), history)


def _run(
    objective: BlockError,
    learned: dict[str, Learned] | None,
    hidden: Float32[np.ndarray, "rows length k"],
    batch_rows: int,
) -> Float32[np.ndarray, "rows length k"]:
    """Hidden states after the block, float or as learned."""
    parts = [hidden[first : first + batch_rows] for first in range(0, len(hidden), batch_rows)]
    return np.concatenate([np.asarray(_forward(objective, learned, jnp.asarray(h))) for h in parts])


@jax.jit
def _forward(
    objective: BlockError, learned: dict[str, Learned] | None, x: Float[Array, "rows length k"]
) -> Float[Array, "rows length k"]:
    return objective.target(x) if learned is None else objective.output(learned, x)
