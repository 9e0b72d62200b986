"""`duquantpp recipes`: what can be named, from the registry and the docstrings of what it names.

A line is the first sentence of the class's docstring, with the settings that are not its defaults.
The cost is what the value declares: `needs` and `draws` of a fit or a rounding, the stored bits of
a format. Sources are those of its class or else of its file, and of the parts that it is made of.
"""

import dataclasses
import inspect
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console

from duquantpp_jax.commands.options import RecipesOptions
from duquantpp_jax.core import Format, Needs
from duquantpp_jax.lab.table import empty
from duquantpp_jax.ptq.estimate import block_bytes
from duquantpp_jax.recipes import FITS, FORMATS, ROUNDINGS, RULES, SHARED

KINDS: dict[str, Mapping[str, Any]] = {
    "recipes": FITS,
    "roundings": ROUNDINGS,
    "formats": FORMATS,
}
CALIBRATION = {
    Needs.GRAM: "Gram matrix of the inputs",
    Needs.POSITIONS: "mean at each position",
    Needs.CROSS: "Gram matrix with the float path's inputs",
    Needs.FORMATS: "fitted anew for each pair of formats",
}
"""What calibration does more for each need."""


def listing() -> dict[str, list[dict[str, str]]]:
    """Of each kind the names, each with its line, its cost and its source."""
    return {
        kind: [
            {"name": name, "line": line(value), "cost": cost(value), "source": source(value)}
            for name, value in values.items()
        ]
        for kind, values in KINDS.items()
    }


def line(value: Any) -> str:
    """What a fit, a rounding or a format does, in a sentence; of fits in turn, in one for each."""
    said = []
    for part in _in_turn(value):
        first = " ".join(inspect.getdoc(type(part)).split("\n\n")[0].split())  # pyright: ignore
        settings = _settings(part)
        said.append(f"{first.rstrip('.')} ({settings})." if settings else first)
    return " ".join(said)


def cost(value: Any) -> str:
    """What a value declares that it costs."""
    if isinstance(value, Format):
        return f"{bits(value):g} bits a number"
    said = [text for need, text in CALIBRATION.items() if need in value.needs]
    steps = [f"{part.steps} steps" for part in _in_turn(value) if hasattr(part, "steps")]
    said += [" and ".join(steps)] if steps else []
    if getattr(value, "draws", False):
        said.append("random: give several --seeds")
    return "; ".join(said) or "at most a sample of the inputs"


def bits(format: Format) -> float:
    """Stored bits of a number, scales with it; a scale of the whole tensor is left out."""
    if not format.holds_weights:
        return 16.0  # what it leaves in bfloat16
    return 8 * block_bytes(format)[0] / format.block_size


def source(value: Any) -> str:
    """The sources that the docstrings of the value and of its parts name."""
    parts = (part for fit in _in_turn(value) for part in _parts(fit))
    found = (_source(type(part)) for part in parts)
    return "; ".join(dict.fromkeys(text for text in found if text))


def _source(kind: type) -> str:
    for text in (inspect.getdoc(kind), sys.modules[kind.__module__].__doc__):
        if stated := re.search(r"^Sources?: (.*?)(?:\.\s*)?(?:\n\n|\Z)", text or "", re.M | re.S):
            return " ".join(stated[1].split())
    return ""


def _in_turn(value: Any) -> tuple[Any, ...]:
    """The fits that a fit composes, else the value alone."""
    return getattr(value, "fits", (value,))


def _parts(value: Any) -> Iterator[Any]:
    yield value
    for _, given in _given(value):
        if _composed(given):
            yield from _parts(given)


def _settings(value: Any) -> str:
    return ", ".join(f"{name}={_shown(given)}" for name, given in _given(value))


def _shown(given: Any) -> str:
    return f"{type(given).__name__}({_settings(given)})" if _composed(given) else repr(given)


def _composed(given: Any) -> bool:
    """Whether this is a dataclass that is shown by its fields, and not by a name, as elements."""
    return dataclasses.is_dataclass(given) and repr(given).startswith(f"{type(given).__name__}(")


def _given(value: Any) -> Iterator[tuple[str, Any]]:
    """Names and values of the fields that are not at their defaults."""
    for field in dataclasses.fields(value):
        given, default = getattr(value, field.name), field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if given != default:
            yield field.name, given


def run(options: RecipesOptions) -> int:
    """Prints the lists; returns the exit code."""
    found = listing()
    options.terminal.give(found, lambda: _show(found))
    return 0


def _show(found: Mapping[str, Sequence[Mapping[str, str]]]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 160)
    for kind, rows in found.items():
        shown = empty(kind, right=())
        for heading in ("what", "cost", "source"):
            shown.add_column(heading, overflow="fold")
        for row in rows:
            shown.add_row(*row.values())
        console.print(shown, highlight=False)
    print(f"MX formats take a scale rule, as in mxfp4:even, of {', '.join(RULES)}.")
    print(f"RECIPE{SHARED} has one matrix for all blocks; module:NAME names what is your own.")
