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
from jaxtyping import Array, Float, Float32, Key

from duquantpp_jax.core import Format
from duquantpp_jax.core.notices import about
from duquantpp_jax.learning.moves import Learned, Moves, SitesObjective
from duquantpp_jax.learning.site import relative_error
from duquantpp_jax.learning.training import Trained
from duquantpp_jax.models import SITE_WEIGHTS, SITES, DecoderConfig, dense
from duquantpp_jax.models.layers import Positional, layer, positional_of
from duquantpp_jax.transforms.block import BlockAffine

Parameters = Mapping[str, Float[Array | np.ndarray, "..."]]
"""Of one block, by name inside it."""
Hidden = Float32[np.ndarray, "_ length k"]
"""Hidden states of rows of tokens."""


@struct.dataclass
class BlockError(SitesObjective):
    """The loss at the top of this file, of a batch of (h^, y)."""

    parameters: dict[str, Array]
    where: Positional
    config: DecoderConfig = struct.field(pytree_node=False)

    def output(
        self, learned: dict[str, Learned] | None, x: Float[Array, "rows length k"]
    ) -> Float[Array, "rows length k"]:
        """The output of the rounding block, or, without anything learned, of the float block."""
        linear = dense if learned is None else self.linear
        state: Any = dict.fromkeys(SITES) if learned is None else self.states(learned)
        return layer(self.config, x, self.parameters, self.where, linear, state)[0]

    def loss(self, learned: dict[str, Learned], batch: tuple[Array, Array]) -> Float[Array, ""]:
        given, wanted = batch
        return relative_error(wanted, self.output(learned, given))


def learn_blocks(
    config: DecoderConfig,
    blocks: Iterable[tuple[Parameters, Mapping[str, BlockAffine]]],
    moves: Moves,
    formats: tuple[Format, Format],
    rows: Hidden,
    held_out: Hidden,
    key: Key[Array, ""],
    *,
    batch_rows: int = 4,
    checkpoint: Path | None = None,
    **options: Any,
) -> Iterator[Trained]:
    """Learns block after block, and yields the result of each.

    Args:
      blocks: Of each block its parameters, in any float type, and the transform that each site
        starts from; asked for one at a time.
      formats: Of activations and of weights.
      rows, held_out: Embedded tokens, to learn from and to choose by.
      checkpoint: A directory, with a file for each block as of `training.train`.
      options: Others of `training.train`; steps are those of each block.
    """
    plain = given = (rows, held_out)
    for number, (parameters, start) in enumerate(blocks):
        arrays = {name: jnp.asarray(array, jnp.float32) for name, array in parameters.items()}
        weights = {site: tuple(arrays[name] for name in SITE_WEIGHTS[site]) for site in start}
        where = positional_of(config, number)
        objective = BlockError(dict(start), moves, formats, arrays, where, config)
        plain = tuple(_run(objective, None, hidden, batch_rows) for hidden in plain)
        with about(f"block {number + 1} of {config.num_hidden_layers}"):
            found = objective.learn(
                weights,
                (given[0], plain[0]),
                (given[1], plain[1]),
                jax.random.fold_in(key, number),
                batch_rows=batch_rows,
                checkpoint=checkpoint and checkpoint / f"block_{number}.safetensors",
                **options,
            )
        yield found
        given = tuple(_run(objective, found.learned, hidden, batch_rows) for hidden in given)


def stack_blocks(learned: Sequence[Trained]) -> Trained:
    """What `learn_blocks` gave: fits stacked over layers, losses as means over blocks.

    The history ends with that of a block that has diverged.
    """
    fits = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(found.fits for found in learned))
    checks = np.mean([*zip(*(found.history for found in learned), strict=False)], axis=1)
    history = [(int(step), float(loss), float(held_out)) for step, loss, held_out in checks]
    start_loss = float(np.mean([found.start_loss for found in learned]))
    return Trained(None, start_loss, history, fits)


def _run(
    objective: BlockError, learned: dict[str, Learned] | None, hidden: Hidden, batch_rows: int
) -> Hidden:
    """Hidden states after the block, float or as learned."""
    parts = [hidden[first : first + batch_rows] for first in range(0, len(hidden), batch_rows)]
    return np.concatenate([np.asarray(_output(objective, learned, jnp.asarray(h))) for h in parts])


_output = jax.jit(BlockError.output)
