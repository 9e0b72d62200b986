"""`duquantpp inspect`: the outliers in the inputs of a model's linears, and its quantized contents.

The model runs on the rows of a text, and the input of every linear is observed. A quantized model
runs with its quantized linears; there the input is observed before and after the transform. The
numbers are defined in analysis/outliers.py.
"""

import dataclasses
import fnmatch
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from duquantpp_jax.analysis import contents as holds
from duquantpp_jax.analysis.outliers import Moments, Thresholds, observe, statistics
from duquantpp_jax.checkpoints import Quantized, is_quantized, load_any, testbed
from duquantpp_jax.checkpoints.packed import said
from duquantpp_jax.commands.options.inspect import InspectOptions
from duquantpp_jax.core import MXArray
from duquantpp_jax.core.notices import about
from duquantpp_jax.evaluation import subject
from duquantpp_jax.models import SITES, Decoder, Linear, linear_names
from duquantpp_jax.models.experts import Routed
from duquantpp_jax.models.parameters import layer_prefix
from duquantpp_jax.ptq.site import QuantizedSite, move_input, pad_channels
from duquantpp_jax.ptq.walk import State
from duquantpp_jax.recipes import import_modules

BATCH_ROWS = 4
SHOWN = 64
"""Tokens of the surface."""


class Inspection(NamedTuple):
    """The results of an inspection.

    Attributes:
      results: The contents of outliers.json.
      moments: By what was observed ("input", "moved") and site; stacked over layers.
      tokens: Name of the input that the surface shows, and this input by what was observed.
      stored: Scale bytes and codes of quantized MXFP4 weights.
      sqnr: Site -> dB by layer and linear; None if a linear has none.
    """

    results: dict[str, Any]
    moments: dict[str, dict[str, Moments]]
    tokens: tuple[str, dict[str, np.ndarray]]
    stored: holds.Stored | None
    sqnr: dict[str, np.ndarray] | None


def inspect(
    options: InspectOptions, progress: Callable[[str, int, int], None] = lambda *_: None
) -> Inspection:
    """Runs the model and computes the statistics of the inputs of its linears.

    Raises:
      ValueError: Bad input; a single line says what was wrong and what would be right.
    """
    import_modules(options.imports)
    thresholds = Thresholds(options.block_size, options.ratio, options.share, options.drop)
    if options.model is not None and options.text is None:
        raise ValueError("--model needs --text: text of the kind that the model was trained on")
    directory = options.model or testbed.directory()
    model, linear, state = load_any(directory, options.activation_format)
    chosen = _chosen(model.config.num_hidden_layers, options.site)
    use = "evaluation" if options.text else "calibration"
    asked = options.text, options.tokens, use, options.text_key
    rows = subject.load_rows(options.model, *asked, config=model.config)
    moments: dict[str, dict[str, Moments]] = {}
    for first in range(0, len(rows.tokens), BATCH_ROWS):
        batch = rows.tokens[first : first + BATCH_ROWS, :-1]
        found = _run(model, jnp.asarray(batch), state, linear=linear, wanted=thresholds)
        for site, observed in found.items():
            for name, numbers in observed.items():
                by_site, new = moments.setdefault(name, {}), numbers.in_float64()
                by_site[site] = by_site[site].merge(new) if site in by_site else new
        progress("looking", min(first + BATCH_ROWS, len(rows.tokens)), len(rows.tokens))
    quantized = Quantized(directory) if is_quantized(directory) else None
    plan = None if quantized is None else quantized.plan
    sites = []
    for layer, site in chosen:
        in_float = plan is None or not plan.names(site, layer)
        names = ("input",) if in_float else ("input", "moved")
        with about(f"{layer_prefix(layer)}{site}"):
            found = {n: statistics(moments[n][site].layer(layer), thresholds) for n in names}
        linears = list(linear_names(site, layer))
        sites.append({"site": site, "layer": layer, "linears": linears, **found})
    stored = None if quantized is None else holds.scales_and_codes(quantized)
    results = {
        "schema": 1,
        "model": subject.model_and_hash(options.model),
        "tokens": rows.tokens[:, :-1].size,
        "packed": said(directory, linear),
        "text": None if options.text is None else subject.name_and_hash(options.text),
        "thresholds": dataclasses.asdict(thresholds),
        "sites": sites,
        "quantized": None if quantized is None else holds.contents(quantized, stored),
        "environment": subject.environment(),
    }
    worst = max(sites, key=lambda entry: entry["input"]["max_over_median"] or 0.0)
    first = jnp.asarray(rows.tokens[:1, :SHOWN])
    inputs = _run(model, first, state, linear=linear, wanted=worst["site"])[worst["site"]]
    shown = {name: np.asarray(x[worst["layer"], 0]) for name, x in inputs.items() if name in worst}
    sqnr = None if quantized is None else holds.sqnr(quantized)
    return Inspection(results, moments, (worst["linears"][0], shown), stored, sqnr)


def _chosen(layers: int, patterns: tuple[str, ...]) -> list[tuple[int, str]]:
    """Layer and site of every input whose site, or a linear of it, matches a pattern."""
    names = {(i, site): (site, *linear_names(site, i)) for i in range(layers) for site in SITES}
    chosen = set()
    for pattern in patterns:
        found = {at for at in names if any(fnmatch.fnmatchcase(n, pattern) for n in names[at])}
        if not found:
            raise ValueError(
                f"--site {pattern} names no linear: they are {linear_names(SITES[0], 0)[0]}, ..., "
                f"{linear_names(SITES[-1], layers - 1)[0]} (* stands for anything), or all of "
                f"{', '.join(SITES)}"
            )
        chosen |= found
    return [at for at in names if at in chosen]


@functools.partial(jax.jit, static_argnames=("linear", "wanted"))
def _run(
    model: Decoder, tokens: Array, state: State | None, *, linear: Linear, wanted: Thresholds | str
) -> dict[str, dict[str, Any]]:
    """Site -> what was observed ("input", "moved") -> numbers, stacked over layers.

    Wanted are Thresholds, for the `Moments` of every site, or a site, for its inputs themselves.
    Layers return arrays of the same shape. So where a site is padded in some layers, "moved" has
    the padded width in all, also in those that are left in float.
    """
    runs = (state,) if isinstance(state, dict) else state or ()

    def look(site: str, x: Any) -> Any:
        if isinstance(x, Routed):  # the inputs of a row's experts count as rows
            x = jnp.moveaxis(x.x, 2, 1).reshape(-1, x.x.shape[1], x.x.shape[-1])
        if isinstance(wanted, Thresholds):
            return observe(x, wanted)
        return x if site == wanted else ()

    def observed(site: str, x: Any, weights: tuple[Array, ...], state: Any) -> Any:
        ys, _ = linear(site, x, weights, state)
        found = {"input": look(site, x)}
        if isinstance(state, QuantizedSite):
            widths = [w.shape[-1] for w in state.weights if isinstance(w, MXArray)]
            moved = move_input(pad_channels(x, widths[0]), state.transform) if widths else x
            widest = max(w.shape[-1] for run in runs for w in run[site].weights)
            found["moved"] = look(site, pad_channels(moved, widest))
        return ys, found

    return model(tokens, observed, state)[1]
