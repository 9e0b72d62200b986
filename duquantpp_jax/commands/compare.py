"""`duquantpp compare`: recipes on one model, in several formats, with paired intervals.

A comparison is a small grid: a cell for each recipe, format and, if the recipe draws random
numbers, seed. Every cell evaluates the same rows of text as the float model. Its table is that of
any grid (lab/pivot.py), with block_hadamard as the baseline of each format.
"""

import dataclasses
import functools
import itertools
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from rich.console import Console

from duquantpp_jax import files
from duquantpp_jax.analysis.outliers import moved_maxima
from duquantpp_jax.checkpoints import load_config, testbed
from duquantpp_jax.checkpoints.packed import decoded
from duquantpp_jax.commands.hosts import as_one_of_several
from duquantpp_jax.commands.options.compare import BASELINE, FORMATS, CompareOptions
from duquantpp_jax.commands.progress import Step, progress_bar
from duquantpp_jax.commands.sizes import ALONE, used
from duquantpp_jax.evaluation.rows import TARGETS
from duquantpp_jax.evaluation.subject import check_texts, name_and_hash
from duquantpp_jax.files.processes import only_process
from duquantpp_jax.lab import table
from duquantpp_jax.lab.bench import Bench, check_cell, order
from duquantpp_jax.lab.cells import SCHEMA, Cell
from duquantpp_jax.lab.pivot import Layout, pivots
from duquantpp_jax.lab.records import Record, record_of
from duquantpp_jax.lab.running import Outcome
from duquantpp_jax.lab.webpage import image, page, section
from duquantpp_jax.ptq.layout import kernels_here
from duquantpp_jax.recipes import ALIASES, FITS, checked_seed, format_name, import_modules

BATCH_ROWS = 16
"""Rows evaluated at once; they decide the result of log256, whose scale spans a batch."""
CALIBRATION_ROWS = 64
MOST_SEEDS = 1000
TIMES = ("fit_seconds", "seconds")
"""Fields of an entry that differ from run to run; they stand in timings.json."""
DONE = {
    "pad": "inputs that blocks of 32 do not divide are widened with zeros (exact)",
    "fuse": "smoothing and permutations are folded into the model where they can be",
    "rotate_stream": "the residual stream is turned by {} before anything else",
    "rotate_values": "value heads are turned by {} before anything else",
}
"""What the table says of an option."""


class Comparison(NamedTuple):
    """The contents of results.json and timings.json (docs/results.md); and for the figure a site,
    with its channel maxima before and after each recipe."""

    results: dict[str, Any]
    timings: dict[str, Any]
    channels: tuple[str, dict[str, Float[np.ndarray, " k"]]]


def cells(options: CompareOptions) -> list[Cell]:
    """The grid, row by row; a recipe that draws no random numbers has only the first seed."""
    lists = ("scale_rules", "formats", "weight_formats", "activation_formats", "seeds")
    for name in lists if options.fits else ("recipes", *lists):
        if getattr(options, name) == ():
            raise ValueError(f"--{name.replace('_', '-')} is empty: name at least one")
    if options.refine < 0:
        raise ValueError(f"--refine {options.refine}: give a number of steps, or 0 for none")
    same = ("rounding", "model", "text", "calibration_text", "text_key", "tokens", "pad", "fuse")
    same += ("rotate_stream", "rotate_values")
    shared = {name: getattr(options, name) for name in same}
    shared |= {"calibration_tokens": CALIBRATION_ROWS * TARGETS, "batch_rows": BATCH_ROWS}
    methods, steps, seeds = _methods(options), sorted({0, options.refine}), _seeds(options)
    grid = []
    for name, formats, refine in itertools.product(methods, _formats(options), steps):
        cell = Cell(name, fits=methods[name], refine=refine, **formats, **shared)
        own = seeds if cell.draws else seeds[:1]
        grid += [dataclasses.replace(cell, seed=seed) for seed in own]
    return grid


def compare(options: CompareOptions, progress: Step = lambda *_: None) -> Comparison:
    """Runs the comparison."""
    start = time.perf_counter()
    import_modules(options.imports)
    check_texts(options.model, options.text, options.calibration_text)
    grid = cells(options)
    config = load_config(options.model or testbed.directory())
    for cell in grid:
        # Refuses bad input before anything is measured; and `record_of` knows by it what was read.
        cell.digest  # noqa: B018
        check_cell(cell, config)
    records: dict[Cell, Record] = {}
    maxima: dict[str, Float[np.ndarray, " k"]] = {}
    bench, site = Bench(), ""
    for done, cell in enumerate(order(grid)):
        progress(f"measuring {cell.labels()}", done, len(grid))
        records[cell] = record_of(cell, bench.run(cell))
        first = (grid[0].format_label, grid[0].seed, 0)
        if (cell.format_label, cell.seed, cell.refine) == first:
            fits, stats = bench.fitted(cell)
            site, before, moved = moved_maxima(stats, fits)
            maxima |= {"before": before, cell.recipe: moved}
    progress("measured", len(grid), len(grid))
    names = list(_methods(options))
    layout = Layout(baseline=BASELINE if BASELINE in names else None)
    (pivot,) = pivots(Outcome({cell: records[cell] for cell in grid}, {}), layout)
    seconds = [
        {"row": entry["row"], "column": entry["column"]} | {n: entry.pop(n) for n in TIMES}
        for entry in pivot["entries"]
    ]
    timings = {"entries": seconds, "total_seconds": time.perf_counter() - start}
    results = {"schema": SCHEMA, **pivot, "options": _chosen(options)}
    return Comparison(results, timings, (site, {name: maxima[name] for name in ("before", *names)}))


def _methods(options: CompareOptions) -> dict[str, Path | None]:
    """The rows in order: names of recipes, and names of fits with their directories."""
    methods: dict[str, Path | None] = {ALIASES.get(name, name): None for name in options.recipes}
    for directory in options.fits:
        name = directory.resolve().name
        if name in methods or name in FITS:
            raise ValueError(
                f"--fits {directory} would be a row like the recipe or the fits {name}: rename the "
                "directory"
            )
        methods[name] = directory
    return methods


def _formats(options: CompareOptions) -> list[dict[str, str]]:
    """The fields of a cell for the formats of each column."""
    names = (*(options.scale_rules or ()), *(options.formats or ()))
    if "float" in names:
        raise ValueError("format float quantizes nothing: name the formats to compare in")
    if names and options.weight_formats and options.activation_formats:
        raise ValueError(
            "--weight-formats and --activation-formats name the formats of both sides: leave "
            "--formats and --scale-rules out"
        )
    both = {format_name(name): name for name in reversed(names or FORMATS)}  # each format once
    both = [*both.values()][::-1]
    if not options.weight_formats and not options.activation_formats:
        return [{"format": name} for name in both]
    sides = options.weight_formats or both, options.activation_formats or both
    return [{"weight_format": w, "activation_format": a} for w, a in itertools.product(*sides)]


def _seeds(options: CompareOptions) -> tuple[int, ...]:
    """The seeds of the options; a single number in --seeds says how many."""
    if not options.seeds:
        return (checked_seed(options.seed),)
    given = f"--seeds {' '.join(map(str, options.seeds))}"
    seeds = options.seeds
    if len(seeds) == 1:
        seeds = tuple(range(min(seeds[0], MOST_SEEDS + 1)))
    if not 0 < len(set(seeds)) == len(seeds) <= MOST_SEEDS:
        raise ValueError(
            f"{given}: give each once (0 1 2), or how many (--seeds 3), {MOST_SEEDS} at most"
        )
    return tuple(map(checked_seed, seeds))


def _chosen(options: CompareOptions) -> dict[str, Any]:
    """The options as results.json has them, without directories."""
    methods = _methods(options)
    fields = dataclasses.asdict(options) | {
        "recipes": [name for name, fits in methods.items() if fits is None],
        "fits": [name for name, fits in methods.items() if fits is not None],
        "seeds": list(_seeds(options)),
        "calibration_text": name_and_hash(options.calibration_text),
    }
    left = (
        "model",
        "text",
        "imports",
        "out",
        "report",
        "seed",
        "distributed",
        "terminal",
    )  # model and text stand beside
    return {name: value for name, value in fields.items() if name not in left}


def run(options: CompareOptions) -> int:
    """Runs the command, and prints and writes the results; returns the exit code."""
    with as_one_of_several(options) as own:
        return _run(own)


def _run(options: CompareOptions) -> int:
    from duquantpp_jax.analysis import figures

    files.check_writable(options.out)
    files.check_file(options.report, "--report")
    import_modules(options.imports)
    for warning in dict.fromkeys(filter(None, (cell.warning for cell in cells(options)))):
        print(warning, file=sys.stderr)
    check_texts(options.model, options.text, options.calibration_text)
    if (used := decoded(options.model)) is not None:
        print(used, file=sys.stderr)
    if (kernels := kernels_here()) is not None:
        print(kernels, file=sys.stderr)
    if options.fuse and load_config(options.model or testbed.directory()).num_experts:
        print(ALONE, file=sys.stderr)
    with only_process(options.out):
        with progress_bar(options.terminal) as progress:
            comparison = compare(options, progress)
        figure = figures.comparison(comparison.results, comparison.channels)
        picture = figures.picture(figure, "png")
        files.write_whole(options.out / "compare.png", picture)
        files.write_whole(options.out / "timings.json", files.to_json(comparison.timings))
        files.write_whole(options.out / "results.json", files.to_json(comparison.results))
        if options.report:
            files.write_whole(options.report, _page(comparison, picture).encode())
    options.terminal.give(comparison.results, functools.partial(_show, comparison, options.out))
    return 0


def _page(comparison: Comparison, picture: bytes) -> str:
    """The HTML page of --report."""
    results = comparison.results
    pairs = zip(results["entries"], comparison.timings["entries"], strict=True)
    pivot = results | {"entries": [{**entry, **times} for entry, times in pairs]}
    shown = image(picture, "KL by recipe and format, and the channels of the worst site")
    details = {"Options": results["options"], "Versions and devices": results["environments"]}
    verdict = table.verdict(results)
    return page("duquantpp compare", verdict, [section(pivot, shown)], details)


def _show(comparison: Comparison, out: Path) -> None:
    """Prints the tables, and a verdict."""
    results, options = comparison.results, comparison.results["options"]
    print(f"{table.title(results)}; weights rounded by {options['rounding']}.")
    print(f"{table.legend(results)}.")
    for name, what in DONE.items():
        if options[name]:
            print(f"--{name.replace('_', '-')}: {what.format(options[name])}.")
    pairs = zip(results["entries"], comparison.timings["entries"], strict=True)
    entries = {(e["row"], e["column"]): (e, times["fit_seconds"]) for e, times in pairs}
    beside = f"- {results['baseline']}" if results["baseline"] else ""
    names = ("recipe", "format")
    distances = table.empty(*names, right=("KL", beside, "excess NLL", beside))
    others = table.empty(*names, right=("PPL", "SQNR dB", "fit s", "online", "KiB"))
    for row, column in itertools.product(results["rows"], results["columns"]):
        (entry, seconds), end = entries[row, column], column == results["columns"][-1]
        cells = [text for *_, text in table.line(entry, beside)]
        distances.add_row(row, column, *cells[:4], end_section=end)
        cells = [*cells[4:], f"{seconds:.1f}", *table.online(entry)]
        others.add_row(row, column, *cells, end_section=end)
    console = Console(width=160)
    console.print(distances)
    print("Online: multiply-adds for each value of the four sites' inputs; KiB of all layers.")
    console.print(others)
    print(table.verdict(comparison.results))
    print(f"Written to {out}: results.json, timings.json, compare.png")
    print(f"{used(comparison.timings['total_seconds'])}.")
