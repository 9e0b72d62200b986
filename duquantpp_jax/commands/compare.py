"""The main job: recipes compared on one model, in several formats, with paired intervals.

A comparison is a small grid: a cell for each recipe, format and, where the recipe draws random
numbers, seed. Every cell sees the same rows of text as the float model. Its table is that of any
grid (lab/pivot.py): differences to block_hadamard in the same format, row by row, with intervals
over text and seeds.
"""

import dataclasses
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from rich import box
from rich.console import Console
from rich.table import Table

from duquantpp_jax import files
from duquantpp_jax.analysis.outliers import moved_maxima
from duquantpp_jax.commands.evaluate import Imports
from duquantpp_jax.commands.progress import progress_bar
from duquantpp_jax.evaluation.rows import TARGETS
from duquantpp_jax.evaluation.subject import check_texts, name_and_hash
from duquantpp_jax.lab import table
from duquantpp_jax.lab.bench import Bench, order
from duquantpp_jax.lab.cells import DEFAULT_FORMAT, SCHEMA, Cell
from duquantpp_jax.lab.pivot import COMPARED, Layout, pivots
from duquantpp_jax.lab.records import Record, record_of
from duquantpp_jax.lab.running import Outcome
from duquantpp_jax.ptq.stream import Name as Rotation
from duquantpp_jax.recipes import ALIASES, import_modules

BASELINE = "block_hadamard"
BATCH_ROWS = 16
"""Rows evaluated at once; under log256, whose scale spans a batch, part of the result."""
CALIBRATION_ROWS = 64
FORMATS = ("floor", "even", "log256")
TIMES = ("fit_seconds", "seconds")
"""What differs from run to run, and so stands in timings.json."""

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
      fits: Directories that duquantpp learn wrote for this model: a row each, under their names.
      scale_rules: Short form of --formats: floor, ceil, even, rceil, mse (MXFP4), or log256, fp32
        (not MXFP4); floor, even and log256 where no format is given.
      formats: Of weights and activations alike: mxfp4, mxfp4:even, mxfp6, nvfp4, log256, ..
      weight_formats: Of weights alone, each with every format of activations.
      activation_formats: Of activations alone, each with every format of weights.
      rounding: How moved weights are rounded.
      pad: Widen linear inputs that blocks of 32 do not divide, with zeros (exact).
      fuse: Fold smoothing and permutations into norms, v and up before rounding, as in quantize.
      rotate_stream, rotate_values: Turn the residual stream, and value heads, before anything else,
        as in quantize; compared with the float model as it is.
      refine: Steps in which, after rounding, what moves the activations is learned once more: a
        second row of every method.
      seed: For recipes that draw random numbers, and for refining.
      seeds: Several of them in place of --seed: which (0 1 2), or how many (3).
      imports: Modules to import first: those of the transforms in --fits that are not of this
        package.
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
    fits: tuple[Path, ...] = ()
    scale_rules: tuple[str, ...] | None = None
    formats: tuple[str, ...] | None = None
    weight_formats: tuple[str, ...] | None = None
    activation_formats: tuple[str, ...] | None = None
    rounding: str = "rtn"
    pad: bool = False
    fuse: bool = False
    rotate_stream: Rotation | None = None
    rotate_values: Rotation | None = None
    refine: int = 0
    seed: int = 0
    seeds: tuple[int, ...] | None = None
    imports: Imports = ()
    out: Path = Path("compare-out")


class Comparison(NamedTuple):
    """What a comparison found.

    Attributes:
      results: The contents of results.json (docs/results.md).
      timings: Seconds to fit and to measure each entry, and of the whole comparison.
      channels: For the figure: a site, and its channel maxima before and after each recipe.
    """

    results: dict[str, Any]
    timings: dict[str, Any]
    channels: tuple[str, dict[str, Float[np.ndarray, " k"]]]


def cells(options: CompareOptions) -> list[Cell]:
    """The grid, row by row; a recipe that draws no random numbers stands in it once.

    Raises:
      ValueError: An unknown name, or an empty list of names.
    """
    grid = []
    for name, fits in _methods(options).items():
        for format, weight_format, activation_format in _formats(options):
            cell = Cell(
                name,
                format,
                fits=fits,
                weight_format=weight_format,
                activation_format=activation_format,
                rounding=options.rounding,
                model=options.model,
                text=options.text,
                calibration_text=options.calibration_text,
                tokens=options.tokens,
                calibration_tokens=CALIBRATION_ROWS * TARGETS,
                batch_rows=BATCH_ROWS,
                pad=options.pad,
                fuse=options.fuse,
                rotate_stream=options.rotate_stream,
                rotate_values=options.rotate_values,
            )
            for steps in (0, options.refine) if options.refine else (0,):
                refined = dataclasses.replace(cell, refine=steps)
                seeds = _seeds(options) if refined.draws else _seeds(options)[:1]
                grid += [dataclasses.replace(refined, seed=seed) for seed in seeds]
    return grid


def compare(options: CompareOptions, progress: Progress = lambda *_: None) -> Comparison:
    """Runs the comparison.

    Raises:
      ValueError: Bad input; one line that says what was wrong and what would be right.
    """
    start = time.perf_counter()
    import_modules(options.imports)
    check_texts(options.model, options.text, options.calibration_text)
    grid = cells(options)
    for cell in grid:
        cell.configuration()  # refuses what is missing before anything is measured
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
    timings = {
        "entries": [
            {name: entry[name] for name in ("row", "column", *TIMES)} for entry in pivot["entries"]
        ],
        "total_seconds": time.perf_counter() - start,
    }
    pivot["entries"] = [
        {name: value for name, value in entry.items() if name not in TIMES}
        for entry in pivot["entries"]
    ]
    results = {"schema": SCHEMA, **pivot, "options": _chosen(options)}
    return Comparison(results, timings, (site, {name: maxima[name] for name in ("before", *names)}))


def _methods(options: CompareOptions) -> dict[str, Path | None]:
    """The rows in order: names of recipes, and names and places of fits."""
    if not options.fits:
        _check_not_empty("recipes", options.recipes)
    found = dict.fromkeys((ALIASES.get(name, name) for name in options.recipes), None)
    methods: dict[str, Path | None] = dict(found)
    for directory in options.fits:
        name = directory.resolve().name
        if name in methods:
            raise ValueError(f"--fits {directory} is the second row {name}: rename the directory")
        methods[name] = directory
    return methods


def _formats(options: CompareOptions) -> Iterator[tuple[str, str | None, str | None]]:
    """Of each column the format of both sides, and those of weights and activations."""
    for name in ("scale_rules", "formats", "weight_formats", "activation_formats"):
        _check_not_empty(name, getattr(options, name))
    both = dict.fromkeys([*(options.scale_rules or ()), *(options.formats or ())]) or FORMATS
    if "float" in both:
        raise ValueError("format float quantizes nothing: name the formats to compare in")
    if not options.weight_formats and not options.activation_formats:
        yield from ((name, None, None) for name in both)
        return
    sides = options.weight_formats or both, options.activation_formats or both
    for weight, activation in itertools.product(*sides):
        yield DEFAULT_FORMAT, weight, activation


def _seeds(options: CompareOptions) -> tuple[int, ...]:
    """The seeds that are asked for; a single number in --seeds says how many."""
    _check_not_empty("seeds", options.seeds)
    seeds = options.seeds or (options.seed,)
    if options.seeds and len(seeds) == 1:
        seeds = tuple(range(seeds[0]))
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise ValueError(
            f"--seeds {' '.join(map(str, options.seeds or seeds))} are no seeds: give how many (3) "
            "or which (0 1 2), each once"
        )
    return seeds


def _check_not_empty(option: str, values: tuple[Any, ...] | None) -> None:
    if values is not None and not values:
        raise ValueError(f"--{option.replace('_', '-')} is empty: name at least one")


def _chosen(options: CompareOptions) -> dict[str, Any]:
    """The options as results.json has them, without places."""
    fields = dataclasses.asdict(options) | {
        "recipes": [name for name, fits in _methods(options).items() if fits is None],
        "fits": [name for name, fits in _methods(options).items() if fits is not None],
        "seeds": list(_seeds(options)),
        "calibration_text": name_and_hash(options.calibration_text),
    }
    # Model and text are named beside the options.
    for name in ("model", "text", "imports", "out", "seed"):
        del fields[name]
    return fields


def run(options: CompareOptions) -> int:
    """Runs the command and prints what it found; the exit code."""
    files.check_writable(options.out)
    with progress_bar() as progress:
        comparison = compare(options, progress)
    for warning in dict.fromkeys(cell.warning for cell in cells(options)):
        if warning:
            print(warning, file=sys.stderr)
    _write(options, comparison)
    _print_table(comparison)
    print(table.verdict(comparison.results))
    print(f"Written to {options.out}: results.json, timings.json, compare.png")
    return 0


def _write(options: CompareOptions, comparison: Comparison) -> None:
    from duquantpp_jax.analysis import figures

    figure = figures.comparison(comparison.results, comparison.channels)
    options.out.mkdir(parents=True, exist_ok=True)
    files.write_whole(options.out / "compare.png", figures.picture(figure, "png"))
    files.write_whole(options.out / "timings.json", files.to_json(comparison.timings))
    files.write_whole(options.out / "results.json", files.to_json(comparison.results))


def _print_table(comparison: Comparison) -> None:
    results = comparison.results
    print(f"{table.title(results)}; weights rounded by {results['options']['rounding']}.")
    print(f"{table.legend(results)}.")
    if results["options"]["pad"]:
        print("--pad: inputs that blocks of 32 do not divide are widened with zeros (exact).")
    if results["options"]["fuse"]:
        print("--fuse: smoothing and permutations are folded into the model where they can be.")
    for name, what in (("stream", "the residual stream is"), ("values", "value heads are")):
        if rotation := results["options"][f"rotate_{name}"]:
            print(f"--rotate-{name}: {what} turned by {rotation} before anything else.")
    seconds = {
        (one["row"], one["column"]): one["fit_seconds"] for one in comparison.timings["entries"]
    }
    entries = {(one["row"], one["column"]): one for one in results["entries"]}
    beside = f"- {results['baseline']}" if results["baseline"] else ""
    distances = _table("KL", beside, "excess NLL", beside)
    others = _table("PPL", "SQNR dB", "fit s", "online", "KiB")
    for row, column in itertools.product(results["rows"], results["columns"]):
        entry, end = entries[row, column], column == results["columns"][-1]
        pairs = [
            (table.value(entry, measure), table.difference(entry, measure)) for measure in COMPARED
        ]
        distances.add_row(row, column, *itertools.chain(*pairs), end_section=end)
        numbers = [
            f"{entry['perplexity']['value']:.3f}",
            f"{entry['sqnr_db']['value']:.2f}",
            f"{seconds[row, column]:.1f}",
        ]
        others.add_row(row, column, *numbers, *table.online(entry), end_section=end)
    console = Console(width=160)
    console.print(distances)
    print(
        "Online: multiply-adds for each value of the inputs of the four sites; KiB of all layers."
    )
    console.print(others)


def _table(*headings: str) -> Table:
    shown = Table(box=box.SIMPLE_HEAD)
    for heading in ("recipe", "format"):
        shown.add_column(heading, no_wrap=True)
    for heading in headings:
        shown.add_column(heading, justify="right", no_wrap=True)
    return shown
