"""`duquantpp inspect`: prints a table and a description of an inspection, and draws figures."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from duquantpp_jax import files
from duquantpp_jax.analysis.look import Inspection, InspectOptions, inspect
from duquantpp_jax.commands.progress import progress_bar
from duquantpp_jax.commands.sizes import formats_of
from duquantpp_jax.files.processes import only_process
from duquantpp_jax.lab.table import empty
from duquantpp_jax.lab.webpage import Cells, image, page, sortable

SEEN = {"input": "as it is", "moved": "moved by the transform"}


def input_cells(results: Mapping[str, Any]) -> list[Cells]:
    """A line for each input; below it, for a quantized model, a line for the moved input."""
    thresholds = results["thresholds"]
    columns = {  # heading: its number in the results, and how it is printed
        "max / median": ("max_over_median", ".1f"),
        f"channels > {thresholds['ratio']:g}x": ("outlier_channels", "d"),
        "kurtosis": ("kurtosis", ".1f"),
        f"energy in top {thresholds['share']:.0%}": ("top_energy", ".1%"),
        "scale set by one": ("set_by_one", ".1%"),
        "position": ("position", "d"),
        "x median": ("position_over_median", ".1f"),
    }
    made: list[Cells] = []
    for site in results["sites"]:
        for seen in SEEN:
            if (found := site.get(seen)) is not None:
                name = site["linears"][0].removeprefix("model.")
                numbers = [(head, found[key], form) for head, (key, form) in columns.items()]
                cells = [(h, n, "" if n is None else format(n, form)) for h, n, form in numbers]
                made.append([("input of", None, name if seen == "input" else f"  {seen}"), *cells])
    return made


def table(results: Mapping[str, Any]) -> Table:
    """The lines for a terminal."""
    found = input_cells(results)
    shown = empty("input of", right=[heading for heading, *_ in found[0][1:]], wrap=True)
    for cells in found:
        shown.add_row(*(text for *_, text in cells))
    return shown


def report(results: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """The HTML page of --report; there a moved input has its name, as lines can be sorted."""
    found, name = [], ""
    for (heading, _, text), *cells in input_cells(results):
        name = name if (moved := text.startswith(" ")) else text
        found.append([(heading, None, name + (", moved" if moved else "")), *cells])
    moved = [cells[0][2].endswith(", moved") for cells in found]
    whole = (f"<h2>{title}</h2>{image(png, title)}" for title, png in pictures.items())
    details = {name: results[name] for name in ("model", "text", "thresholds", "environment")}
    return page("duquantpp inspect", sentence(results), [sortable(found, moved), *whole], details)


def sentence(results: Mapping[str, Any]) -> str:
    """What was inspected, and what the table's headings mean."""
    t = results["thresholds"]
    text = "the embedded rows" if results["text"] is None else results["text"]["name"]
    packed = f", {results['packed']}" if results["packed"] else ""
    said = f"{results['model']['name']}{packed}: {results['tokens']:,} tokens of {text}."
    if (quantized := results["quantized"]) is not None:
        weights, activations = formats_of(quantized)
        said += (
            f"\nQuantized: {quantized['recipe']}, {quantized['rounding']}; weights {weights}, "
            f"activations {activations}; linears {quantized['bytes'] / 2**20:.1f} MiB."
        )
    return (
        f"{said}\nBlocks of {t['block_size']}; one element sets a scale if the scale would be at "
        f"least {2 ** t['drop']} times smaller without it; position: where in a row the largest "
        "|x| is, and by how much it is above the median position."
    )


def figures_of(inspection: Inspection, block_size: int) -> dict[str, Any]:
    """The figures by name: surface, channels, blocks; for a quantized model scales, codes, sqnr."""
    from duquantpp_jax.analysis import figures

    results, (name, tokens) = inspection.results, inspection.tokens
    sites = dict.fromkeys(site["site"] for site in results["sites"])
    shown = {SEEN[seen]: x for seen, x in tokens.items()}
    made = {"surface": figures.surface(shown, log2=True, title=f"input of {name}")}
    for seen, moments in inspection.moments.items():
        end, title = "" if seen == "input" else f"_{seen}", SEEN[seen]
        maxima = {site: moments[site].absmax for site in sites}
        made[f"channels{end}"] = figures.amax_map(maxima, title=title)
        whole = {
            site: np.pad(absmax, ((0, 0), (0, -absmax.shape[-1] % block_size)))
            for site, absmax in maxima.items()
        }
        made[f"blocks{end}"] = figures.amax_map(whole, block_size=block_size, title=title)
    if inspection.stored is not None:
        scales, codes = inspection.stored
        made["scales"] = figures.scale_occupancy({"weights": scales})
        made["codes"] = figures.code_occupancy({"weights": codes})
    if inspection.sqnr is not None:
        made["sqnr"] = figures.sqnr({results["quantized"]["recipe"]: inspection.sqnr})
    return made


def run(options: InspectOptions) -> int:
    """Runs the command and prints the table; returns the exit code."""
    from duquantpp_jax.analysis import figures

    files.check_writable(options.out)
    files.check_file(options.report, "--report")
    with only_process(options.out):
        with progress_bar(options.terminal) as progress:
            found = inspect(options, progress)
        made = figures_of(found, options.block_size)
        pictures = {name: figures.picture(figure, "png") for name, figure in made.items()}
        for name, picture in pictures.items():
            files.write_whole(options.out / f"{name}.png", picture)
        files.write_whole(options.out / "outliers.json", files.to_json(found.results))
        if options.report:
            files.write_whole(options.report, report(found.results, pictures).encode())
    written = (
        f"Written to {options.out}: outliers.json, {', '.join(f'{name}.png' for name in made)}"
    )
    options.terminal.give(found.results, lambda: _show(found.results, written))
    return 0


def _show(results: Mapping[str, Any], written: str) -> None:
    console = Console(width=120)
    console.print(sentence(results), highlight=False)
    console.print(table(results))
    print(written)
