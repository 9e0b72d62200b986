"""The walk: the one pipeline that quantizes a model, layer after layer.

    hidden_0 = embedding[tokens]
    stats_l  = Stats of what the float layer l, given hidden_l, gives its linears
    fits_l   = fit(weights of layer l, stats_l)            or fits that are given
    moved_l  = Stats of the moved and quantized inputs     for roundings that need them
    sites_l  = round(transform.weights(weights of layer l), moved_l)
    hidden_(l+1) = layer l (hidden_l)                      float or, if sequential, as quantized

Roundings that compare the two paths (Needs.CROSS) get both: hidden states of the float path and of
the quantized one, which each go on by themselves, and site after site in a layer, those before it
quantized, moved_l with the cross Gram matrix. A layer runs `Plan.passes` times.

`quantize_layer` is one step, for a model that need not be in memory: `duquantpp quantize` writes
what it returns. `quantize_decoder` takes all steps for a model in memory: the laboratory measures
what it returns, bit for bit what is written. A sequential walk, as in GPTQ, gives each layer the
output of the quantized layers before it; within a layer all sites are calibrated in float.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Integer

from duquantpp_jax.core import Fitted, Needs, Recipe, Stats
from duquantpp_jax.core.notices import NotFinite, about, warn
from duquantpp_jax.models import SITE_WEIGHTS, SITES, Decoder
from duquantpp_jax.models.layers import join_layers
from duquantpp_jax.models.parameters import LAYER, Parameters, experts, layer_prefix
from duquantpp_jax.ptq.calibration import Hidden, calibrate_layer, embed, keep, layers_of
from duquantpp_jax.ptq.experts import FEWEST, by_expert, pooled, pooled_moved
from duquantpp_jax.ptq.fuse import fuse_layer, grouped
from duquantpp_jax.ptq.plan import Plan
from duquantpp_jax.ptq.site import (
    QuantizedLinear,
    QuantizedSite,
    fit_linear,
    layer_of,
    quantize_linear,
)
from duquantpp_jax.rounding.gptq import steady
from duquantpp_jax.transforms.basic import Identity

Progress = Callable[[str], None]
"""Called with what is being done, after each batch, fit and rounding."""

State = dict[str, QuantizedSite] | tuple[dict[str, QuantizedSite], ...]
"""The sites of all layers: stacked, or, where layers differ in what is quantized, stacked in runs.
"""


class QuantizedLayer(NamedTuple):
    """What the walk makes of one layer.

    Attributes:
      parameters: Of the float layer, with what was folded into them.
      samples: Tokens of the input of each site that has a quantized linear.
      counts: Tokens that each expert of a site saw, where the site has experts.
    """

    sites: dict[str, QuantizedSite]
    parameters: Mapping[str, Array]
    samples: dict[str, Float[Array, "*experts tokens k"]]
    counts: dict[str, np.ndarray]


def quantize_layer(
    plan: Plan,
    number: int,
    parameters: Parameters,
    hidden: Hidden | None,
    progress: Progress = lambda _: None,
    *,
    stats: Mapping[str, Stats] | None = None,
) -> QuantizedLayer:
    """Quantizes a layer and takes the hidden states through it.

    >>> from duquantpp_jax import Plan, recipe
    >>> from duquantpp_jax.checkpoints import testbed
    >>> model, tokens = testbed.load(), testbed.calibration_rows()[:2, :64]
    >>> from duquantpp_jax.ptq.calibration import embed, layers_of
    >>> plan, hidden = Plan.of(model.config, recipe("block_hadamard")), embed(model, tokens)
    >>> len([quantize_layer(plan, n, p, hidden) for n, p in enumerate(layers_of(model))])
    4

    Args:
      hidden: Input hidden states, as `streams` has them; overwritten with the layer's output. None
        if `stats` suffice.
      stats: Of the float inputs of its sites; without them the layer is calibrated.
    """
    parameters = {name: jnp.asarray(array) for name, array in parameters.items()}
    widths, needs = plan.widths(number), plan.rounding_needs(number)

    def pass_over(
        hidden: Hidden, *what: Any, says: str = "calibrating", **options: Any
    ) -> dict[str, Stats]:
        options["progress"] = lambda: progress(says)
        return calibrate_layer(plan.config, number, parameters, hidden, *what, **options)

    exact, both = hidden, Needs.CROSS in needs
    if both and hidden is not None:
        exact, hidden = np.split(hidden, 2)  # views
    seen = hidden if plan.sequential else exact
    last = None if plan.sequential else seen
    if stats is None:
        if seen is None:
            raise ValueError("a layer is calibrated on hidden states: give them, or its Stats")
        after = None if needs else last
        stats = pass_over(seen, widths, plan.fit_needs(number), after=after)
    for site, width in widths.items() if number == 0 else ():
        tokens, count = int(np.sum(np.asarray(stats[site].count))), experts(plan.config, site)
        warn_of_few_tokens(site, plan.recipes[site], width, tokens, count)
    for site in widths:
        check_input(layer_prefix(number) + site, stats[site], "before it is moved")
    fits = fit_layer(plan, number, parameters, stats, progress)
    counts = {s: np.asarray(stats[s].count) for s in widths if experts(plan.config, s)}
    stats = {site: pooled(plan.config, site, stats[site]) for site in widths}
    if plan.fuse and "attention_out" in fits:
        fits["attention_out"] = grouped(fits["attention_out"], plan.config)
    formats = dict(plan.formats)
    if needs and hidden is None:
        raise ValueError("the rounding looks at moved inputs: give the hidden states")
    if both:
        moved = {}
    elif needs and hidden is not None:
        moved = pass_over(hidden, widths, needs, fits=fits, formats=formats, after=last)
        moved = {
            site: pooled_moved(
                plan.config, site, moved[site], stats[site], fits[site], formats[site]
            )
            for site in widths
        }
    else:
        moved = {
            site: by_expert(
                plan.config, site, lambda plain, fitted: plain.through(fitted.transform)
            )(keep(stats[site], Needs.NOTHING), fits[site])
            for site in widths
        }
    samples = {site: stats[site].sample for site in widths}
    if plan.fuse:  # `moved` describes the moved inputs, which folding leaves as they are
        linears = {site: plan.names(site, number) for site in widths}
        parameters, fits, folded = fuse_layer(plan.config, parameters, fits, linears)
        samples = {site: folded[site].activations(x) for site, x in samples.items()}
    sites: dict[str, QuantizedSite] = {}
    quantized: dict[str, Any] = {"rounded": sites, "linear": plan.linear}
    for site in SITES:
        if both and site in widths and hidden is not None:
            what = {site: widths[site]}, needs
            moved |= pass_over(hidden, *what, fits=fits, formats=formats, exact=exact, **quantized)
        sites[site] = _round_site(plan, site, number, parameters, fits.get(site), moved.get(site))
        progress("rounding")
    if both and exact is not None:
        pass_over(exact, {}, Needs.NOTHING, after=exact)
    if (both or plan.sequential) and hidden is not None:
        says = "running the quantized layer"
        pass_over(hidden, {}, Needs.NOTHING, after=hidden, says=says, **quantized)
    return QuantizedLayer(sites, parameters, samples, counts)


def streams(plan: Plan, hidden: Hidden) -> Float32[np.ndarray, "paths length k"]:
    """The hidden states that the walk starts with: those of the float path and, below them where a
    rounding compares the two, of the quantized one, which are the same there."""
    return np.concatenate([hidden, hidden]) if plan.compares else hidden


def fit_layer(
    plan: Plan,
    number: int,
    parameters: Parameters,
    stats: Mapping[str, Stats],
    progress: Progress = lambda _: None,
) -> dict[str, Fitted]:
    """What moves each site of a layer: fitted by its recipe, or given by the plan.

    `stats` are of the float inputs of its sites, and may hold more than the fits need.
    """
    fits = {}
    for site in plan.widths(number):
        if plan.fits is not None:
            fits[site] = layer_of(plan.fits[site], number)
        else:
            recipe = plan.recipes[site]
            place = jax.random.fold_in(jax.random.key(plan.seed), SITES.index(site))
            key = jax.random.split(place, plan.config.num_hidden_layers)[number]
            weights = _weights(parameters, plan.names(site, number))
            if count := experts(plan.config, site):
                key = jax.random.split(key, count)
            own = pooled(plan.config, site, keep(stats[site], recipe.needs))
            fit = functools.partial(fit_linear, recipe)
            with about(f"{layer_prefix(number)}{site}"):
                fits[site] = by_expert(plan.config, site, fit)(weights, own, key)
        check_fit(layer_prefix(number) + site, fits[site])
        progress("fitting")
    return fits


def check_input(where: str, stats: Stats, when: str) -> None:
    """Raises NotFinite if the input of a site is NaN or Inf; counts the channels."""
    maxima = np.asarray(stats.absmax)
    if wrong := np.count_nonzero(~np.isfinite(maxima)):
        raise NotFinite(
            f"{where}: on the calibration rows the input {when} is NaN or Inf in {wrong} of "
            f"{maxima.size} channels: the model overflows in float32, and cannot be calibrated "
            "on them"
        )


def warn_of_few_tokens(site: str, recipe: Recipe, width: int, seen: int, count: int = 0) -> None:
    """Warns if a site saw fewer tokens than its recipe needs; says how many would do.

    A Gram matrix of fewer tokens than channels is singular; maxima take `FEWEST`, as an expert's.

    Args:
      count: Experts of the site, among which the tokens are spread; 0 where it has none.
    """
    grams = Needs.GRAM in recipe.needs | recipe.rounding.needs
    enough = max(FEWEST, width if grams else 0) * max(1, count)
    if seen < enough:
        warn("warning: %s is calibrated on %d tokens, and %s of %d channels takes %d: "
             "give more rows of text", site, seen,
             "a Gram matrix" if grams else "an input", width, enough)  # fmt: skip


def check_fit(where: str, fitted: Fitted) -> None:
    """Raises NotFinite if what moves a site has NaN or Inf; counts them."""
    for leaf in map(np.asarray, jax.tree.leaves(fitted)):
        inexact = not np.issubdtype(leaf.dtype, np.integer)
        if inexact and (wrong := np.count_nonzero(~np.isfinite(leaf))):
            raise NotFinite(
                f"{where}: its fit has NaN or Inf in {wrong} of {leaf.size} numbers: choose "
                "another recipe, or exclude it"
            )


def fit_decoder(plan: Plan, model: Decoder, stats: Mapping[str, Stats]) -> dict[str, Fitted]:
    """What the recipes fit at every site of a model in memory, stacked over layers.

    Every layer must have the same sites to quantize; `stats` are those of `calibrate`.

    >>> from duquantpp_jax import Plan, calibrate, recipe
    >>> from duquantpp_jax.checkpoints import testbed
    >>> model, tokens = testbed.load(), testbed.calibration_rows()[:2, :64]
    >>> list(fit_decoder(Plan.of(model.config, recipe("gsr")), model, calibrate(model, tokens)))
    ['attention_in', 'attention_out', 'mlp_in', 'mlp_out']
    """
    numbered = enumerate(layers_of(model))
    layers = [fit_layer(plan, n, parameters, layer_of(stats, n)) for n, parameters in numbered]
    return join_layers(layers)


def quantize_decoder(
    plan: Plan,
    model: Decoder,
    tokens: Integer[np.ndarray, "rows length"],
    *,
    stats: Mapping[str, Stats] | None = None,
    progress: Progress = lambda _: None,
) -> tuple[Decoder, QuantizedLinear, State]:
    """Quantizes a model in memory, layer after layer.

    >>> from duquantpp_jax import Plan, recipe
    >>> from duquantpp_jax.checkpoints import testbed
    >>> model, tokens = testbed.load(), testbed.calibration_rows()[:2, :64]
    >>> model, linear, state = quantize_decoder(Plan.of(model.config, recipe("gsr")), model, tokens)
    >>> state["mlp_in"].weights[0].elements.dtype.name  # run: model(tokens, linear, state)
    'float4_e2m1fn'

    Args:
      tokens: Of the calibration; every position is an input.
      stats: As `calibrate` gives them for these tokens, stacked over layers; without them layers
        are calibrated. What they hold beyond the plan's needs changes nothing.

    Returns:
      A decoder with the linear and the state that it is called with, as `load_quantized` gives
      them. The decoder is the float model; where the plan folds transforms, with those folded.

    Raises:
      ValueError: The plan cannot be carried out, or is sequential and `stats` are given.
    """
    plan.check()
    if plan.sequential and stats is not None:
        raise ValueError("a sequential plan calibrates on the quantized layers: give no stats")
    runs = stats is None or plan.passes > 1
    hidden = streams(plan, embed(model, tokens)) if runs else None
    sites, moved = [], []
    for number, parameters in enumerate(layers_of(model)):
        given = None if stats is None else layer_of(stats, number)
        made = quantize_layer(plan, number, parameters, hidden, progress, stats=given)
        sites.append(made.sites)
        if plan.fuse:
            moved.append(made.parameters)
    if moved:  # in float32, and some perhaps not in all layers
        wide = {name for own in moved for name, a in own.items() if a.dtype == jnp.float32}
        moved = [
            {name: a.astype(jnp.float32) if name in wide else a for name, a in own.items()}
            for own in moved
        ]
        named = {LAYER + name: array for name, array in join_layers(moved).items()}
        model = Decoder(model.config, model.parameters() | named)
    return model, plan.linear, stack_layers(sites)


def stack_layers(layers: Iterable[dict[str, QuantizedSite]]) -> State:
    """The state that a decoder scans: a stack of each stretch of layers that are alike."""

    def kind(sites: dict[str, QuantizedSite]) -> Any:
        shapes = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(sites)]
        return jax.tree.structure(sites), shapes

    stacked = tuple(join_layers(run) for _, run in itertools.groupby(layers, kind))
    return stacked[0] if len(stacked) == 1 else stacked


def _round_site(
    plan: Plan,
    site: str,
    number: int,
    parameters: Mapping[str, Array],
    fitted: Fitted | None,
    moved: Stats | None,
) -> QuantizedSite:
    """The linears of a site, rounded; those that are not chosen as they are."""
    names, quantized = plan.names(site, number), QuantizedSite(Identity(), ())
    if fitted is not None and moved is not None:
        weights, where = _weights(parameters, names), layer_prefix(number) + site
        check_input(where, moved, "after it is moved")

        def rounded_of(ws: Any, own: Stats, fit: Fitted) -> QuantizedSite:
            recipe = plan.recipes[site]
            steadied = dataclasses.replace(recipe, rounding=steady(recipe.rounding, own))
            return quantize_linear(steadied, ws, own, fit, own)

        with about(where):
            quantized = by_expert(plan.config, site, rounded_of)(weights, moved, fitted)
    rounded = dict(zip(names, quantized.weights, strict=True))
    weights = tuple(rounded.get(name, parameters[name]) for name in SITE_WEIGHTS[site])
    return dataclasses.replace(quantized, weights=weights)


def _weights(
    parameters: Parameters, names: Iterable[str]
) -> tuple[Float[Array, "*experts _ k"], ...]:
    return tuple(jnp.asarray(parameters[name]) for name in names)
