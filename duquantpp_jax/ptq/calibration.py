"""Calibration: Stats of every linear input of a model, as a fold over batches of rows.

    x = input of a site's linears in the float layer, for a batch of rows
    stats = stats.update(x)                               the first pass
    stats = stats.update(Q(transform.activations(x)))     the second: what quantized linears see

One compiled program runs a layer and returns the inputs of its sites; another folds the input of
one site into its Stats. So what is kept of an input never changes its bits. Several devices share
the rows of a batch; the sums are then added in another order. Under jax.distributed all
processes share the rows: each is called with the same arguments and gets the same result.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Float32, Int, Integer

from duquantpp_jax.core import Fitted, Format, Needs, Stats
from duquantpp_jax.core.mesh import placed
from duquantpp_jax.kernels.flash_attention.api import flash_attention
from duquantpp_jax.models import SITES, Decoder, DecoderConfig, dense
from duquantpp_jax.models.attention import causal_attention
from duquantpp_jax.models.experts import Routed
from duquantpp_jax.models.layers import Positional, join_layers, layer, positional_of
from duquantpp_jax.models.parameters import Parameters, experts
from duquantpp_jax.ptq.site import QuantizedLinear, QuantizedSite, pad_channels, quantize_input

SAMPLE_LIMIT = 2048
"""Most tokens of a site that are kept as they are."""

BATCH_ROWS = 4
"""Rows that a device runs at once: attention to them takes less than a large layer's weights."""

Hidden = Float32[np.ndarray, "rows length k"]
"""Hidden states of all calibration rows between two layers, in the memory of the host."""


def calibrate(
    model: Decoder,
    rows: Integer[np.ndarray, "rows length"],
    widths: Mapping[str, int] | None = None,
    *,
    needs: Needs = Needs.NOTHING,
) -> dict[str, Stats]:
    """Stats of the float model's inputs at every site, stacked over layers: the walk's, to the bit.

    >>> from duquantpp_jax.checkpoints import testbed
    >>> stats = calibrate(testbed.load(), testbed.calibration_rows()[:2, :64])
    >>> list(stats), int(stats["mlp_in"].count[0])
    (['attention_in', 'attention_out', 'mlp_in', 'mlp_out'], 128)

    Args:
      rows: Token ids; every position is an input.
      widths: Of every site, as `Plan.widths` gives them; those of the model by default.
      needs: What to keep besides a sample and the maxima; see `Stats.init`.
    """
    hidden = embed(model, rows)
    widths = widths or {site: model.weights(site)[0].shape[-1] for site in SITES}
    layers = [
        calibrate_layer(model.config, n, parameters, hidden, widths, needs, after=hidden)
        for n, parameters in enumerate(layers_of(model))
    ]
    # One site after the other, and none is kept twice.
    return {site: join_layers(stats.pop(site) for stats in layers) for site in widths}


def embed(model: Decoder, rows: Integer[np.ndarray, "rows length"]) -> Hidden:
    """The hidden states that the first layer reads; ValueError unless products are in float32."""
    if model.dtype != jnp.float32:
        raise ValueError(f"a model is quantized in float32, not in {model.dtype}: load it so")
    scale = np.float32(model.config.embedding_scale)
    return np.asarray(model.embedding[...])[rows].astype(np.float32) * scale


def layers_of(model: Decoder) -> Iterator[dict[str, Float[Array, "..."]]]:
    """The parameters of each layer, by name inside it."""
    for number in range(model.config.num_hidden_layers):
        yield {name: array[...][number] for name, array in model.layers.items()}


def calibrate_layer(
    config: DecoderConfig,
    number: int,
    parameters: Parameters,
    hidden: Hidden,
    widths: Mapping[str, int],
    needs: Needs,
    *,
    fits: Mapping[str, Fitted] | None = None,
    formats: Mapping[str, Format] | None = None,
    after: Hidden | None = None,
    exact: Hidden | None = None,
    rounded: Mapping[str, QuantizedSite] | None = None,
    linear: QuantizedLinear | None = None,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Stats]:
    """Stats of the inputs of one layer; with `fits` and `formats` of the second pass.

    Args:
      widths: Of the sites that are calibrated.
      fits, formats: What moves the input of each site, and what it is rounded to.
      after: Overwritten with the layer's output; may be `hidden` itself.
      exact: Input hidden states of the float path, where a rounding needs its inputs as well:
        `hidden` are then those of the quantized one.
      rounded: Sites of the layer that are run quantized, by `linear`.
    """
    rows, length, _ = hidden.shape
    mesh = Mesh(np.array(jax.devices()), ("rows",)) if jax.device_count() > 1 else None
    if mesh is not None and linear is not None:  # kernels are not cut
        linear = dataclasses.replace(linear, implementation="xla")
    stats = {
        site: _empty(config, site, width, rows, length, needs) for site, width in widths.items()
    }
    trees = dict(parameters), stats, fits, rounded or {}
    parameters, stats, fits, sites = spread(trees, mesh)
    where = positional_of(config, number)

    def run(x: Hidden, rounded: Mapping[str, QuantizedSite]) -> tuple[Array, dict[str, Array]]:
        axes = ["rows"] if mesh is not None and len(x) == BATCH_ROWS * mesh.size else []
        given = spread(x, mesh, *axes), parameters, where, rounded
        return _run_layer(*given, config=config, linear=linear if rounded else None, mesh=mesh)

    for batch in batches(rows, mesh):
        y, inputs = run(hidden[batch], sites)
        beside = {} if exact is None else run(exact[batch], {})[1]
        for site in stats:
            stats[site] = fold_input(
                stats[site],
                inputs[site],
                np.int32(batch.start * length),
                fits[site] if fits else None,
                beside.get(site),
                format=formats[site] if formats else None,
                mesh=mesh,
            )
        jax.block_until_ready(y)  # batches that wait in a queue would all be in memory
        if after is not None:
            after[batch] = np.asarray(y)
        progress()
    return stats if mesh is None else jax.tree.map(lambda leaf: leaf.addressable_data(0), stats)


def _empty(
    config: DecoderConfig, site: str, width: int, rows: int, length: int, needs: Needs
) -> Stats:
    """Empty Stats of a site; of experts stacked, each for an even share of the tokens."""
    count = experts(config, site)
    share = -(-rows * config.num_experts_per_tok // count) if count else rows
    empty = Stats.init(width, share, length, sample_limit=SAMPLE_LIMIT, needs=needs)
    return jax.tree.map(lambda leaf: jnp.stack([leaf] * count), empty) if count else empty


def keep(stats: Stats, needs: Needs) -> Stats:
    """The Stats as they would be if only `needs` had been asked for."""
    parts = {"gram": Needs.GRAM, "cross": Needs.CROSS}
    parts |= dict.fromkeys(("position_sum", "position_count"), Needs.POSITIONS)
    left_out = [name for name, need in parts.items() if need not in needs]
    return dataclasses.replace(stats, **dict.fromkeys(left_out))


@functools.partial(jax.jit, static_argnames=("config", "linear", "mesh"))
def _run_layer(
    x: Float32[Array, "rows length k"],
    parameters: Mapping[str, Float[Array, "..."]],
    where: Positional,
    rounded: Mapping[str, QuantizedSite],
    *,
    config: DecoderConfig,
    linear: QuantizedLinear | None,
    mesh: Mesh | None,
) -> tuple[Float32[Array, "rows length k"], dict[str, Any]]:
    """The output of a layer, float but for the rounded sites, and the inputs of all its sites."""

    def either(site: str, x: Any, weights: tuple[Array, ...], state: Any) -> tuple[Any, Any]:
        if linear is not None and state is not None:
            return linear(site, x, weights, state)[0], x
        return dense(site, x, weights, None)[0], x

    sites = {site: rounded.get(site) for site in SITES}
    attention = causal_attention if mesh is not None else flash_attention  # kernels are not cut
    y, inputs, _ = layer(config, x, parameters, where, either, sites, attention=attention)
    return replicated(y, mesh), inputs


@functools.partial(jax.jit, donate_argnames="stats", static_argnames=("format", "mesh"))
def fold_input(
    stats: Stats,
    x: Any,
    first: Int[Array, ""] | np.int32,
    fitted: Fitted | None,
    exact: Float[Array, "rows length k"] | None,
    *,
    format: Format | None,
    mesh: Mesh | None,
) -> Stats:
    """Folds the input of one site into its Stats, moved and quantized if there is a fit.

    A format whose scale spans a tensor sees BATCH_ROWS rows at a time on a mesh of any number of
    devices, and without a mesh the input as it is. Tokens of an expert are numbered as they come.
    """
    x = pad_channels(x, stats.absmax.shape[-1])
    if exact is not None and fitted is not None:
        exact = fitted.transform.activations(pad_channels(exact, x.shape[-1]))
    if fitted is not None and format is not None:
        count = 1 if mesh is None else max(1, jax.tree.leaves(x)[0].shape[0] // BATCH_ROWS)
        groups = jax.tree.map(lambda leaf: leaf.reshape(count, -1, *leaf.shape[1:]), x)
        groups = jax.vmap(lambda group: quantize_input(group, fitted, format))(groups)
        x = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), groups)
    if not isinstance(x, Routed):
        return replicated(stats.update(x, jnp.asarray(first), exact), mesh)

    def of_expert(number: Int[Array, ""], own: Stats) -> Stats:
        tokens, chosen = x.of(number)
        return own.update(tokens, own.count, chosen=chosen)

    numbers = jnp.arange(len(stats.count), dtype=x.expert.dtype)
    return replicated(jax.lax.map(lambda pair: of_expert(*pair), (numbers, stats)), mesh)


def batches(rows: int, mesh: Mesh | None) -> Iterator[slice]:
    """BATCH_ROWS rows for every device while there are so many, then BATCH_ROWS on each device."""
    whole = BATCH_ROWS * (1 if mesh is None else mesh.size)
    rest = rows // whole * whole
    yield from (slice(first, first + whole) for first in range(0, rest, whole))
    yield from (slice(first, first + BATCH_ROWS) for first in range(rest, rows, BATCH_ROWS))


def spread(tree: Any, mesh: Mesh | None, *axes: str) -> Any:
    """A pytree that every process has whole, laid over the devices of all of them."""
    if mesh is None:
        return jax.tree.map(jnp.asarray, tree)
    return placed(tree, mesh, *axes)


def replicated(tree: Any, mesh: Mesh | None) -> Any:
    """Inside jit: the pytree whole on every device."""
    if mesh is None:
        return tree
    return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, P()))
