"""The command line: `duquantpp COMMAND`.

A command is a frozen dataclass of options. Bad input is one line on stderr and exit code 2, never
a traceback; Ctrl-C is exit code 130.
"""

import contextlib
import io
import re
import sys
from collections.abc import Sequence
from typing import Any

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from duquantpp_jax import files
from duquantpp_jax.compare import BASELINE, CompareOptions, Comparison, compare, verdict

COMMANDS = {"compare": CompareOptions}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; the exit code."""
    try:
        options = _parse(sys.argv[1:] if arguments is None else arguments)
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


def _run_compare(options: CompareOptions) -> None:
    files.check_writable(options.out)
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
        comparison = compare(
            options,
            lambda what, done, total: bar.update(
                task, description=what, completed=done, total=total
            ),
        )
    _write(options, comparison)
    _print_table(comparison)
    print(f"\n{verdict(comparison.results)}")
    print(f"Written to {options.out}: results.json, timings.json, compare.png")


def _write(options: CompareOptions, comparison: Comparison) -> None:
    from duquantpp_jax.analysis import figures

    figure = figures.comparison(comparison.results, comparison.channels, comparison.clusters)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=200, metadata={"Software": None})
    options.out.mkdir(parents=True, exist_ok=True)
    files.write_whole(options.out / "compare.png", picture.getvalue())
    files.write_whole(options.out / "timings.json", files.to_json(comparison.timings))
    files.write_whole(options.out / "results.json", files.to_json(comparison.results))


def _print_table(comparison: Comparison) -> None:
    results, (unit, count) = comparison.results, comparison.clusters
    seconds = {
        (one["recipe"], one["scale_rule"]): one["seconds"]
        for one in comparison.timings["fit_seconds"]
    }
    table = Table(
        title=f"{results['model']['name']}: {results['targets']:,} targets, float perplexity "
        f"{results['float_perplexity']:.3f}, W4A4, {results['options']['rounding']}; "
        f"KL in nats per token, 95 % intervals by {unit} ({count})",
        title_justify="left",
    )
    table.add_column("recipe")
    table.add_column("scale rule")
    for heading in (
        "KL",
        f"- {BASELINE}",
        "95 % interval",
        "excess NLL",
        "PPL",
        "SQNR dB",
        "fit s",
    ):
        table.add_column(heading, justify="right")
    for row in results["rows"]:
        difference, interval = row["kl_difference"], row["kl_difference_ci95"]
        table.add_row(
            row["recipe"],
            row["scale_rule"],
            f"{row['kl']:.4f}",
            "" if difference is None else f"{difference:+.4f}",
            "" if interval is None else f"{interval[0]:+.4f} to {interval[1]:+.4f}",
            f"{row['excess_nll']:.4f}",
            f"{row['perplexity']:.3f}",
            f"{row['sqnr_db']:.2f}",
            f"{seconds[row['recipe'], row['scale_rule']]:.1f}",
            end_section=row is results["rows"][-1]
            or row["scale_rule"] == results["options"]["scale_rules"][-1],
        )
    if results["options"]["pad"]:
        table.caption = (
            "--pad: inputs that blocks of 32 do not divide are widened with zeros, exact"
        )
    console = Console()
    Console(width=max(console.width, 118)).print(table)


if __name__ == "__main__":
    sys.exit(main())
