"""One spine: a cell of the laboratory measures, bit for bit, what `quantize` writes."""

import dataclasses

import jax
import numpy as np
import pytest

from duquantpp_jax import recipes
from duquantpp_jax.checkpoints import load, load_any, sha256
from duquantpp_jax.checkpoints.fits import save_fits
from duquantpp_jax.commands.quantize import QuantizeOptions, quantize
from duquantpp_jax.core import MXArray
from duquantpp_jax.evaluation.predict import Predictor, Reference
from duquantpp_jax.evaluation.rows import TARGETS
from duquantpp_jax.evaluation.subject import load_rows
from duquantpp_jax.lab import bench as lab
from duquantpp_jax.lab.bench import Bench
from duquantpp_jax.lab.cells import Cell
from duquantpp_jax.models import SITES
from duquantpp_jax.ptq.calibration import calibrate
from duquantpp_jax.ptq.plan import Plan
from duquantpp_jax.ptq.walk import fit_decoder

ROWS = 2
TURNED = {"rotate_stream": "random_hadamard", "rotate_values": "random_orthogonal", "fuse": True}
QUICK = (("fits", ("asymmetric",), {}), ("haar", ("rtn",), {"sequential": True}))
RECIPES = ("fits", "rtn", "block_hadamard", "random_hadamard", "smooth_hadamard", "duquantpp",
           "zigzag_hadamard", "wush", "learned_affine")  # fmt: skip
ALL = [(name, (("rtn", "gptq")[number % 2],), {}) for number, name in enumerate(RECIPES)]
ALL += [("smooth_hadamard", ("gptq",), TURNED)]
"""What is measured here: recipes, or fits that are given, roundings and what else is asked for."""


@pytest.fixture(scope="module", autouse=True)
def few_steps():
    learned = dataclasses.replace(recipes.FITS["learned_affine"], steps=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(recipes.FITS, "learned_affine", learned)
        yield


@pytest.fixture(scope="module")
def bench():
    return Bench()


@pytest.fixture(scope="module")
def inputs(tiny_directory, tiny_text):
    """The model and the text of both sides."""
    return {"model": tiny_directory, "calibration_text": tiny_text}


@pytest.fixture(scope="module")
def reference(tiny_directory, tiny_text):
    rows = load_rows(tiny_directory, tiny_text, TARGETS, "evaluation", "text").tokens
    return Reference(Predictor(load(tiny_directory)), rows, keep_bytes=2**30)


@pytest.fixture(scope="module")
def given(tiny_directory, reference, tmp_path_factory):
    """Fits in a directory, as `learn` writes them: a transform and weights that were moved."""
    model = load(tiny_directory)
    plan = Plan.of(model.config, Cell("block_hadamard").method())
    stats = calibrate(model, reference.tokens[:, :-1], plan.widths(0))
    fits = {s: dataclasses.replace(f, weights=tuple(1.01 * w for w in model.weights(s)))
            for s, f in fit_decoder(plan, model, stats).items()}  # fmt: skip
    about = {"model": {"name": "tiny", "sha256": sha256(tiny_directory)}}
    about |= {"formats": {"weight": "mxfp4:floor", "activation": "mxfp4:floor"}}
    place = tmp_path_factory.mktemp("learned") / "fits"
    save_fits(place, fits, about)
    return place


def cell_of(name, rounding, inputs, more):
    return Cell(name, rounding=rounding, seed=3, tokens=TARGETS, text=inputs["calibration_text"],
                calibration_tokens=ROWS * TARGETS, **inputs, **more)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "roundings", "more"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in ALL)],
)
def test_a_cell_measures_what_quantize_writes(
    name, roundings, more, bench, inputs, reference, given, tmp_path, monkeypatch
):
    made = []

    def quantized(*arguments, **options):
        made.append(lab_quantizes(*arguments, **options))
        return made[-1]

    lab_quantizes = lab.quantize_decoder
    monkeypatch.setattr(lab, "quantize_decoder", quantized)
    for rounding in roundings:
        recipe, out = None if name == "fits" else name, tmp_path / rounding
        of_both = {"fits": given if recipe is None else None} | more
        quantize(QuantizeOptions(recipe=recipe, rounding=rounding, rows=ROWS, seed=3, out=out,
                                 **inputs, **of_both))  # fmt: skip
        decoder, linear, written = load_any(out)
        measured = bench.run(cell_of(name, rounding, inputs, of_both)).sums.kl
        model, _, state = made[-1]
        for site in SITES:
            for a, b in zip(written[site].weights, state[site].weights, strict=True):
                assert isinstance(a, MXArray)
                np.testing.assert_array_equal(a.codes(), b.codes())
                np.testing.assert_array_equal(a.scale_bytes(), b.scale_bytes())
            moved = (jax.tree.leaves(found[site].transform) for found in (written, state))
            for a, b in zip(*moved, strict=True):
                np.testing.assert_array_equal(a, b)
        floats = model.parameters()
        for parameter, array in decoder.parameters().items():
            if array.size:  # the weights of linears are in the state
                np.testing.assert_array_equal(array, floats[parameter])
        found = reference.row_sums(Predictor(decoder, linear, written))
        np.testing.assert_allclose(found.kl, measured, rtol=0, atol=1e-6 * TARGETS)
    assert len(made) == len(roundings)


def test_a_cell_of_some_linears_measures_what_quantize_writes(bench, inputs, reference, tmp_path):
    out, some = tmp_path / "quantized", {"include": ("*.q_proj", "model.layers.1.mlp.*")}
    quantize(QuantizeOptions(recipe="wush", rows=ROWS, seed=3, out=out, **inputs, **some))
    found = reference.row_sums(Predictor(*load_any(out)))
    measured = bench.run(cell_of("wush", "rtn", inputs, some)).sums.kl
    np.testing.assert_allclose(found.kl, measured, rtol=0, atol=1e-6 * TARGETS)
