"""Cells whose fit draws random numbers run with three seeds, the others with one."""

import dataclasses
from collections.abc import Iterator

from duquantpp_jax.lab import Cell

SEEDS = (0, 1, 2)


def seeded(cell: Cell) -> Iterator[Cell]:
    """The cell once for each seed: three seeds if its fit draws random numbers, else one."""
    for seed in SEEDS if cell.draws else SEEDS[:1]:
        yield dataclasses.replace(cell, seed=seed)
