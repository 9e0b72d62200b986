"""`duquantpp ablate FILE.py`, and `python -m experiments.X`: measures the grid of a Python file.

The file defines

    CELLS      the grid: an iterable of cells, or a function from the options to one
    ROWS       gives a cell's row in the table: a field of Cell, or a function of the cell
    COLUMNS    gives its column, likewise
    BASELINE   the row that the others of a column are compared with

Only CELLS is required. Options for the model, the texts, the formats and the number of tokens hold
for every cell that leaves them open.
"""

import contextlib
import dataclasses
import importlib
import itertools
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import tyro
from rich.console import Console

from duquantpp_jax import files
from duquantpp_jax.checkpoints.packed import decoded
from duquantpp_jax.commands.options.ablate import AblateFile, AblateOptions
from duquantpp_jax.commands.progress import guarded, progress_bar
from duquantpp_jax.evaluation.rows import TARGETS
from duquantpp_jax.lab import running, table
from duquantpp_jax.lab.cells import DEFAULT_FORMAT, SCHEMA, Cell
from duquantpp_jax.lab.executors import Processes, Slurm, gpus
from duquantpp_jax.lab.pivot import COMPARED, Layout, pivots
from duquantpp_jax.lab.running import Executor
from duquantpp_jax.lab.webpage import webpage
from duquantpp_jax.ptq.layout import kernels_here
from duquantpp_jax.recipes import import_modules, known


def run(options: AblateFile) -> int:
    """Runs the grid of a file; returns the exit code: 1 if a cell failed."""
    return _run(_module(options.file), options)


def main(module: ModuleType, arguments: list[str] | None = None) -> None:
    """`python -m experiments.X`: runs the grid of the module with the options of `ablate`."""
    question = (module.__doc__ or "").partition("\n")[0]
    options = tyro.cli(AblateOptions, description=question, args=arguments)
    verbose = options.terminal.verbose
    sys.exit(guarded(_name(module), lambda: _run(module, options), verbose))


def _run(module: ModuleType, options: AblateOptions) -> int:
    _check(options)
    import_modules(options.imports)
    name = _name(module)
    out = options.out or Path("ablate-out") / name
    layout = layout_of(module)
    cells = _only(options.only, grid(cells_of(module, options), options), layout)
    files.check_writable(out)
    files.check_file(options.summary, "--summary")
    files.check_file(options.report, "--report")
    executor = _executor(options)
    for warning in dict.fromkeys(filter(None, (cell.warning for cell in cells))):
        print(warning, file=sys.stderr)
    # Workers have devices of their own, which this process must not take.
    if executor is None and (kernels := kernels_here()) is not None:
        print(kernels, file=sys.stderr)
    for model in dict.fromkeys(cell.model for cell in cells):
        with contextlib.suppress(ValueError):  # its cells fail and say why
            if (used := decoded(model)) is not None:
                print(used, file=sys.stderr)
    with progress_bar(options.terminal) as bar:

        def progress(done: int, failed: int, total: int) -> None:
            bar(name + (f", {failed} failed" if failed else ""), done + failed, total)

        cache_bytes = int(options.cache_gib * 2**30)
        outcome = running.run(cells, out, executor, cache_bytes=cache_bytes, progress=progress)
    found = pivots(outcome, layout)
    summary = {"schema": SCHEMA, "grid": name, "tables": found}
    if options.summary:
        files.write_whole(options.summary, files.to_json(summary))
    if options.report:
        page = webpage(name, module.__doc__ or "", found, outcome)
        files.write_whole(options.report, page.encode())
    for cell, error in outcome.errors.items():
        print(f"failed: {cell.labels()}: {files.printable(error)}", file=sys.stderr)
    done = f"{len(outcome.records)} of {len(cells)} cells finished, {len(outcome.errors)} failed"
    done += f"; records in {out}"
    options.terminal.give(summary, lambda: _show(found if options.table else [], done))
    return 1 if outcome.errors else 0


def _check(options: AblateOptions) -> None:
    """Raises ValueError for numbers with which no cell could run."""
    if options.workers < 1:
        raise ValueError(f"--workers {options.workers}: give at least 1")
    if options.cache_gib < 0:
        raise ValueError(f"--cache-gib {options.cache_gib:g}: give 0 or more")
    if options.tokens is not None and options.tokens < TARGETS:
        raise ValueError(f"--tokens {options.tokens}: give at least {TARGETS}, a row")


def _show(found: list[dict[str, Any]], done: str) -> None:
    """Prints tables, and what was done."""
    console = Console(width=1000)  # a wide table is wrapped by the terminal, not cut short
    for pivot in found:
        print(f"{table.title(pivot)}\n{table.legend(pivot)}")
        for measure in COMPARED if pivot["entries"] else ():
            console.print(table.terminal(pivot, measure))
    print(done)


def cells_of(module: ModuleType, options: AblateOptions) -> list[Cell]:
    """The cells that the module defines; raises ValueError if it defines none."""
    given = getattr(module, "CELLS", None)
    if options.data is not None and not callable(given):
        raise ValueError(f"{_name(module)} reads no --data: leave it out")
    cells = given(options) if callable(given) else given
    if isinstance(cells, Iterable):
        return list(cells)
    raise ValueError(
        f"{_name(module)} defines no CELLS: give an iterable of duquantpp_jax.lab.Cell"
    )


def grid(cells: Iterable[Cell], options: AblateOptions) -> list[Cell]:
    """The cells, with the options for what they leave open; each configuration once."""
    over: dict[str, Any] = {"tokens": options.tokens, "text_key": options.text_key}
    over = {name: value for name, value in over.items() if value is not None}
    cells = list(cells)
    asked = options.formats + options.scale_rules
    asked += options.weight_formats + options.activation_formats
    if asked and not any(map(_leaves_formats_open, cells)):
        raise ValueError(f"every cell of this grid has its own format: leave {asked[0]} out")
    complete = [
        dataclasses.replace(cell, **over, **chosen)
        for cell in cells
        for chosen in _choices(cell, options)
    ]
    return list({cell.digest: cell for cell in complete}.values())


def _choices(cell: Cell, options: AblateOptions) -> list[dict[str, Any]]:
    """The fields that a cell leaves open, for each choice that the options give."""
    model = () if options.model is None else (options.model,)
    places = {"model": model, "text": options.text, "calibration_text": options.calibration_text}
    given: dict[str, tuple[Any, ...]] = {n: v for n, v in places.items() if not getattr(cell, n)}
    if _leaves_formats_open(cell):
        given["format"] = (*options.formats, *options.scale_rules)
        given["weight_format"] = options.weight_formats
        given["activation_format"] = options.activation_formats
    given = {name: values for name, values in given.items() if values}
    products = itertools.product(*given.values())
    return [dict(zip(given, chosen, strict=True)) for chosen in products]


def _leaves_formats_open(cell: Cell) -> bool:
    return (cell.format, cell.weight_format, cell.activation_format) == (DEFAULT_FORMAT, None, None)


def _only(names: tuple[str, ...], cells: list[Cell], layout: Layout) -> list[Cell]:
    """The cells in the named rows (and the baseline) and columns; all rows if none is named."""
    places = [layout.place(cell) for cell in cells]
    for axis in (0, 1):
        there = {place[axis] for place in places}
        if wanted := there.intersection(names):
            wanted.add(str(layout.baseline))
            cells = [cell for cell in cells if layout.place(cell)[axis] in wanted]
    known_names = {name for place in places for name in place}
    for name in names:
        known("row or column", name, sorted(known_names))
    return cells


def layout_of(module: ModuleType) -> Layout:
    """The layout that the module defines by ROWS, COLUMNS and BASELINE."""
    names = [field.name for field in dataclasses.fields(Layout)]
    return Layout(**{n: getattr(module, n.upper()) for n in names if hasattr(module, n.upper())})


def _module(file: Path) -> ModuleType:
    """Imports a file, under its full name if it is in a package, so that workers can do so too."""
    path = file.resolve()
    if not path.is_file() or path.suffix != ".py":
        raise ValueError(f"{file} is no Python file: give one that defines CELLS")
    parts, root = [path.stem], path.parent
    while (root / "__init__.py").exists():
        parts.insert(0, root.name)
        root = root.parent
    name = ".".join(parts)
    # Last on the path: files beside this one must not hide installed modules.
    known_before = list(sys.path)
    if str(root) not in sys.path:
        sys.path.append(str(root))
    try:
        module = importlib.import_module(name)
        if Path(module.__file__ or "").resolve() != path:
            raise ValueError(f"{file} has the name of another module ({name}): rename it")
    except Exception as error:
        sys.path[:] = known_before
        if isinstance(error, SyntaxError):
            raise ValueError(f"{file} is not Python ({error.msg}, line {error.lineno})") from None
        if isinstance(error, ValueError):
            raise
        raise ValueError(f"{file} raises {type(error).__name__}: {error}") from error
    return module


def _name(module: ModuleType) -> str:
    return Path(module.__file__ or module.__name__).stem


def _executor(options: AblateOptions) -> Executor | None:
    match options.executor:
        case "gpus":
            return gpus(options.workers if options.workers > 1 else None, options.imports)
        case "slurm":
            parameters = tuple(map(_parameter, options.slurm))
            return Slurm(options.workers, parameters, imports=options.imports)
    return Processes(options.workers, imports=options.imports) if options.workers > 1 else None


def _parameter(text: str) -> tuple[str, str | int]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--slurm {text} is no NAME=VALUE: give e.g. gpus_per_node=1")
    return name, int(value) if value.isdigit() else value
