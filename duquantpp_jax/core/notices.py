"""Warnings, notes and errors, that name the place in the model that they are about.

    with about("model.layers.3.mlp_in"):
        fit(...)          # "model.layers.3.mlp_in: WUSH: damping raised from ..."

A fit sees one input and knows no names; who calls it does.
"""

import contextlib
import contextvars
import logging
from collections.abc import Iterator

LOG = logging.getLogger("duquantpp_jax")
"""Where all warnings of the package go."""
_PLACE = contextvars.ContextVar("_PLACE", default="")


class NotFinite(ValueError):
    """Numbers of a model on given rows are NaN or Inf, and will be whenever it runs on them."""


@contextlib.contextmanager
def about(place: str) -> Iterator[None]:
    """Within the block, what is said or raised (ValueError) begins with the place, after those
    around it."""
    token = _PLACE.set(f"{_PLACE.get()}{place}: ")
    try:
        yield
    except NotFinite as error:
        raise NotFinite(f"{place}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    finally:
        _PLACE.reset(token)


def warn(said: str, *numbers: object) -> None:
    """Warns, as `logging` does, in a line that begins with the place."""
    LOG.warning("%s" + said, _PLACE.get(), *numbers)


def inform(said: str, *numbers: object) -> None:
    """The same at the level INFO, of what was asked for: shown where `logging` is told to."""
    LOG.info("%s" + said, _PLACE.get(), *numbers)
