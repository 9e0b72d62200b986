"""The errors that experiments/mutants.py plants."""

from experiments.planted import elsewhere, formats
from experiments.planted.mutant import Mutant

MUTANTS: tuple[Mutant, ...] = (*formats.MUTANTS, *elsewhere.MUTANTS)
