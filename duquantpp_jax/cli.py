"""The command line: `duquantpp COMMAND`.

A command is a frozen dataclass of options. Bad input is one line on stderr and exit code 2, never
a traceback; Ctrl-C is exit code 130.
"""

import contextlib
import dataclasses
import io
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tyro
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from duquantpp_jax import files, report
from duquantpp_jax.ablation.command import AblateOptions, ablate
from duquantpp_jax.compare import BASELINE, CompareOptions, Comparison, compare, verdict
from duquantpp_jax.evaluate import EvaluateOptions, evaluate, summary
from duquantpp_jax.export import ExportOptions, export
from duquantpp_jax.generate import GenerateOptions, continued
from duquantpp_jax.inspection import InspectOptions, figures_of, inspect, sentence, table
from duquantpp_jax.kernels import proof
from duquantpp_jax.quantize import QuantizeOptions, dry_run, quantize


@dataclasses.dataclass(frozen=True)
class Ablate(AblateOptions):
    __doc__ = AblateOptions.__doc__
    _: dataclasses.KW_ONLY
    file: tyro.conf.Positional[Path]
    """Python file that defines CELLS, and maybe ROWS, COLUMNS and BASELINE."""


COMMANDS = {
    "compare": CompareOptions,
    "ablate": Ablate,
    "evaluate": EvaluateOptions,
    "generate": GenerateOptions,
    "quantize": QuantizeOptions,
    "export": ExportOptions,
    "inspect": InspectOptions,
    "kernels": proof.Options,
}


class _Interrupt:
    """Ctrl-C, remembered: raised inside a callback of another library it can be lost, and is then
    raised again at the next step of the progress."""

    asked = False

    def __call__(self, *_: Any) -> None:
        self.asked = True
        raise KeyboardInterrupt

    def check(self) -> None:
        if self.asked:
            raise KeyboardInterrupt


_interrupt = _Interrupt()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; the exit code."""
    with _remembering_interrupts():
        return _main(arguments)


@contextlib.contextmanager
def _remembering_interrupts() -> Iterator[None]:
    """Ctrl-C is remembered, where it would have raised KeyboardInterrupt."""
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not ours or threading.current_thread() is not threading.main_thread():
        yield
        return
    _interrupt.asked = False
    signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _main(arguments: Sequence[str] | None) -> int:
    try:
        options = _parse(sys.argv[1:] if arguments is None else arguments)
        if isinstance(options, proof.Options):
            return proof.run(options)
        if isinstance(options, Ablate):
            return ablate(options.file, options)
        if isinstance(options, EvaluateOptions):
            _run_evaluate(options)
        elif isinstance(options, GenerateOptions):
            print(continued(options))
        elif isinstance(options, QuantizeOptions):
            _run_quantize(options)
        elif isinstance(options, InspectOptions):
            _run_inspect(options)
        elif isinstance(options, ExportOptions):
            with _progress() as progress:
                notes = export(options, progress)
            print("\n".join([*notes, f"Written to {options.out}."]))
        else:
            _run_compare(options)
    except (ValueError, OSError) as error:
        print("duquantpp: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("duquantpp: interrupted", file=sys.stderr)
        return 130
    return 0


def _parse(arguments: Sequence[str]) -> Any:
    """The options of the chosen command.

    Raises:
      ValueError: The arguments are wrong; the parser's boxes as one line.
      SystemExit: Help was asked for and printed.
    """
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.extras.subcommand_cli_from_dict(
                COMMANDS, prog="duquantpp", description=__doc__, args=list(arguments)
            )
    except SystemExit as stop:
        if not stop.code:
            raise
    # The first line is a title; boxes are drawn in rules and bars; the last part points to --help.
    text = re.sub(r"[─-╿]|-{3,}", " ", complaint.getvalue())
    lines = [" ".join(line.split()) for line in text.splitlines()[1:]]
    said = " ".join(line for line in lines if line)
    said = re.split(r"Argument helptext:|For full helptext", said)[0].strip()
    raise ValueError(f"{said} (see duquantpp --help)")


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr, if that is a terminal: called with what is being done, steps done, all."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    with bar:
        task = bar.add_task("loading", total=None)

        def step(what: str, done: int, total: int) -> None:
            _interrupt.check()
            bar.update(task, description=what, completed=done, total=total)

        yield step


def _run_evaluate(options: EvaluateOptions) -> None:
    if options.out is not None:
        files.check_writable(options.out.parent)
    with _progress() as progress:
        results = evaluate(options, progress)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        files.write_whole(options.out, files.to_json(results))
    Console(width=100).print(*summary(results))


def _run_quantize(options: QuantizeOptions) -> None:
    console = Console(width=100)
    if options.dry_run:
        found = dry_run(options)
        console.print(report.table(found["linears"]), report.dry_line(found))
        return
    with _progress() as progress:
        done = quantize(options, progress)
    console.print(report.table(done["linears"]), report.quantized_line(done))
    print(f"Written to {options.out}; report.json has every linear.")


def _run_inspect(options: InspectOptions) -> None:
    from duquantpp_jax.analysis import figures

    files.check_writable(options.out)
    with _progress() as progress:
        found = inspect(options, progress)
    options.out.mkdir(parents=True, exist_ok=True)
    made = figures_of(found, options.block_size)
    for name, figure in made.items():
        files.write_whole(options.out / f"{name}.png", figures.picture(figure, "png"))
    files.write_whole(options.out / "outliers.json", files.to_json(found.results))
    console = Console(width=120)
    console.print(sentence(found.results), highlight=False)
    console.print(table(found.results))
    pictures = ", ".join(f"{name}.png" for name in made)
    print(f"Written to {options.out}: outliers.json, {pictures}")


def _run_compare(options: CompareOptions) -> None:
    files.check_writable(options.out)
    with _progress() as progress:
        comparison = compare(options, progress)
    _write(options, comparison)
    _print_table(comparison)
    print(verdict(comparison.results))
    print(f"Written to {options.out}: results.json, timings.json, compare.png")


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
            f"{row['sqnr_db']:.2f}",
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


if __name__ == "__main__":
    sys.exit(main())
