"""Learning one decoder block after the other, with one block's weights in memory.

    loss = mean over tokens of |y - y^|^2 / |y|^2,      y = block(h),  y^ = rounding block(h^)

h are the float model's hidden states before the block. h^ come from the blocks before as they were
learned and round, so that each block learns to make good what they have done. The error of a token
is relative to its own energy, by which the next norm divides. Hidden states of all rows are kept.

Source: block by block with quantized inputs and float targets, as in OmniQuant, arXiv 2308.13137.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Float32, Int, Key

from duquantpp_jax.core import Fitted, Format
from duquantpp_jax.learning.model import LearnResult
from duquantpp_jax.learning.moves import Learned, LearningLinear, Moves, SiteState
from duquantpp_jax.learning.training import Objective, Trained, train
from duquantpp_jax.models import SITE_WEIGHTS, SITES, DecoderConfig, dense
from duquantpp_jax.models.layers import layer, window
from duquantpp_jax.transforms.block import BlockAffine

Parameters = Mapping[str, Float[Array | np.ndarray, "..."]]
"""Of one block, by name inside it."""


@struct.dataclass
class BlockError(Objective):
    """The loss at the top of this file, of a batch of (h^, y); formats as of `Divergence`."""

    parameters: dict[str, Array]
    window: Int[Array, ""] | None
    start: dict[str, BlockAffine]
    config: DecoderConfig = struct.field(pytree_node=False)
    moves: Moves = struct.field(pytree_node=False)
    formats: tuple[Format, Format] = struct.field(pytree_node=False)

    def target(self, x: Float[Array, "rows length k"]) -> Float[Array, "rows length k"]:
        """The output of the float block."""
        nothing: dict[str, Any] = {site: None for site in SITES}  # noqa: C420
        return layer(self.config, x, self.parameters, self.window, dense, nothing)[0]

    def output(
        self, learned: dict[str, Learned], x: Float[Array, "rows length k"]
    ) -> Float[Array, "rows length k"]:
        """The output of the rounding block."""
        linear = LearningLinear(self.moves, *self.formats)
        state = {site: SiteState(self.start[site], moved) for site, moved in learned.items()}
        return layer(self.config, x, self.parameters, self.window, linear, state)[0]

    def loss(self, learned: dict[str, Learned], batch: tuple[Array, Array]) -> Float[Array, ""]:
        """See the top of this file."""
        given, wanted = batch
        off = jnp.sum(jnp.square(self.output(learned, given) - wanted), axis=-1)
        return jnp.mean(off / jnp.sum(jnp.square(wanted), axis=-1))

    def bounded(self, learned: dict[str, Learned]) -> dict[str, Learned]:
        """Within `Moves.max_condition`."""
        return {s: self.moves.bounded(self.start[s], moved) for s, moved in learned.items()}


def learn_blocks(
    config: DecoderConfig,
    blocks: Iterable[tuple[Parameters, Mapping[str, BlockAffine]]],
    moves: Moves,
    formats: tuple[Format, Format],
    rows: Float32[np.ndarray, "rows length k"],
    held_out: Float32[np.ndarray, "held length k"],
    key: Key[Array, ""],
    *,
    batch_rows: int = 4,
    checkpoint: Path | None = None,
    **options: Any,
) -> Iterator[tuple[dict[str, Fitted], Trained]]:
    """Learns block after block, and yields for each its fits and how they were learned.

    Args:
      blocks: Of each block its parameters, in any float type, and the transform that each site
        starts from; asked for one at a time.
      formats: As of `Divergence`.
      rows, held_out: Embedded tokens, to learn from and to choose by.
      checkpoint: A directory, with a file for each block as of `training.train`.
      options: Others of `training.train`; steps are those of each block.
    """
    plain = given = (rows, held_out)
    for number, (parameters, start) in enumerate(blocks):
        arrays = {name: jnp.asarray(array, jnp.float32) for name, array in parameters.items()}
        weights = {site: tuple(arrays[name] for name in SITE_WEIGHTS[site]) for site in start}
        seen = window(config, number)
        objective = BlockError(arrays, seen, dict(start), config, moves, formats)
        plain = tuple(_run(objective, None, hidden, batch_rows) for hidden in plain)
        found = train(
            objective,
            {site: moves.init(transform, weights[site]) for site, transform in start.items()},
            (given[0], plain[0]),
            (given[1], plain[1]),
            jax.random.fold_in(key, number),
            batch_rows=batch_rows,
            checkpoint=checkpoint and checkpoint / f"block_{number}.safetensors",
            **options,
        )
        yield moves.fits(start, found.learned, weights), found
        given = tuple(_run(objective, found.learned, hidden, batch_rows) for hidden in given)


def stack_blocks(learned: Sequence[tuple[dict[str, Fitted], Trained]]) -> LearnResult:
    """What `learn_blocks` gave: fits stacked over layers, losses as means over blocks."""
    fits = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(fitted for fitted, _ in learned))
    found = [trained for _, trained in learned]
    checks = np.mean([trained.history for trained in found], axis=0)
    history = [(int(step), float(loss), float(held_out)) for step, loss, held_out in checks]
    return LearnResult(fits, float(np.mean([trained.start_loss for trained in found])), history)


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
