"""Which fields of a result docs/results.md does not name."""

from pathlib import Path
from typing import Any

from duquantpp_jax.models import SITES

PAGE = Path(__file__).parents[1] / "docs/results.md"


def fields(value: Any) -> set[str]:
    """The names of all fields of a JSON value, at any depth; sites are values, not fields."""
    if isinstance(value, list):
        return set().union(*map(fields, value))
    if not isinstance(value, dict):
        return set()
    return {*value, *fields([*value.values()])} - set(SITES)


def undocumented(results: Any) -> set[str]:
    """The fields that the page does not name."""
    page = PAGE.read_text(encoding="utf-8")
    return {name for name in fields(results) if f"`{name}`" not in page}
