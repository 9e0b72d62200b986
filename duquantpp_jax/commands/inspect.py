"""An inspection for people: a table, a sentence, figures."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from duquantpp_jax import files
from duquantpp_jax.analysis.look import Inspection, InspectOptions, inspect
from duquantpp_jax.commands.progress import progress_bar

SEEN = {"input": "as it is", "moved": "moved by the transform"}


def table(results: Mapping[str, Any]) -> Table:
    """A row for each input; of a quantized model, moved below as it is."""
    thresholds = results["thresholds"]
    shown = Table(box=box.SIMPLE_HEAD)
    shown.add_column("input of", no_wrap=True)
    for heading in (
        "max / median",
        f"channels > {thresholds['ratio']:g}x",
        "kurtosis",
        f"energy in top {thresholds['share']:.0%}",
        "scale set by one",
        "position",
        "x median",
    ):
        shown.add_column(heading, justify="right")
    for one in results["sites"]:
        for seen in SEEN:
            if seen in one:
                name = one["linears"][0].removeprefix("model.")
                shown.add_row(name if seen == "input" else f"  {seen}", *_cells(one[seen]))
    return shown


def _cells(found: Mapping[str, Any]) -> list[str]:
    def ratio(name: str, form: str) -> str:
        return "" if found[name] is None else format(found[name], form)

    return [
        ratio("max_over_median", ".1f"),
        str(found["outlier_channels"]),
        ratio("kurtosis", ".1f"),
        ratio("top_energy", ".1%"),
        ratio("set_by_one", ".1%"),
        str(found["position"]),
        ratio("position_over_median", ".1f"),
    ]


def sentence(results: Mapping[str, Any]) -> str:
    """What was looked at, and what the table's words mean."""
    t = results["thresholds"]
    text = "the embedded rows" if results["text"] is None else results["text"]["name"]
    said = f"{results['model']['name']}: {results['tokens']:,} tokens of {text}."
    if (held := results["quantized"]) is not None:
        bits = [
            "/".join(dict.fromkeys(held[f"{side}_formats"].values()))
            for side in ("weight", "activation")
        ]
        said += (
            f"\nQuantized: {held['recipe']}, {held['rounding']}; weights "
            f"{bits[0]}, activations {bits[1]}; linears {held['bytes'] / 2**20:.1f} MiB."
        )
    return (
        f"{said}\nBlocks of {t['block_size']}; a scale is set by one element if without it it "
        f"would be at least {2 ** t['drop']} times smaller; position: where in a row the largest "
        "|x| is, and by how much it is above the median position."
    )


def figures_of(inspection: Inspection, block_size: int) -> dict[str, Any]:
    """The figures, by name: surface, channels, blocks; scales, codes, sqnr of a quantized model."""
    from duquantpp_jax.analysis import figures

    results, (name, tokens) = inspection.results, inspection.tokens
    sites = dict.fromkeys(one["site"] for one in results["sites"])
    made = {
        "surface": figures.surface(
            {SEEN[seen]: x for seen, x in tokens.items()}, log2=True, title=f"input of {name}"
        )
    }
    for seen, moments in inspection.moments.items():
        maxima = {site: _padded(moments[site].absmax, block_size) for site in sites}
        end = "" if seen == "input" else f"_{seen}"
        made[f"channels{end}"] = figures.amax_map(
            {site: moments[site].absmax for site in sites}, title=SEEN[seen]
        )
        made[f"blocks{end}"] = figures.amax_map(maxima, block_size=block_size, title=SEEN[seen])
    if inspection.stored is not None:
        scales, codes = inspection.stored
        made["scales"] = figures.scale_exponents({"weights": scales})
        made["codes"] = figures.code_occupancy({"weights": codes})
    if inspection.sqnr is not None:
        made["sqnr"] = figures.sqnr({results["quantized"]["recipe"]: inspection.sqnr})
    return made


def _padded(absmax: np.ndarray, block_size: int) -> np.ndarray:
    return np.pad(absmax, ((0, 0), (0, -absmax.shape[-1] % block_size)))


def run(options: InspectOptions) -> int:
    """Runs the command and prints what it found; the exit code."""
    from duquantpp_jax.analysis import figures

    files.check_writable(options.out)
    with progress_bar() as progress:
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
    return 0
