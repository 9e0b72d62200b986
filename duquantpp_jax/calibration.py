"""Calibration: Stats of every linear input of a model, as a fold over batches of rows.

The model runs in float; the `linear` it calls computes what the float linear does and folds its
input into the site's Stats on the way.
"""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Integer

from duquantpp_jax.core import Fitted, Format, Stats
from duquantpp_jax.models import SITES, Decoder, dense, linear_names
from duquantpp_jax.ptq import quantize_input, widen


def site_widths(model: Decoder, block_size: int, *, pad: bool = False) -> dict[str, int]:
    """Width of every site, each a multiple of the block.

    Args:
      block_size: Of the format.
      pad: Widen other widths to the next multiple (with zeros, later, which is exact).

    Raises:
      ValueError: A width is not a multiple and `pad` was not asked for; names the linear.
    """
    widths = {}
    for site in SITES:
        width = model.weights(site)[0].shape[-1]
        widened = -(-width // block_size) * block_size
        if widened != width and not pad:
            raise ValueError(
                f"{linear_names(site, 0)[0]} has input width {width}, which is not a multiple of "
                f"block {block_size}: give --pad to widen it to {widened} with zeros (exact)"
            )
        widths[site] = widened
    return widths


def calibrate(
    model: Decoder,
    rows: Integer[np.ndarray, "rows length"],
    widths: Mapping[str, int],
    *,
    needs: frozenset[str] = frozenset(),
    batch_rows: int = 16,
    sample_limit: int = 2048,
    fits: Mapping[str, Fitted] | None = None,
    format: Format | None = None,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Stats]:
    """Stats of the float model's inputs at every site, stacked over layers.

    With `fits` and `format` it is the second pass that roundings such as GPTQ need: Stats of what
    the quantized linear will see, the float model's input moved and quantized.

    Args:
      model: The float model.
      rows: Token ids; every position is an input.
      widths: Of every site, as `site_widths` gives them.
      needs: What to keep besides a sample and the maxima; see `Stats.init`.
      batch_rows: Rows that run at once; bounds memory, does not change the result beyond the
        order of float additions.
      sample_limit: Most tokens of each site kept as they are.
      fits: What moves the inputs of each site, stacked over layers.
      format: Of the moved activations.
      progress: Called after each batch.
    """
    count, length = rows.shape
    layers = model.config.num_hidden_layers
    stats = {
        site: jax.tree.map(
            lambda leaf: jnp.broadcast_to(leaf, (layers, *leaf.shape)),
            Stats.init(width, count, length, sample_limit=sample_limit, needs=needs),
        )
        for site, width in widths.items()
    }
    for first in range(0, count, batch_rows):
        batch = jnp.asarray(rows[first : first + batch_rows])
        stats = _fold(model, batch, stats, jnp.int32(first * length), fits, format=format)
        progress()
    return stats


@functools.partial(jax.jit, donate_argnums=2, static_argnames="format")
def _fold(
    model: Decoder,
    batch: Integer[Array, "rows length"],
    stats: dict[str, Stats],
    first: Int[Array, ""],
    fits: Mapping[str, Fitted] | None,
    *,
    format: Format | None,
) -> dict[str, Stats]:
    def linear(
        site: str, x: Array, weights: tuple[Array, ...], state: tuple[Stats, Fitted | None]
    ) -> tuple[tuple[Array, ...], Stats]:
        ys, _ = dense(site, x, weights, None)
        stats, fitted = state
        x = widen(x, stats.absmax.shape[-1])
        if fitted is not None and format is not None:
            x = quantize_input(x, fitted, format)
        return ys, stats.update(x, first)

    state = {site: (stats[site], fits[site] if fits else None) for site in stats}
    _, folded = model(batch, linear, state)
    return folded
