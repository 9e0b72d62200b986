"""`duquantpp inspect`: where a model's outliers sit, and what a quantized model holds.

Every input of a linear is seen as the model computes it on the rows of a text; of a quantized
model, as its quantized layers compute it, before and after the transform. The numbers are those of
analysis/outliers.py.
"""

import dataclasses
import fnmatch
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Integer

from duquantpp_jax.analysis import contents as holds
from duquantpp_jax.analysis.outliers import Batch, Moments, Thresholds, observe, statistics
from duquantpp_jax.checkpoints import Quantized, is_quantized, sha256, testbed
from duquantpp_jax.checkpoints.loading import load_any
from duquantpp_jax.core import MXArray
from duquantpp_jax.evaluation.rows import TARGETS
from duquantpp_jax.evaluation.subject import (
    environment,
    load_rows,
    model_name,
    name_and_hash,
    text_rows,
)
from duquantpp_jax.models import SITES, Decoder, Linear, linear_names
from duquantpp_jax.ptq.site import QuantizedSite, pad_channels
from duquantpp_jax.ptq.walk import State

BATCH_ROWS = 4
SHOWN = 64
"""Tokens of the surface."""


@dataclasses.dataclass(frozen=True)
class InspectOptions:
    """Where the outliers of a model sit, in numbers and figures; of a quantized one, what it holds.

    Without --model it is the small model inside the package.

    Attributes:
      model: Hugging Face directory (config.json, safetensors, tokenizer.json), or a quantized one.
      text: UTF-8 text that the model is run on, documents separated by <|endoftext|>; without
        --model, the embedded rows.
      tokens: Of the text, cut down to whole rows of 511.
      site: Inputs to show, by the names of their linears, as in 'model.layers.1.*' or
        '*.down_proj', or by attention_in, attention_out, mlp_in, mlp_out; all by default.
      block_size: Elements that share a scale.
      ratio: An outlier channel is so many times the median channel.
      share: Of the channels, those whose energy is added up.
      drop: A block's scale is set by one element if it is at least so many powers of two smaller
        without it.
      out: Directory for outliers.json and the figures.
    """

    model: Path | None = None
    text: Path | None = None
    tokens: int = 16 * TARGETS
    site: tuple[str, ...] = ("*",)
    block_size: int = 32
    ratio: float = 10.0
    share: float = 0.01
    drop: int = 1
    out: Path = Path("inspect-out")


class Inspection(NamedTuple):
    """What was found.

    Attributes:
      results: What outliers.json holds.
      moments: By what was seen (input, moved) and site; stacked over layers.
      tokens: The surface's input by what was seen, and its name.
      held: Scale bytes and codes of quantized MXFP4 weights.
      sqnr: Site -> dB by layer and linear, if every linear has one.
    """

    results: dict[str, Any]
    moments: dict[str, dict[str, Moments]]
    tokens: tuple[str, dict[str, np.ndarray]]
    held: holds.Held | None
    sqnr: dict[str, np.ndarray] | None


def inspect(
    options: InspectOptions, progress: Callable[[str, int, int], None] = lambda *_: None
) -> Inspection:
    """Runs the model and looks at what its linears are given.

    Raises:
      ValueError: Bad input; one line that says what was wrong and what would be right.
    """
    thresholds = Thresholds(options.block_size, options.ratio, options.share, options.drop)
    if options.model is not None and options.text is None:
        raise ValueError("--model needs --text: text of the kind that the model was trained on")
    directory = options.model or testbed.directory()
    model, linear, state = load_any(directory)
    chosen = _chosen(model.config.num_hidden_layers, options.site)
    if options.text is None:
        rows = load_rows(None, None, options.tokens, "calibration")
    else:
        rows = text_rows(directory, model.config, options.text, options.tokens)
    moments: dict[str, dict[str, Moments]] = {}
    for first in range(0, len(rows.tokens), BATCH_ROWS):
        batch = rows.tokens[first : first + BATCH_ROWS, :-1]
        found = _run(model, jnp.asarray(batch), state, linear=linear, look=_Observe(thresholds))
        for site, seen in found.items():
            for name, one in seen.items():
                new = Moments.of(one, batch.size)
                before = moments.setdefault(name, {}).get(site)
                moments[name][site] = new if before is None else before.merge(new)
        progress("looking", min(first + BATCH_ROWS, len(rows.tokens)), len(rows.tokens))
    quantized = Quantized(directory) if is_quantized(directory) else None
    plan = None if quantized is None else quantized.job.plan(quantized.config)
    sites = []
    for layer, site in chosen:
        moved = plan is not None and any(plan.chosen(site, layer))  # else it was left in float
        found = {
            seen: statistics(moments[seen][site].layer(layer), thresholds)
            for seen in ("input", *["moved"] * moved)
        }
        linears = list(linear_names(site, layer))
        sites.append({"site": site, "layer": layer, "linears": linears, **found})
    held = None if quantized is None else holds.held(quantized)
    results = {
        "schema": 1,
        "model": {"name": model_name(options.model), "sha256": sha256(directory)},
        "tokens": rows.tokens[:, :-1].size,
        "text": None if options.text is None else name_and_hash(options.text),
        "thresholds": dataclasses.asdict(thresholds),
        "sites": sites,
        "quantized": None if quantized is None else holds.contents(quantized, held),
        "environment": environment(),
    }
    worst = max(sites, key=lambda one: one["input"]["max_over_median"] or 0.0)
    first = jnp.asarray(rows.tokens[:1, :SHOWN])
    site = worst["site"]
    shown = _run(model, first, state, linear=linear, look=_Take(site))[site]
    return Inspection(
        results,
        moments,
        (
            worst["linears"][0],
            {s: np.asarray(x[worst["layer"], 0]) for s, x in shown.items() if s in worst},
        ),
        held,
        None if quantized is None else holds.sqnr(quantized),
    )


def _chosen(layers: int, patterns: tuple[str, ...]) -> list[tuple[int, str]]:
    """Layer and site of every input that one of the patterns names, or a linear of which it does.

    Raises:
      ValueError: A pattern names none.
    """
    every = [(layer, site) for layer in range(layers) for site in SITES]
    for pattern in patterns:
        if not any(_named(at, pattern) for at in every):
            raise ValueError(
                f"--site {pattern} names no linear: they are {linear_names(SITES[0], 0)[0]}, ..., "
                f"{linear_names(SITES[-1], layers - 1)[0]} (* stands for anything), or all of "
                f"{', '.join(SITES)}"
            )
    return [at for at in every if any(_named(at, pattern) for pattern in patterns)]


def _named(at: tuple[int, str], pattern: str) -> bool:
    layer, site = at
    names = (site, *linear_names(site, layer))
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)


def _seeing(linear: Linear, look: Callable[[str, Array], Any], state: State | None) -> Linear:
    """The linear, giving out what `look` finds in its input, and in that moved by a transform.

    Layers give out arrays of one shape: where a site is padded in some, what is moved has that
    width in all, also in those that are left in float.
    """
    runs = (state,) if isinstance(state, dict) else state or ()

    def widest(site: str) -> int:
        return max(w.shape[-1] for run in runs for w in run[site].weights)

    def seeing(site: str, x: Array, weights: tuple[Array, ...], state: Any) -> Any:
        ys, _ = linear(site, x, weights, state)
        seen = {"input": look(site, x)}
        if isinstance(state, QuantizedSite):
            widths = [w.shape[-1] for w in state.weights if isinstance(w, MXArray)]
            moved = state.transform.activations(pad_channels(x, widths[0])) if widths else x
            seen["moved"] = look(site, pad_channels(moved, widest(site)))
        return ys, seen

    return seeing


@functools.partial(jax.jit, static_argnames=("linear", "look"))
def _run(
    model: Decoder,
    tokens: Integer[Array, "rows length"],
    state: State | None,
    *,
    linear: Linear,
    look: Callable[[str, Array], Any],
) -> dict[str, dict[str, Any]]:
    """What `look` finds at every site, in every layer, as it is and moved."""
    return model(tokens, _seeing(linear, look, state), state)[1]


@dataclasses.dataclass(frozen=True)
class _Observe:
    """Looks for outliers."""

    thresholds: Thresholds

    def __call__(self, site: str, x: Array) -> Batch:
        return observe(x, self.thresholds)


@dataclasses.dataclass(frozen=True)
class _Take:
    """Takes one site's input itself."""

    site: str

    def __call__(self, site: str, x: Array) -> Any:
        return x if site == self.site else ()
