"""Where a grid finds what `duquantpp learn` wrote: directories of --data, by their names."""

from collections.abc import Iterable
from pathlib import Path


def fits_in(data: Path | None, names: Iterable[str]) -> dict[str, Path]:
    """Those of the names that are directories of `data`; none without it.

    Raises:
      ValueError: It is no directory, or has none of the names.
    """
    if data is None:
        return {}
    names = list(names)
    if not data.is_dir():
        raise ValueError(f"--data {data} is no directory: give that which holds the fits")
    found = {name: data / name for name in names if (data / name).is_dir()}
    if not found:
        raise ValueError(f"--data {data} has no fits of this grid: call them {', '.join(names)}")
    return found
