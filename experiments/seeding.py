"""Which fits draw random numbers: their cells run with three seeds, the others' with one."""

import dataclasses
from collections.abc import Iterator

from duquantpp_jax.core import Fit
from duquantpp_jax.lab import Cell
from duquantpp_jax.recipes import find_fit
from duquantpp_jax.transforms.basic import FitInTurn
from duquantpp_jax.transforms.duquant import FitDuquantpp
from duquantpp_jax.transforms.haar import FitHaar
from duquantpp_jax.transforms.hadamard import FitHadamard
from duquantpp_jax.transforms.permutation import FitPermutation

SEEDS = (0, 1, 2)


def draws(fit: Fit) -> bool:
    """Whether the fit draws random numbers; one that this file does not know says so itself."""
    match fit:
        case FitInTurn():
            return any(draws(one) for one in fit.fits)
        case FitHadamard():
            return fit.random_signs
        case FitPermutation():
            return fit.kind == "random"
        case FitDuquantpp() | FitHaar():
            return True
    return getattr(fit, "draws", False)


def seeded(cell: Cell) -> Iterator[Cell]:
    """The cell, once for each seed that its fit has a use for."""
    for seed in SEEDS if draws(cell.fit or find_fit(cell.recipe)) else SEEDS[:1]:
        yield dataclasses.replace(cell, seed=seed)
