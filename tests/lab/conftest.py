"""A tiny model's cells, and a grid of them that has run."""

import os

import pytest

from duquantpp_jax.evaluation.rows import TARGETS
from duquantpp_jax.lab import Cell, run

TOKENS = 8 * TARGETS
"""Two batches of four rows: one shape to compile."""


@pytest.fixture(scope="session")
def tiny(tiny_directory, tiny_text):
    """Makes cells on the tiny model."""

    def cell(recipe, rule="floor", **fields):
        given = {"tokens": TOKENS, "calibration_tokens": 8 * TARGETS, "batch_rows": 4} | fields
        texts = {"text": tiny_text, "calibration_text": tiny_text}
        return Cell(recipe, rule, model=tiny_directory, **texts, **given)

    return cell


@pytest.fixture(scope="session")
def ran(tiny, tmp_path_factory):
    """A grid that has run, where, and what it gave; pytest's workers measure each cell once."""
    own = tmp_path_factory.getbasetemp()
    out = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "ran"
    grid = [
        tiny("block_hadamard"),
        tiny("block_hadamard", "even"),
        tiny("random_hadamard", seed=1),
    ]
    return grid, out, run(grid, out)
