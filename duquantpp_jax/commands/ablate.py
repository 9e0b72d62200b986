"""A grid in a file, from the command line: `duquantpp ablate FILE.py`, `python -m experiments.X`.

The file is Python and says

    CELLS      the grid: an iterable of cells, or a function of the options that gives one
    ROWS       what names a cell's row in the table: a field of Cell, or a function of the cell
    COLUMNS    its column
    BASELINE   the row that the others of a column are compared with

all but CELLS with a default. The model, the texts and the number of tokens are options, and hold
for every cell that leaves them open.
"""

import argparse
import dataclasses
import importlib
import itertools
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from duquantpp_jax import files
from duquantpp_jax.core import Format
from duquantpp_jax.lab import report, running, table
from duquantpp_jax.lab.cells import DEFAULT_FORMAT, SCHEMA, Cell
from duquantpp_jax.lab.executors import Processes, Slurm, gpus
from duquantpp_jax.lab.pivot import COMPARED, Layout, pivots
from duquantpp_jax.lab.running import Executor
from duquantpp_jax.recipes import known


@dataclasses.dataclass(frozen=True)
class AblateOptions:
    """Measures the grid of a Python file; what is finished already is not measured again.

    Attributes:
      model: Hugging Face directory; without it, the embedded model.
      text: UTF-8 texts to evaluate on; a table for each.
      calibration_text: UTF-8 texts to calibrate on; every cell that names none runs with each.
      data: Further data, where the file asks for it.
      tokens: Targets to evaluate on, in place of what the cells say.
      formats: Of weights and activations, as `duquantpp quantize --formats`; every cell that leaves
        its format open runs with each.
      weight_formats: Of weights alone.
      activation_formats: Of activations alone.
      scale_rules: Short for --formats mxfp4:RULE.
      only: Rows (besides the baseline) and columns of the table to run, by name; all without it.
      workers: Processes, GPUs or jobs that measure at once.
      executor: Where: this process (or, with several workers, processes that share its cores),
        one process for each GPU, or Slurm jobs (extra slurm).
      slurm: Parameters of the jobs as NAME=VALUE, e.g. slurm_partition=gpu gpus_per_node=1.
      cache_gib: Bound on the float model's log-probabilities kept by each process.
      out: Directory of the records, one JSON a cell; FILE's name under ablate-out without it.
      table: Print the table, with differences to the file's baseline.
      summary: JSON file to write the table to, small enough to commit.
      report: HTML page to write.
    """

    model: Path | None = None
    text: tuple[Path, ...] = ()
    calibration_text: tuple[Path, ...] = ()
    data: Path | None = None
    tokens: int | None = None
    formats: tuple[str, ...] = ()
    weight_formats: tuple[str, ...] = ()
    activation_formats: tuple[str, ...] = ()
    scale_rules: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    workers: int = 1
    executor: Literal["processes", "gpus", "slurm"] = "processes"
    slurm: tuple[str, ...] = ()
    cache_gib: float = 2.0
    out: Path | None = None
    table: bool = False
    summary: Path | None = None
    report: Path | None = None


@dataclasses.dataclass(frozen=True)
class AblateFile(AblateOptions):
    __doc__ = AblateOptions.__doc__
    _: dataclasses.KW_ONLY
    file: tyro.conf.Positional[Path]
    """Python file that defines CELLS, and maybe ROWS, COLUMNS and BASELINE."""


def run(options: AblateFile) -> int:
    """Runs the grid of the file; the exit code."""
    return ablate(options.file, options)


def ablate(file: Path, options: AblateOptions) -> int:
    """Runs the grid of a file; the exit code: 1 where a cell failed.

    Raises:
      ValueError: Bad input; one line that says what was wrong and what would be right.
    """
    return ablate_module(load(file), options)


def ablate_module(module: ModuleType, options: AblateOptions) -> int:
    """Runs the grid of a module; see `ablate`."""
    name = _name(module)
    out = options.out or Path("ablate-out") / name
    layout = layout_of(module)
    cells = _only(options.only, grid(cells_of(module, options), options), layout)
    for place in (out, options.summary, options.report):
        if place is not None:
            files.check_writable(place if place is out else place.parent)
    executor = _executor(options)
    with _bar() as bar:
        task = bar.add_task(name, total=None, failed="")

        def progress(done: int, failed: int, total: int) -> None:
            said = f"{failed} failed" if failed else ""
            bar.update(task, completed=done + failed, total=total, failed=said)

        outcome = running.run(
            cells, out, executor, cache_bytes=int(options.cache_gib * 2**30), progress=progress
        )
    found = pivots(outcome, layout)
    if options.table:
        console = Console(width=1000)  # a wide table is wrapped by the terminal, not cut short
        for pivot in found:
            print(f"{table.title(pivot)}\n{table.legend(pivot)}")
            for measure in COMPARED if pivot["entries"] else ():
                console.print(table.terminal(pivot, measure))
    if options.summary:
        options.summary.parent.mkdir(parents=True, exist_ok=True)
        summary = {"schema": SCHEMA, "grid": name, "tables": found}
        files.write_whole(options.summary, files.to_json(summary))
    if options.report:
        options.report.parent.mkdir(parents=True, exist_ok=True)
        page = report.page(name, module.__doc__ or "", found, outcome)
        files.write_whole(options.report, page.encode())
    for warning in dict.fromkeys(cell.warning for cell in cells):
        if warning:
            print(warning, file=sys.stderr)
    for cell, error in outcome.errors.items():
        print(f"failed: {cell.labels()}: {error}", file=sys.stderr)
    done, failed = len(outcome.records), len(outcome.errors)
    print(f"{done} of {len(cells)} cells finished, {failed} failed; records in {out}")
    return 1 if outcome.errors else 0


def cells_of(module: ModuleType, options: AblateOptions) -> list[Cell]:
    """The module's cells as it defines them.

    Raises:
      ValueError: It defines none.
    """
    cells = getattr(module, "CELLS", None)
    if callable(cells):
        cells = cells(options)
    if not isinstance(cells, Iterable):
        raise ValueError(
            f"{_name(module)} defines no CELLS: give an iterable of duquantpp_jax.lab.Cell"
        )
    return list(cells)


def grid(cells: Iterable[Cell], options: AblateOptions) -> list[Cell]:
    """The cells with the options where they leave something open, each configuration once."""
    given: list[Cell] = []
    for cell in cells:
        texts = [cell.text] if cell.text else list(options.text) or [None]
        calibrations = (
            [cell.calibration_text]
            if cell.calibration_text
            else list(options.calibration_text) or [None]
        )
        for text, calibration, formats in itertools.product(
            texts, calibrations, _formats(cell, options)
        ):
            given.append(
                dataclasses.replace(
                    cell,
                    **formats,
                    model=cell.model or options.model,
                    text=text,
                    calibration_text=calibration,
                    tokens=options.tokens or cell.tokens,
                )
            )
    return list({cell.digest: cell for cell in given}.values())


def _formats(cell: Cell, options: AblateOptions) -> list[dict[str, str | Format | None]]:
    """The fields of the cell that say its formats, for each choice of the options."""
    own = {
        "format": cell.format,
        "weight_format": cell.weight_format,
        "activation_format": cell.activation_format,
    }
    if own != {"format": DEFAULT_FORMAT, "weight_format": None, "activation_format": None}:
        return [own]
    both = (*options.formats, *options.scale_rules) or (DEFAULT_FORMAT,)
    sides = (both, options.weight_formats or (None,), options.activation_formats or (None,))
    return [dict(zip(own, chosen, strict=True)) for chosen in itertools.product(*sides)]


def _only(names: tuple[str, ...], cells: list[Cell], layout: Layout) -> list[Cell]:
    """The cells in the named rows, or the baseline's, and in the named columns; in all where no
    row, or no column, is named.

    Raises:
      ValueError: A name is of neither kind.
    """
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
    """How the module wants its table."""
    default = Layout()
    return Layout(
        getattr(module, "ROWS", default.rows),
        getattr(module, "COLUMNS", default.columns),
        getattr(module, "BASELINE", default.baseline),
    )


def load(file: Path) -> ModuleType:
    """Imports a file as a module that worker processes can import too.

    A file in a package is imported under its full name, another under its own, with its directory
    on the path.

    Raises:
      ValueError: There is no such file, it fails, or another module has its name.
    """
    path = file.resolve()
    if not path.is_file() or path.suffix != ".py":
        raise ValueError(f"{file} is no Python file: give one that defines CELLS")
    parts, root = [path.stem], path.parent
    while (root / "__init__.py").exists():
        parts.insert(0, root.name)
        root = root.parent
    name = ".".join(parts)
    # Last on the path, where nothing beside the file hides a module that Python or others have.
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


def main(module: ModuleType, arguments: list[str] | None = None) -> None:
    """`python -m experiments.X`: the options of `duquantpp ablate`, by argparse alone."""
    parser = argparse.ArgumentParser(
        description=(module.__doc__ or "").partition("\n")[0],
        epilog="Each option is explained by `duquantpp ablate --help`.",
    )
    for name in ("--model", "--data", "--out", "--summary", "--report"):
        parser.add_argument(name, type=Path)
    several = {"--text": Path, "--calibration-text": Path, "--only": str, "--slurm": str}
    formats = ("formats", "weight_formats", "activation_formats", "scale_rules")
    several |= {f"--{name.replace('_', '-')}": str for name in formats}
    for name, kind in several.items():
        parser.add_argument(name, type=kind, nargs="+", default=())
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--executor", choices=("processes", "gpus", "slurm"), default="processes")
    parser.add_argument("--cache-gib", type=float, default=2.0)
    parser.add_argument("--table", action="store_true")
    given = vars(parser.parse_args(arguments))
    for name in ("text", "calibration_text", "only", "slurm", *formats):
        given[name] = tuple(given[name])
    try:
        sys.exit(ablate_module(module, AblateOptions(**given)))
    except (ValueError, OSError) as error:
        print(f"{_name(module)}: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)


def _name(module: ModuleType) -> str:
    return Path(module.__file__ or module.__name__).stem


def _executor(options: AblateOptions) -> Executor | None:
    match options.executor:
        case "gpus":
            return gpus(options.workers if options.workers > 1 else None)
        case "slurm":
            return Slurm(options.workers, tuple(_parameter(one) for one in options.slurm))
    return Processes(options.workers) if options.workers > 1 else None


def _parameter(text: str) -> tuple[str, str | int]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--slurm {text} is no NAME=VALUE: give e.g. gpus_per_node=1")
    return name, int(value) if value.isdigit() else value


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} cells {task.fields[failed]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
    )
