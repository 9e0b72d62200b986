"""The main job: recipes compared on one model, under several scale rules, with paired intervals.

Every cell (recipe, scale rule) sees the same rows as the float model. A row's KL and NLL are
summed per row, differences to block_hadamard under the same rule are taken row by row, and their
95 % intervals are clustered by document (evaluation/intervals.py).
"""

import dataclasses
import functools
import itertools
import operator
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from rich import box
from rich.console import Console
from rich.table import Table

from duquantpp_jax import files
from duquantpp_jax.commands.progress import progress_bar
from duquantpp_jax.core import Fitted, Needs, Recipe, Stats
from duquantpp_jax.evaluation.intervals import clusters, estimate
from duquantpp_jax.evaluation.predict import BATCH_ROWS, Predictor, Reference, RowSums
from duquantpp_jax.evaluation.rows import TARGETS
from duquantpp_jax.evaluation.sqnr import mean_sqnr
from duquantpp_jax.evaluation.subject import Subject, environment, load_subject
from duquantpp_jax.lab.bench import CACHE_BYTES, fit, quantize
from duquantpp_jax.models import linear_names
from duquantpp_jax.ptq.calibration import calibrate, site_widths
from duquantpp_jax.ptq.site import layer_of
from duquantpp_jax.recipes import ALIASES, recipe

BASELINE = "block_hadamard"
CALIBRATION_ROWS = 64
BLOCK_SIZE = 32

Progress = Callable[[str, int, int], None]
"""Called with what is being done, steps done, steps in all."""


@dataclasses.dataclass(frozen=True)
class CompareOptions:
    """Compares recipes for 4-bit weights and activations on a model, against block_hadamard.

    Without --model it is the small model inside the package, on text sampled from itself.

    Attributes:
      model: Hugging Face directory of a Llama, Mistral, Qwen2 or Qwen3 (config.json, safetensors,
        tokenizer.json).
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


Cell = tuple[str, str]
"""A recipe's name and a scale rule's."""


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
    subject = load_subject(
        options.model, options.text, options.calibration_text, options.tokens, CALIBRATION_ROWS
    )
    widths = site_widths(subject.model, BLOCK_SIZE, pad=options.pad)
    float_model = Predictor(subject.model)
    rows = subject.evaluation.tokens
    reference = Reference(float_model, rows, batch_rows=BATCH_ROWS, keep_bytes=CACHE_BYTES)
    step = _steps(progress, subject, reference, len(recipes))

    stats = calibrate(
        subject.model,
        subject.calibration.tokens[:, :-1],
        widths,
        needs=functools.reduce(operator.or_, (one.needs for one in recipes.values())),
        batch_rows=BATCH_ROWS,
        progress=lambda: step("calibrating"),
    )
    jax.block_until_ready(stats)  # or the first fit would be charged with it
    fits, seconds, quantized = _quantize(subject, recipes, stats, options.seed, step)
    measured: dict[Cell, RowSums] = {}
    sqnr: dict[Cell, float | None] = {}
    for cell, predictor in quantized.items():
        what = f"evaluating {', '.join(cell)}"
        measured[cell] = reference.row_sums(predictor, lambda *_, what=what: step(what))
        sqnr[cell] = mean_sqnr(predictor, rows[: reference.batch_rows])

    unit, cluster = clusters(subject.evaluation.documents)
    results = {
        "schema": 1,
        "float_perplexity": float(np.exp(np.mean(reference.nll() / TARGETS))),
        "targets": len(subject.evaluation.tokens) * TARGETS,
        "rows": [_row(cell, options.rounding, measured, sqnr, cluster) for cell in recipes],
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
            {"recipe": name, "scale_rule": rule, "seconds": seconds[name, rule]}
            for name, rule in recipes
        ],
        "total_seconds": time.perf_counter() - start,
    }
    channels = _channel_maxima(stats, {name: fits[name, rules[0]] for name in names})
    return Comparison(results, timings, (unit, len(np.unique(cluster))), channels)


def _steps(
    progress: Progress, subject: Subject, reference: Reference, cells: int
) -> Callable[[str], None]:
    """A function that reports one more step done."""
    calibration = -(-len(subject.calibration.tokens) // BATCH_ROWS)
    evaluation = -(-len(subject.evaluation.tokens) // reference.rows_at_once)
    total = calibration + cells * (1 + evaluation)
    done = itertools.count(1)
    progress("calibrating", 0, total)
    return lambda what: progress(what, next(done), total)


def _quantize(
    subject: Subject,
    recipes: dict[Cell, Recipe],
    stats: dict[str, Stats],
    seed: int,
    step: Callable[[str], None],
) -> tuple[dict[Cell, dict[str, Fitted]], dict[Cell, float], dict[Cell, Predictor]]:
    """What each cell fits, in how many seconds, and the quantized sites."""
    rows = subject.calibration.tokens[:, :-1]
    fits: dict[Cell, dict[str, Fitted]] = {}
    seconds: dict[Cell, float] = {}
    quantized: dict[Cell, Predictor] = {}
    for cell, one in recipes.items():
        # A fit that does not look at the formats is the same under every rule.
        twin = next((other for other in fits if other[0] == cell[0]), None)
        if twin and Needs.FORMATS not in one.needs:
            fits[cell], seconds[cell] = fits[twin], seconds[twin]
        else:
            fits[cell], seconds[cell] = fit(one, subject.model, stats, seed)
        quantized[cell] = quantize(one, subject.model, rows, stats, fits[cell])
        step(f"fitted {', '.join(cell)}")
    return fits, seconds, quantized


def _row(
    cell: Cell,
    rounding: str,
    measured: dict[Cell, RowSums],
    sqnr: dict[Cell, float | None],
    cluster: np.ndarray,
) -> dict[str, Any]:
    """A row of results.json.

    Raises:
      ValueError: The cell gave NaN or Inf.
    """
    kl, nll, float_nll = (
        sums / TARGETS
        for sums in (measured[cell].kl, measured[cell].nll, measured[cell].reference_nll)
    )
    difference, interval = None, None
    if cell[0] == BASELINE:
        difference, interval = 0.0, [0.0, 0.0]
    elif (baseline := measured.get((BASELINE, cell[1]))) is not None:
        difference, interval, *_ = estimate({0: kl}, cluster, {0: baseline.kl / TARGETS})
    row = {
        "recipe": cell[0],
        "rounding": rounding,
        "scale_rule": cell[1],
        "kl": float(np.mean(kl)),
        "kl_difference": difference,
        "kl_difference_ci95": interval,
        "excess_nll": float(np.mean(nll - float_nll)),
        "perplexity": float(np.exp(np.mean(nll))),
        "sqnr_db": sqnr[cell],
    }
    if not all(np.isfinite([row["kl"], row["perplexity"], row["sqnr_db"] or 0.0])):
        raise ValueError(f"{cell[0]} under {cell[1]} gave NaN or Inf: no result is reported")
    return row


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


def _unique(option: str, names: tuple[str, ...]) -> tuple[str, ...]:
    if not names:
        raise ValueError(f"--{option} is empty: name at least one")
    return tuple(dict.fromkeys(names))


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


def run(options: CompareOptions) -> int:
    """Runs the command and prints what it found; the exit code."""
    files.check_writable(options.out)
    with progress_bar() as progress:
        comparison = compare(options, progress)
    _write(options, comparison)
    _print_table(comparison)
    print(verdict(comparison.results))
    print(f"Written to {options.out}: results.json, timings.json, compare.png")
    return 0


def _write(options: CompareOptions, comparison: Comparison) -> None:
    from duquantpp_jax.analysis import figures

    figure = figures.comparison(comparison.results, comparison.channels, comparison.clusters)
    options.out.mkdir(parents=True, exist_ok=True)
    files.write_whole(options.out / "compare.png", figures.picture(figure, "png"))
    files.write_whole(options.out / "timings.json", files.to_json(comparison.timings))
    files.write_whole(options.out / "results.json", files.to_json(comparison.results))


def _print_table(comparison: Comparison) -> None:
    results, (unit, count) = comparison.results, comparison.clusters
    seconds = {
        (one["recipe"], one["scale_rule"]): one["seconds"]
        for one in comparison.timings["fit_seconds"]
    }
    print(
        f"{results['model']['name']}, {results['targets']:,} targets, float perplexity "
        f"{results['float_perplexity']:.3f}; weights and activations in 4 bits, "
        f"{results['options']['rounding']}.\n"
        f"KL(float || quantized) in nats per token; 95 % intervals of paired differences, "
        f"clustered by {unit} ({count})."
    )
    if results["options"]["pad"]:
        print("--pad: inputs that blocks of 32 do not divide are widened with zeros (exact).")
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("recipe", no_wrap=True)
    table.add_column("scale rule", no_wrap=True)
    for heading in ("KL", f"KL - {BASELINE}", "excess NLL", "PPL", "SQNR dB", "fit s"):
        table.add_column(heading, justify="right", no_wrap=True)
    last_rule = results["options"]["scale_rules"][-1]
    for row in results["rows"]:
        table.add_row(
            row["recipe"],
            row["scale_rule"],
            f"{row['kl']:.4f}",
            _difference(row),
            f"{row['excess_nll']:.4f}",
            f"{row['perplexity']:.3f}",
            "" if row["sqnr_db"] is None else f"{row['sqnr_db']:.2f}",
            f"{seconds[row['recipe'], row['scale_rule']]:.1f}",
            end_section=row["scale_rule"] == last_rule,
        )
    Console(width=120).print(table)


def _difference(row: dict[str, Any]) -> str:
    if row["kl_difference"] is None:
        return ""
    if row["kl_difference_ci95"] is None:
        return f"{row['kl_difference']:+.4f}"
    low, high = row["kl_difference_ci95"]
    return f"{row['kl_difference']:+.4f} [{low:+.4f}, {high:+.4f}]"
