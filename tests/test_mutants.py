"""The errors that experiments/mutants.py plants can still be planted."""

import pathlib

import duquantpp_jax
from experiments.planted import MUTANTS

PACKAGE = pathlib.Path(duquantpp_jax.__file__).parent
TESTS = pathlib.Path(__file__).parent


def test_every_mutant_changes_one_place_of_the_package():
    assert len({m.name for m in MUTANTS}) == len(MUTANTS) >= 100
    for mutant in MUTANTS:
        text = (PACKAGE / mutant.file).read_text(encoding="utf-8")
        assert text.count(mutant.right) == 1, mutant.name
        assert mutant.wrong != mutant.right
        for name in mutant.tests.split():
            assert (TESTS / f"{name}.py").exists(), name
