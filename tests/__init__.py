"""While tests run, jaxtyping checks the signatures and dataclasses that name the shape of an array.

All others, of names and paths and counts, are pyright's alone: checked at each call as well, they
would take a tenth of the time of the tests. A function's check is made when it is first called.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jaxtyping


def _where_shapes_are(jaxtyped: Callable[..., Any]) -> Callable[..., Any]:
    """jaxtyping's decorator, which leaves alone what has no shape in its annotations."""

    def decorator(**options: Any) -> Callable[[Any], Any]:
        check = jaxtyped(**options)

        def decorated(given: Any) -> Any:
            if dataclasses.is_dataclass(given):
                annotations = [field.type for field in dataclasses.fields(given)]
                return check(given) if _has_shapes(annotations) else given
            if not inspect.isfunction(given):
                return check(given)
            if not _has_shapes(given.__annotations__.values()):
                return given
            return _when_called(given, check)

        return decorated

    return decorator


def _when_called(function: Callable[..., Any], check: Callable[..., Any]) -> Callable[..., Any]:
    """The function as `check` makes it, once it is called."""
    checked = functools.cache(lambda: check(function))

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        return checked()(*arguments, **options)

    return call


def _has_shapes(annotations: Any) -> bool:
    """Whether jaxtyping's types are among them; some modules have annotations as text."""
    return any(
        "Array" in each if isinstance(each, str) else "jaxtyping" in repr(each)
        for each in annotations
    )


jaxtyping.jaxtyped = _where_shapes_are(jaxtyping.jaxtyped)
