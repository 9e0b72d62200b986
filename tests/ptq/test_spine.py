"""One spine: a cell of the laboratory measures, bit for bit, what `quantize` writes."""

import dataclasses

import jax
import numpy as np
import pytest

from duquantpp_jax.checkpoints import load_any, sha256, testbed
from duquantpp_jax.checkpoints.fits import save_fits
from duquantpp_jax.checkpoints.lazy import Checkpoint
from duquantpp_jax.commands.quantize import QuantizeOptions, quantize
from duquantpp_jax.core import MXArray, Needs
from duquantpp_jax.evaluation.predict import Predictor, Reference
from duquantpp_jax.evaluation.rows import TARGETS
from duquantpp_jax.lab.bench import Bench
from duquantpp_jax.lab.cells import Cell
from duquantpp_jax.models import SITES
from duquantpp_jax.ptq.calibration import calibrate
from duquantpp_jax.ptq.plan import Plan
from duquantpp_jax.ptq.walk import fit_decoder, quantize_decoder

ROWS = 2
TURNED = {"rotate_stream": "random_hadamard", "rotate_values": "random_orthogonal", "fuse": True}
QUICK = (("fits", "asymmetric", {}), ("smooth_hadamard", "gptq", TURNED))
RECIPES = ("fits", "rtn", "block_hadamard", "random_hadamard", "smooth_hadamard", "duquantpp",
           "zigzag_hadamard", "wush", "learned_affine")  # fmt: skip
ALL = [(name, rounding, {}) for name in RECIPES for rounding in ("rtn", "gptq")]
"""What is measured here: recipes, or fits that are given, roundings and what else is asked for."""


@pytest.fixture(scope="module")
def bench():
    return Bench()


@pytest.fixture(scope="module")
def subject():
    """The float model, calibration inputs, and Stats that hold more than any one recipe needs."""
    model, rows = testbed.load(), testbed.calibration_rows()[:ROWS, :-1]
    widths = Plan.of(model.config, Cell("rtn").method()).widths(0)
    return model, rows, calibrate(model, rows, widths, needs=Needs.GRAM | Needs.POSITIONS)


@pytest.fixture(scope="module")
def given(subject, tmp_path_factory):
    """Fits in a directory, as `learn` writes them: a transform and weights that were moved."""
    model, _, stats = subject
    fits = fit_decoder(Plan.of(model.config, Cell("block_hadamard").method()), model, stats)
    fits = {s: dataclasses.replace(f, weights=tuple(1.01 * w for w in model.weights(s)))
            for s, f in fits.items()}  # fmt: skip
    about = {"model": {"name": "testbed", "sha256": sha256(testbed.directory())}}
    about |= {"formats": {"weight": "mxfp4:floor", "activation": "mxfp4:floor"}}
    place = tmp_path_factory.mktemp("learned") / "fits"
    save_fits(place, fits, about)
    return place


def cell_of(name, rounding, more):
    return Cell(name, rounding=rounding, seed=3, tokens=2 * TARGETS,
                calibration_tokens=ROWS * TARGETS, **more)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "rounding", "more"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in ALL if case not in QUICK)],
)
def test_a_cell_measures_what_quantize_writes(
    name, rounding, more, bench, subject, given, tmp_path
):
    model, rows, stats = subject
    recipe = None if name == "fits" else name
    out, of_both = tmp_path / "quantized", {"fits": given if recipe is None else None} | more
    quantize(QuantizeOptions(recipe=recipe, rounding=rounding, rows=ROWS, seed=3, out=out,
                             **of_both))  # fmt: skip
    decoder, linear, written = load_any(out)

    cell = cell_of(name, rounding, of_both)
    fits, seen = bench.fitted(cell)
    start = Checkpoint(testbed.directory(), cell.turn).decoder() if more else model
    plan = Plan.of(start.config, cell.method(), seed=3, fuse=cell.fuse)
    plan = dataclasses.replace(plan, fits=fits)
    predictor = Predictor(*quantize_decoder(plan, start, rows, stats=seen if more else stats))
    for site in SITES:
        for a, b in zip(written[site].weights, predictor.state[site].weights, strict=True):
            assert isinstance(a, MXArray)
            np.testing.assert_array_equal(a.codes(), b.codes())
            np.testing.assert_array_equal(a.scale_bytes(), b.scale_bytes())
        moved = (jax.tree.leaves(state[site].transform) for state in (written, predictor.state))
        for a, b in zip(*moved, strict=True):
            np.testing.assert_array_equal(a, b)
    floats = predictor.model.parameters()
    for name, array in decoder.parameters().items():
        if array.size:  # the weights of linears are in the state
            np.testing.assert_array_equal(array, floats[name])

    tokens = testbed.evaluation_rows()[:2]
    found = Reference(Predictor(model), tokens).row_sums(Predictor(decoder, linear, written))
    np.testing.assert_allclose(found.kl, bench.run(cell).kl, rtol=0, atol=1e-6 * TARGETS)


def test_a_cell_of_some_linears_measures_what_quantize_writes(bench, subject, tmp_path):
    out, some = tmp_path / "quantized", {"include": ("*.q_proj", "model.layers.1.mlp.*")}
    quantize(QuantizeOptions(recipe="wush", rows=ROWS, seed=3, out=out, **some))
    tokens = testbed.evaluation_rows()[:2]
    found = Reference(Predictor(subject[0]), tokens).row_sums(Predictor(*load_any(out)))
    measured = bench.run(cell_of("wush", "rtn", some)).kl
    np.testing.assert_allclose(found.kl, measured, rtol=0, atol=1e-6 * TARGETS)
