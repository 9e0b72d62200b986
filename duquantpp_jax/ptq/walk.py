"""A model quantized layer after layer, one layer's weights and the hidden states in memory.

    hidden_0 = embedding[tokens]
    sites_l = quantize(layer l, Stats of what hidden_l gives its linears)
    hidden_(l+1) = layer l (hidden_l)        float, or, if sequential, the layer as quantized

With the float layers this is what `calibrate` and `quantize_model` do with the whole model at
once. Sequential, each layer is fitted and rounded on what the layers before it, quantized, really
give it, as in GPTQ; within a layer all sites are still calibrated on the float layer.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Integer

from duquantpp_jax.core import Format, MXArray, Needs
from duquantpp_jax.models import (
    SITE_WEIGHTS,
    SITES,
    Decoder,
    DecoderConfig,
    linear_names,
)
from duquantpp_jax.models.layers import layer, window
from duquantpp_jax.ptq.calibration import (
    SAMPLE_LIMIT,
    calibrate_layer,
    empty_stats,
)
from duquantpp_jax.ptq.plan import Plan
from duquantpp_jax.ptq.site import (
    HIGHEST,
    MixedLinear,
    QuantizedSite,
    fit_linear,
    quantize_input,
    quantize_linear,
    widen,
)
from duquantpp_jax.transforms.basic import Identity

BATCH_ROWS = 4
"""Rows that run at once: what their attention takes stays below the weights of a large layer."""

Parameters = Mapping[str, Float[Array | np.ndarray, "..."]]
"""Of one layer, by name inside it."""

State = dict[str, QuantizedSite] | tuple[dict[str, QuantizedSite], ...]
"""Of all layers: stacked, or, where layers differ in what is quantized, stacked in runs."""


class QuantizedLayer(NamedTuple):
    """A layer's sites, and a row of the report for each of its linears."""

    sites: dict[str, QuantizedSite]
    report: list[dict[str, Any]]


def quantize_layer(
    plan: Plan,
    number: int,
    parameters: Parameters,
    hidden: Float32[np.ndarray, "rows length k"],
    progress: Callable[[str], None] = lambda _: None,
) -> QuantizedLayer:
    """Quantizes a layer and takes `hidden` through it, in place.

    Args:
      plan: What is done.
      number: Of the layer.
      parameters: Of the layer, in any float type.
      hidden: What the layer is given; on return, what the next is.
      progress: Called with what is being done, whenever some of it is done.
    """
    widths = plan.widths(number)
    parameters = {name: jnp.asarray(array) for name, array in parameters.items()}
    rounding_needs = functools.reduce(
        operator.or_, (plan.recipes[site].rounding.needs for site in widths), Needs.NOTHING
    )

    def stats_of(needs: Needs, last: bool, **second_pass: Any) -> dict[str, Any]:
        rows, length, _ = hidden.shape
        return calibrate_layer(
            plan.config,
            number,
            parameters,
            hidden,
            empty_stats(widths, rows, length, needs, SAMPLE_LIMIT),
            batch_rows=BATCH_ROWS,
            after=hidden if last and not plan.sequential else None,
            progress=lambda: progress("calibrating"),
            **second_pass,
        )

    needs = functools.reduce(
        operator.or_, (plan.recipes[site].needs for site in widths), Needs.NOTHING
    )
    stats = stats_of(needs, last=not rounding_needs)
    weights = {site: _chosen_weights(plan, site, number, parameters) for site in widths}
    fits = {}
    for site in widths:
        place = jax.random.fold_in(jax.random.key(plan.seed), SITES.index(site))
        key = jax.random.split(place, plan.config.num_hidden_layers)[number]
        fits[site] = fit_linear(plan.recipes[site], weights[site], stats[site], key)
        progress("fitting")
    moved = {}
    if rounding_needs:
        moved = stats_of(rounding_needs, last=True, fits=fits, formats=plan.formats)

    sites, report = {}, []
    for site in SITES:
        quantized = QuantizedSite(Identity(), ())
        if site in widths:
            given, sample = weights.pop(site), stats[site].sample
            quantized = quantize_linear(
                plan.recipes[site], given, stats[site], fits[site], moved.get(site)
            )
            report += _report(plan, site, number, sample, given, quantized)
        rounded = iter(quantized.weights)
        each = tuple(
            next(rounded) if wanted else parameters[name]
            for name, wanted in zip(SITE_WEIGHTS[site], plan.chosen(site, number), strict=True)
        )
        sites[site] = dataclasses.replace(quantized, weights=each)
        progress("rounding")
    if plan.sequential:
        _take_through(plan, number, parameters, sites, hidden, progress)
    return QuantizedLayer(sites, report)


def quantize_decoder(
    plan: Plan, model: Decoder, tokens: Integer[np.ndarray, "rows length"]
) -> State:
    """Quantizes a model in memory, layer after layer.

    Returns:
      The state for `model(tokens, plan.linear, state)`.
    """
    plan.check()
    hidden = np.array(model.embedding[...])[tokens]
    parameters = {name: np.asarray(array[...]) for name, array in model.layers.items()}
    layers = (
        {name: array[number] for name, array in parameters.items()}
        for number in range(plan.config.num_hidden_layers)
    )
    return stack_layers(
        quantize_layer(plan, number, one, hidden).sites for number, one in enumerate(layers)
    )


def stack_layers(layers: Iterable[dict[str, QuantizedSite]]) -> State:
    """The state that a decoder scans: layers stacked, a run for each stretch that are alike."""

    def kind(one: dict[str, QuantizedSite]) -> Any:
        shapes = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(one)]
        return jax.tree.structure(one), shapes

    runs: list[list[dict[str, QuantizedSite]]] = []
    for one in layers:
        if not runs or kind(runs[-1][-1]) != kind(one):
            runs.append([])
        runs[-1].append(one)
    stacked = tuple(jax.tree.map(lambda *leaves: jnp.stack(leaves), *run) for run in runs)
    return stacked[0] if len(stacked) == 1 else stacked


def storage_bytes(q: MXArray) -> int:
    """Bytes of an array as it is stored: packed codes, scales, tensor scale."""
    scale = q.scales.size * q.scales.dtype.itemsize
    return -(-q.elements.size * q.element.bits // 8) + scale + 4 * (q.tensor_scale is not None)


@functools.partial(jax.jit, static_argnames="format")
def sensitivity(
    sample: Float[Array, "tokens k"],
    weights: tuple[Float[Array, "_ _"], ...],
    site: QuantizedSite,
    *,
    format: Format,
) -> list[tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]]:
    """What quantizing costs each linear alone, on a sample of its float input.

    Args:
      sample: Tokens, as wide as the quantized weights.
      weights: In float; maybe narrower.
      site: Quantized.
      format: Of the activations.

    Returns:
      For each linear the energies sum y^2, sum (y - y^)^2 and sum (x^ (W' - W^)^T)^2: of the
      output, of its error, and of the part of it that rounding the weights alone gives; W' is
      moved, W^ rounded, x^ the moved and quantized input.
    """
    width = sample.shape[-1]
    seen = quantize_input(sample, site, format)

    def one(w: Float[Array, "n _"], rounded: MXArray) -> tuple[Array, Array, Array]:
        held = rounded.dequantize()
        y = jnp.matmul(sample[:, : w.shape[-1]], w.T, precision=HIGHEST)
        error = y - jnp.matmul(seen, held.T, precision=HIGHEST)
        off = site.transform.weights(widen(w, width)) - held
        rounding = jnp.matmul(seen, off.T, precision=HIGHEST)
        return tuple(jnp.sum(jnp.square(v)) for v in (y, error, rounding))  # type: ignore[return-value]

    return [one(w, q) for w, q in zip(weights, site.weights, strict=True)]  # type: ignore[arg-type]


def _report(
    plan: Plan,
    site: str,
    number: int,
    sample: Float[Array, "tokens k"],
    weights: tuple[Float[Array, "_ _"], ...],
    quantized: QuantizedSite,
) -> list[dict[str, Any]]:
    """A row for each quantized linear of a site."""
    format = plan.recipes[site].activation_format
    chosen = plan.chosen(site, number)
    names = [name for name, c in zip(linear_names(site, number), chosen, strict=True) if c]
    energies = sensitivity(sample, weights, quantized, format=format)
    return [
        {
            "linear": name,
            "bytes": storage_bytes(rounded),
            "sqnr_db": _decibel(signal, error),
            "weight_error": float(weight_error) / max(float(signal), 1e-30),
        }
        for name, rounded, (signal, error, weight_error) in zip(
            names, quantized.weights, energies, strict=True
        )
        if isinstance(rounded, MXArray)
    ]


def _decibel(signal: Float[Array, ""], error: Float[Array, ""]) -> float | None:
    """Signal to noise in dB; None where either is nothing."""
    if not (signal > 0 and error > 0):
        return None
    return float(10 * np.log10(np.float64(signal) / np.float64(error)))


def _chosen_weights(
    plan: Plan, site: str, number: int, parameters: Mapping[str, Array]
) -> tuple[Float32[Array, "_ k"], ...]:
    chosen = zip(SITE_WEIGHTS[site], plan.chosen(site, number), strict=True)
    return tuple(parameters[name].astype(jnp.float32) for name, wanted in chosen if wanted)


def _take_through(
    plan: Plan,
    number: int,
    parameters: Mapping[str, Array],
    sites: dict[str, QuantizedSite],
    hidden: Float32[np.ndarray, "rows length k"],
    progress: Callable[[str], None],
) -> None:
    """Replaces the hidden states by what the quantized layer makes of them."""
    for first in range(0, len(hidden), BATCH_ROWS):
        batch = slice(first, first + BATCH_ROWS)
        y = _forward(
            jnp.asarray(hidden[batch]),
            parameters,
            window(plan.config, number),
            sites,
            config=plan.config,
            linear=plan.linear,
        )
        hidden[batch] = np.asarray(y)
        progress("running the quantized layer")


@functools.partial(jax.jit, static_argnames=("config", "linear"))
def _forward(
    x: Float32[Array, "rows length k"],
    parameters: Mapping[str, Float[Array, "..."]],
    window: Int[Array, ""] | None,
    sites: dict[str, QuantizedSite],
    *,
    config: DecoderConfig,
    linear: MixedLinear,
) -> Float32[Array, "rows length k"]:
    return layer(config, x, parameters, window, linear, sites)[0]
