"""Reads fields of a parsed config.json; ValueError names a wrong one and what would be right."""

import difflib
import math
from collections.abc import Mapping
from typing import Any

REQUIRED: Any = object()
"""The default of a field that must be present."""


def field(
    fields: Mapping[str, Any], name: str, default: Any = REQUIRED, right: str = "a number above 0"
) -> Any:
    """The value of a field, which must be `right`; the default where it is missing or null."""
    value = fields.get(name)
    if value is not None:
        return value
    if default is not REQUIRED:
        return default
    near = difflib.get_close_matches(name, [f for f in fields if isinstance(f, str)], 1, 0.85)
    hint = f" (found {short(near[0])})" if near and near[0] != name else ""
    state = "null" if name in fields else "missing"
    raise ValueError(f"config.json: {name} is {state}{hint}: it must be {right}")


def wrong(name: str, value: Any, right: str) -> ValueError:
    """The error for a field whose value must be `right`."""
    return ValueError(f"config.json: {name} = {short(value)} is out of place: it must be {right}")


def integer(
    fields: Mapping[str, Any], name: str, default: Any = REQUIRED, below: int = 2**31
) -> int:
    """An integer above 0."""
    value = field(fields, name, default)
    if type(value) is not int or not 0 < value < below:
        raise wrong(name, value, f"an integer above 0 and below {below}")
    return value


def positive(fields: Mapping[str, Any], name: str, default: Any = REQUIRED) -> float:
    """A finite number above 0."""
    value = field(fields, name, default)
    if type(value) not in (int, float) or not (math.isfinite(value) and value > 0):
        raise wrong(name, value, "a finite number above 0")
    return float(value)


def boolean(fields: Mapping[str, Any], name: str, default: Any = REQUIRED) -> bool:
    """A truth value."""
    value = field(fields, name, default, right := "true or false")
    if type(value) is not bool:
        raise wrong(name, value, right)
    return value


def token(value: Any, name: str, vocab_size: int) -> int | None:
    """A token id, or null."""
    if value is None or (type(value) is int and 0 <= value < vocab_size):
        return value
    raise wrong(name, value, f"null or a token id below vocab_size {vocab_size}")


def stop_tokens(value: Any, name: str, vocab_size: int) -> int | tuple[int, ...] | None:
    """A token id, null, or a list of token ids, as in Llama 3."""
    if not isinstance(value, list):
        return token(value, name, vocab_size)
    return tuple(i for i in (token(v, name, vocab_size) for v in value) if i is not None)


def short(value: Any) -> str:
    """A value for a message: one line, at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
