"""Calibration: Stats of every linear input of a model, as a fold over batches of rows.

The model runs in float; the `linear` it calls computes what the float linear does and folds its
input into the site's Stats on the way.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Float32, Int, Integer

from duquantpp_jax.core import Fitted, Format, Needs, Stats
from duquantpp_jax.models import SITES, Decoder, DecoderConfig, Linear, dense, linear_names
from duquantpp_jax.models.layers import layer, window
from duquantpp_jax.ptq.site import quantize_input, widen

SAMPLE_LIMIT = 2048
"""Most tokens of a site that are kept as they are."""

Formats = tuple[tuple[str, Format], ...]
"""The activation format of each site: hashable, for it is static under jit."""


def site_widths(model: Decoder, block_size: int, *, pad: bool = False) -> dict[str, int]:
    """Width of every site, each a multiple of the block.

    Args:
      block_size: Of the format.
      pad: Widen other widths to the next multiple (with zeros, later, which is exact).

    Raises:
      ValueError: A width is not a multiple and `pad` was not asked for; names the linear.
    """
    return {
        site: padded_width(
            linear_names(site, 0)[0], model.weights(site)[0].shape[-1], block_size, pad=pad
        )
        for site in SITES
    }


def padded_width(name: str, width: int, block_size: int, *, pad: bool) -> int:
    """The width itself where blocks divide it, or, with `pad`, the next one that they do.

    Raises:
      ValueError: They do not, and `pad` was not asked for; names the linear.
    """
    widened = -(-width // block_size) * block_size
    if widened != width and not pad:
        raise ValueError(
            f"{name} has input width {width}, which is not a multiple of "
            f"block {block_size}: give --pad to widen it to {widened} with zeros (exact)"
        )
    return widened


def rows_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """Devices in a line, over which the rows of a batch are spread; all there are if not given.

    Under jax.distributed these are the devices of all processes, each of which calls `calibrate`
    with the same arguments and gets the same Stats.
    """
    return Mesh(np.array(jax.devices() if devices is None else devices), ("rows",))


def empty_stats(
    widths: Mapping[str, int], rows: int, length: int, needs: Needs, sample_limit: int
) -> dict[str, Stats]:
    """Stats of no token yet, for every site."""
    return {
        site: Stats.init(width, rows, length, sample_limit=sample_limit, needs=needs)
        for site, width in widths.items()
    }


def calibrate(
    model: Decoder,
    rows: Integer[np.ndarray, "rows length"],
    widths: Mapping[str, int],
    *,
    needs: Needs = Needs.NOTHING,
    batch_rows: int = 16,
    sample_limit: int = SAMPLE_LIMIT,
    fits: Mapping[str, Fitted] | None = None,
    format: Format | None = None,
    mesh: Mesh | None = None,
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
      sample_limit: Most tokens of each site kept as they are: every stride-th, so that memory
        does not grow with the calibration set.
      fits: What moves the inputs of each site, stacked over layers.
      format: Of the moved activations.
      mesh: Devices over which the rows of each batch are spread (`rows_mesh`); the model is on
        each. A batch that they do not divide runs on every device whole. The result is that of one
        device but for the order of float additions.
      progress: Called after each batch.
    """
    count, length = rows.shape
    layers = model.config.num_hidden_layers
    stats = jax.tree.map(
        lambda leaf: jnp.broadcast_to(leaf, (layers, *leaf.shape)),
        empty_stats(widths, count, length, needs, sample_limit),
    )
    formats = None if format is None else tuple((site, format) for site in widths)
    if mesh is not None:
        model, stats, fits = (_spread(tree, mesh, P()) for tree in (model, stats, fits))
    for first in range(0, count, batch_rows):
        batch = rows[first : first + batch_rows]
        if mesh is not None:
            whole = len(batch) % mesh.size
            batch = _spread(batch, mesh, P() if whole else P("rows"))
        else:
            batch = jnp.asarray(batch)
        stats = _fold(
            model, batch, stats, np.int32(first * length), fits, formats=formats, mesh=mesh
        )
        progress()
    return stats


@functools.partial(jax.jit, donate_argnames="stats", static_argnames=("formats", "mesh"))
def _fold(
    model: Decoder,
    batch: Integer[Array, "rows length"],
    stats: dict[str, Stats],
    first: Int[Array, ""] | np.int32,
    fits: Mapping[str, Fitted] | None,
    *,
    formats: Formats | None,
    mesh: Mesh | None,
) -> dict[str, Stats]:
    state = {site: (stats[site], fits[site] if fits else None) for site in stats}
    _, folded = model(batch, _folding(jnp.asarray(first), formats), state)
    if mesh is not None:
        folded = jax.lax.with_sharding_constraint(folded, NamedSharding(mesh, P()))
    return folded


def calibrate_layer(
    config: DecoderConfig,
    number: int,
    parameters: Mapping[str, Float[Array, "..."]],
    hidden: Float32[np.ndarray, "rows length k"],
    stats: dict[str, Stats],
    *,
    fits: Mapping[str, Fitted] | None = None,
    formats: Formats | None = None,
    batch_rows: int = 4,
    after: Float32[np.ndarray, "rows length k"] | None = None,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Stats]:
    """`calibrate` for one layer of a model that need not be in memory.

    Args:
      config: Of the model.
      number: Of the layer.
      parameters: Of the layer, by name inside it.
      hidden: What the layer is given for every row.
      stats: Of the sites wanted, of no token yet.
      fits, formats: For the second pass; sites without a fit keep what their linears see.
      batch_rows: As in `calibrate`.
      after: Is filled with what the layer gives, if given; may be `hidden` itself.
      progress: Called after each batch.
    """
    rows, length, _ = hidden.shape
    for first in range(0, rows, batch_rows):
        x = jnp.asarray(hidden[first : first + batch_rows])
        y, stats = _fold_layer(
            x,
            parameters,
            window(config, number),
            stats,
            np.int32(first * length),
            fits,
            config=config,
            formats=formats,
        )
        if after is not None:
            after[first : first + batch_rows] = np.asarray(y)
        progress()
    return stats


@functools.partial(jax.jit, donate_argnames="stats", static_argnames=("config", "formats"))
def _fold_layer(
    x: Float32[Array, "rows length k"],
    parameters: Mapping[str, Float[Array, "..."]],
    window: Int[Array, ""] | None,
    stats: dict[str, Stats],
    first: Int[Array, ""] | np.int32,
    fits: Mapping[str, Fitted] | None,
    *,
    config: DecoderConfig,
    formats: Formats | None,
) -> tuple[Float32[Array, "rows length k"], dict[str, Stats]]:
    state = dict.fromkeys(SITES) | {
        site: (stats[site], fits[site] if fits else None) for site in stats
    }
    y, folded = layer(config, x, parameters, window, _folding(jnp.asarray(first), formats), state)
    return y, {site: folded[site] for site in stats}


def _folding(first: Int[Array, ""], formats: Formats | None) -> Linear:
    """The float linear, which folds its input into the Stats of its site on the way."""

    def linear(
        site: str, x: Array, weights: tuple[Array, ...], state: tuple[Stats, Fitted | None] | None
    ) -> tuple[tuple[Array, ...], Stats | None]:
        ys, _ = dense(site, x, weights, None)
        if state is None:
            return ys, None
        stats, fitted = state
        x = widen(x, stats.absmax.shape[-1])
        if fitted is not None and formats is not None:
            x = quantize_input(x, fitted, dict(formats)[site])
        return ys, stats.update(x, first)

    return linear


def _spread(tree: Any, mesh: Mesh, spec: P) -> Any:
    """A pytree that every process holds whole, laid over the devices of all of them."""
    sharding = NamedSharding(mesh, spec)

    def place(leaf: Any) -> Array:
        held = np.asarray(leaf)
        return jax.make_array_from_callback(held.shape, sharding, lambda index: held[index])

    return jax.tree.map(place, tree)
