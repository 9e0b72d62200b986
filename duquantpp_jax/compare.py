"""The main job: recipes compared on one model, under several scale rules, with paired intervals.

Every cell (recipe, scale rule) sees the same rows as the float model. A row's KL and NLL are
summed per row, differences to block_hadamard under the same rule are taken row by row, and their
95 % intervals are clustered by document (evaluation/intervals.py).
"""

import dataclasses
import importlib.metadata
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

import duquantpp_jax
from duquantpp_jax import files
from duquantpp_jax.calibration import calibrate, site_widths
from duquantpp_jax.core import Fitted, Stats
from duquantpp_jax.evaluation.divergence import float_log_probabilities, row_divergence
from duquantpp_jax.evaluation.intervals import clusters, mean_interval
from duquantpp_jax.evaluation.sqnr import linear_sqnr
from duquantpp_jax.evaluation.text import TARGETS, Rows, read_text, rows_for_targets, rows_of_text
from duquantpp_jax.models import (
    SITES,
    Decoder,
    linear_names,
    load,
    load_config,
    load_tokenizer,
    sha256,
    testbed,
)
from duquantpp_jax.ptq import QuantizedSite, fit_model, layer_of, quantize_model
from duquantpp_jax.recipes import ALIASES, recipe

BASELINE = "block_hadamard"
BATCH_ROWS = 16
"""Rows evaluated at once; under log256, whose scale spans a batch, part of the result."""
CALIBRATION_ROWS = 64
BLOCK_SIZE = 32

Progress = Callable[[str, int, int], None]
"""Called with what is being done, steps done, steps in all."""


@dataclasses.dataclass(frozen=True)
class CompareOptions:
    """Compares recipes for 4-bit weights and activations on a model, against block_hadamard.

    Without --model it is the small model inside the package, on text sampled from itself.

    Attributes:
      model: Hugging Face directory of a Llama (config.json, safetensors, tokenizer.json).
      text: UTF-8 text to evaluate on; documents separated by <|endoftext|>.
      calibration_text: UTF-8 text to calibrate on; its first 64 rows of 511 tokens are used.
      tokens: Targets to evaluate on, cut down to whole rows of 511.
      recipes: Methods, by their names in duquantpp_jax.recipes.
      scale_rules: How a block's scale is chosen: floor, ceil, even, rceil, mse (MXFP4), or log256,
        fp32 (not MXFP4).
      rounding: How moved weights are rounded.
      pad: Widen linear inputs that blocks of 32 do not divide, with zeros (exact).
      seed: For recipes that draw random numbers.
      out: Directory for results.json, timings.json and compare.png.
    """

    model: Path | None = None
    text: Path | None = None
    calibration_text: Path | None = None
    tokens: int = 16 * TARGETS
    recipes: tuple[str, ...] = (
        "rtn",
        "block_hadamard",
        "random_hadamard",
        "smooth_hadamard",
        "duquantpp",
        "duquantpp_released",
    )
    scale_rules: tuple[str, ...] = ("floor", "even", "log256")
    rounding: str = "rtn"
    pad: bool = False
    seed: int = 0
    out: Path = Path("compare-out")


class Subject(NamedTuple):
    """What is compared on: a model, rows to calibrate and to evaluate on, and their provenance."""

    model: Decoder
    calibration: Rows
    evaluation: Rows
    name: str
    sha256: str
    files: dict[str, Any]


class Comparison(NamedTuple):
    """What a comparison found.

    Attributes:
      results: The contents of results.json.
      timings: Seconds to fit each recipe, and of the whole comparison.
      clusters: What the intervals are clustered by, and how many clusters there are.
      channels: For the figure: a site, and its channel maxima before and after each recipe.
    """

    results: dict[str, Any]
    timings: dict[str, Any]
    clusters: tuple[str, int]
    channels: tuple[str, dict[str, Float[np.ndarray, " k"]]]


def compare(options: CompareOptions, progress: Progress = lambda *_: None) -> Comparison:
    """Runs the comparison.

    Raises:
      ValueError: Bad input; one line that says what was wrong and what would be right.
    """
    start = time.perf_counter()
    names = _unique("recipes", tuple(ALIASES.get(name, name) for name in options.recipes))
    rules = _unique("scale-rules", options.scale_rules)
    recipes = {
        (name, rule): recipe(name, rule, options.rounding) for name in names for rule in rules
    }
    subject = _subject(options)
    model, evaluation = subject.model, subject.evaluation
    widths = site_widths(model, BLOCK_SIZE, pad=options.pad)
    weights = {site: model.weights(site) for site in SITES}

    batches = [
        jnp.asarray(evaluation.tokens[first : first + BATCH_ROWS])
        for first in range(0, len(evaluation.tokens), BATCH_ROWS)
    ]
    calibration_batches = -(-len(subject.calibration.tokens) // BATCH_ROWS)
    done, total = 0, calibration_batches + len(recipes) * (1 + len(batches)) + len(batches)

    def step(what: str) -> None:
        nonlocal done
        done += 1
        progress(what, done, total)

    progress("calibrating", 0, total)
    stats = calibrate(
        model,
        subject.calibration.tokens[:, :-1],
        widths,
        needs=frozenset().union(*(r.needs for r in recipes.values())),
        batch_rows=BATCH_ROWS,
        progress=lambda: step("calibrating"),
    )
    jax.block_until_ready(stats)  # or the first fit would be charged with it

    fits: dict[tuple[str, str], dict[str, Fitted]] = {}
    fit_seconds: dict[tuple[str, str], float] = {}
    states: dict[tuple[str, str], dict[str, QuantizedSite]] = {}
    for (name, rule), one in recipes.items():
        # A fit that does not look at the formats is the same under every rule.
        twin = (name, rules[0])
        if "formats" not in one.needs and twin in fits:
            fits[name, rule], fit_seconds[name, rule] = fits[twin], fit_seconds[twin]
        else:
            began = time.perf_counter()
            fits[name, rule] = jax.block_until_ready(
                fit_model(one, weights, stats, jax.random.key(options.seed))
            )
            fit_seconds[name, rule] = time.perf_counter() - began
        states[name, rule] = quantize_model(one, weights, stats, fits[name, rule])
        step(f"fitted {name}, {rule}")

    float_nll: list[np.ndarray] = []
    kl: dict[tuple[str, str], list[np.ndarray]] = {cell: [] for cell in recipes}
    nll: dict[tuple[str, str], list[np.ndarray]] = {cell: [] for cell in recipes}
    sqnr: dict[tuple[str, str], float] = {}
    for number, batch in enumerate(batches):
        log_p, batch_nll = float_log_probabilities(model, batch)
        float_nll.append(np.asarray(batch_nll, np.float64))
        step("evaluating the float model")
        for cell, one in recipes.items():
            format = one.activation_format
            divergence = row_divergence(model, states[cell], batch, log_p, format=format)
            kl[cell].append(np.asarray(divergence[0], np.float64))
            nll[cell].append(np.asarray(divergence[1], np.float64))
            if number == 0:
                by_site = linear_sqnr(model, states[cell], batch, format=format)
                sqnr[cell] = float(np.mean(np.concatenate([v.ravel() for v in by_site.values()])))
            step(f"evaluating {cell[0]}, {cell[1]}")

    unit, cluster = clusters(evaluation.documents)
    float_rows = np.concatenate(float_nll) / TARGETS
    kl_rows = {cell: np.concatenate(values) / TARGETS for cell, values in kl.items()}
    rows = []
    for cell in recipes:
        quantized = np.concatenate(nll[cell]) / TARGETS
        rows.append(
            {
                "recipe": cell[0],
                "rounding": options.rounding,
                "scale_rule": cell[1],
                "kl": float(np.mean(kl_rows[cell])),
                **_difference(kl_rows[cell], kl_rows.get((BASELINE, cell[1])), cluster),
                "excess_nll": float(np.mean(quantized - float_rows)),
                "perplexity": float(np.exp(np.mean(quantized))),
                "sqnr_db": sqnr[cell],
            }
        )
        if not all(np.isfinite([rows[-1][key] for key in ("kl", "perplexity", "sqnr_db")])):
            raise ValueError(f"{cell[0]} under {cell[1]} gave NaN or Inf: no result is reported")
    results = {
        "schema": 1,
        "float_perplexity": float(np.exp(np.mean(float_rows))),
        "targets": len(evaluation.tokens) * TARGETS,
        "rows": rows,
        "environment": environment(),
        "options": {
            **subject.files,
            "tokens": options.tokens,
            "recipes": list(names),
            "scale_rules": list(rules),
            "rounding": options.rounding,
            "pad": options.pad,
            "seed": options.seed,
        },
        "model": {"name": subject.name, "sha256": subject.sha256},
    }
    timings = {
        "fit_seconds": [
            {"recipe": name, "scale_rule": rule, "seconds": seconds}
            for (name, rule), seconds in fit_seconds.items()
        ],
        "total_seconds": time.perf_counter() - start,
    }
    channels = _channel_maxima(stats, {name: fits[name, rules[0]] for name in names})
    return Comparison(results, timings, (unit, len(np.unique(cluster))), channels)


def verdict(results: dict[str, Any]) -> str:
    """One sentence: who is ahead of block_hadamard under each rule, or that no one is.

    Ahead is the least KL, if the 95 % interval of its paired difference lies below zero.
    """
    parts = []
    for rule in results["options"]["scale_rules"]:
        rows = sorted(
            (row for row in results["rows"] if row["scale_rule"] == rule),
            key=lambda row: row["kl"],
        )
        first = rows[0]
        if first["kl_difference"] is None:
            parts.append(f"under {rule} {first['recipe']} has the least KL ({first['kl']:.4f})")
            continue
        # Where the baseline itself leads, the question is whether the second is behind it.
        lead = rows[1] if first["recipe"] == BASELINE and len(rows) > 1 else first
        if lead["kl_difference_ci95"] is None:
            parts.append(f"under {rule} one row gives no interval")
            continue
        low, high = lead["kl_difference_ci95"]
        interval = f"{lead['kl_difference']:+.4f}, 95 % interval {low:+.4f} to {high:+.4f}"
        if low <= 0 <= high:
            parts.append(
                f"under {rule} no recipe is shown to be ahead (nearest {lead['recipe']} "
                f"{interval}, which includes zero)"
            )
        elif lead is first:
            parts.append(f"under {rule} {first['recipe']} is ahead ({interval})")
        else:
            parts.append(f"under {rule} {BASELINE} is ahead (next {lead['recipe']} {interval})")
    given = any(row["kl_difference"] is not None for row in results["rows"])
    opening = f"In KL against {BASELINE}: " if given else f"Without {BASELINE} to compare with: "
    return opening + "; ".join(parts) + "."


def environment() -> dict[str, Any]:
    """Versions and device, for a result to name what it was measured with."""
    packages = ("jax", "jaxlib", "flax", "numpy", "ml_dtypes", "tokenizers")
    device = jax.devices()[0]
    return {
        "duquantpp_jax": duquantpp_jax.__version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
        "device": device.device_kind,
        "platform": device.platform,
        "machine": platform.machine(),
        "matmul_precision": "float32 (highest)",
    }


def _subject(options: CompareOptions) -> Subject:
    given = {"--text": options.text, "--calibration-text": options.calibration_text}
    if options.model is not None and (missing := [n for n, value in given.items() if not value]):
        raise ValueError(
            f"--model needs {' and '.join(missing)}: text of the kind that the model was trained "
            "on, to evaluate and to calibrate with"
        )
    directory = options.model or testbed.directory()
    evaluation = _rows(options.text, directory, options.tokens, testbed.evaluation_rows)
    calibration = _rows(
        options.calibration_text, directory, CALIBRATION_ROWS * TARGETS, testbed.calibration_rows
    )
    return Subject(
        model=load(directory),
        calibration=calibration,
        evaluation=evaluation,
        name="testbed" if options.model is None else options.model.resolve().name,
        sha256=sha256(directory),
        files={
            "text": _name_and_hash(options.text),
            "calibration_text": _name_and_hash(options.calibration_text),
        },
    )


def _rows(
    text: Path | None, directory: Path, targets: int, embedded: Callable[[], np.ndarray]
) -> Rows:
    if text is None:
        tokens = embedded()
        rows, source = Rows(tokens, np.arange(len(tokens))), "the embedded text"
    else:
        content = read_text(text)
        bos = load_config(directory).bos_token_id
        if bos is None:
            raise ValueError(
                f"{directory}/config.json names no bos_token_id, which stands before every row: "
                "add the token that the model saw at the start of its text"
            )
        rows, source = rows_of_text(content, load_tokenizer(directory), bos), str(text)
    return rows_for_targets(rows, targets, source)


def _name_and_hash(path: Path | None) -> dict[str, str]:
    path = path or testbed.directory() / "tokens.npz"
    return {"name": path.name, "sha256": files.sha256(path)}


def _unique(option: str, names: tuple[str, ...]) -> tuple[str, ...]:
    if not names:
        raise ValueError(f"--{option} is empty: name at least one")
    return tuple(dict.fromkeys(names))


def _difference(
    rows: Float[np.ndarray, " rows"],
    baseline: Float[np.ndarray, " rows"] | None,
    cluster: np.ndarray,
) -> dict[str, Any]:
    if baseline is None:
        return {"kl_difference": None, "kl_difference_ci95": None}
    mean, low, high = mean_interval(rows - baseline, cluster)
    interval = [low, high] if np.isfinite(low) else None  # one cluster has no interval
    return {"kl_difference": mean, "kl_difference_ci95": interval}


def _channel_maxima(
    stats: dict[str, Stats], fits: dict[str, dict[str, Fitted]]
) -> tuple[str, dict[str, Float[np.ndarray, " k"]]]:
    """Channel maxima over the calibration sample, before and after each fit, at the site with the
    largest channel maximum / median over channels."""
    ratio = {
        (site, layer): float(np.max(maxima) / max(np.median(maxima), np.finfo(np.float32).tiny))
        for site in stats
        for layer, maxima in enumerate(np.asarray(stats[site].absmax))
    }
    site, layer = max(ratio, key=lambda key: ratio[key])
    sample = stats[site].sample[layer]
    moved = {"before": sample} | {
        name: layer_of(fitted[site].transform, layer).activations(sample)
        for name, fitted in fits.items()
    }
    maxima = {name: np.asarray(jnp.max(jnp.abs(x), axis=0)) for name, x in moved.items()}
    return f"{linear_names(site, layer)[0]} input", maxima
