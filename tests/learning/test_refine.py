"""Refining: the transform learns for weights as they were rounded, alike in a cell and on disk."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duquantpp_jax.checkpoints import load, load_any, sha256
from duquantpp_jax.checkpoints.fits import load_fits, save_fits
from duquantpp_jax.commands import quantize as command
from duquantpp_jax.commands.quantize import QuantizeOptions, quantize
from duquantpp_jax.evaluation.predict import Predictor, Reference
from duquantpp_jax.evaluation.rows import TARGETS
from duquantpp_jax.evaluation.subject import load_rows
from duquantpp_jax.files import read_json
from duquantpp_jax.lab.bench import Bench
from duquantpp_jax.lab.cells import Cell
from duquantpp_jax.learning.refine import refine, refitted
from duquantpp_jax.ptq.calibration import calibrate
from duquantpp_jax.ptq.plan import Plan
from duquantpp_jax.ptq.walk import fit_decoder, quantize_decoder
from duquantpp_jax.recipes import recipe


class Killed(Exception):
    """Stands for whatever ends a run."""


@pytest.fixture(scope="module")
def clipped(tiny_directory, tiny_text, tmp_path_factory):
    """Fits that hold a clip and a scale offset of each block, and the rows they were made from."""
    rows = load_rows(tiny_directory, tiny_text, 2 * TARGETS, "calibration").tokens[:, :-1]
    model, out = load(tiny_directory), tmp_path_factory.mktemp("fits") / "fits"
    plan = Plan.of(model.config, recipe("smooth_hadamard"))
    fits = fit_decoder(plan, model, calibrate(model, rows, plan.widths(0)))
    for site, fitted in fits.items():
        blocks = 2, plan.widths(0)[site] // 32
        fits[site] = dataclasses.replace(fitted, clip=jnp.full(blocks, 0.9, jnp.float32),
                                         scale_offset=jnp.zeros(blocks, jnp.int32))  # fmt: skip
    about = {"model": {"name": "tiny", "sha256": sha256(tiny_directory)}}
    about |= {"formats": {"weight": "mxfp4:floor", "activation": "mxfp4:floor"}}
    save_fits(out, fits, about)
    return out, rows


@pytest.mark.slow
def test_a_refined_cell_measures_what_quantize_refine_writes_killed_and_resumed(
    tiny_directory, tiny_text, tmp_path, monkeypatch, clipped
):
    """And it makes good what rounding has done, and keeps clips and scale offsets."""
    fits, rows = clipped
    options = QuantizeOptions(model=tiny_directory, fits=fits, rows=2, refine=3,
                              calibration_text=tiny_text, out=tmp_path / "out")  # fmt: skip

    def killing(what, *_):
        if what.startswith("refining"):
            raise Killed

    with pytest.raises(Killed):
        quantize(options, killing)
    write = command.write_refined

    def writing(path, sites):
        if "00001" in path.name:
            raise Killed
        write(path, sites)

    monkeypatch.setattr(command, "write_refined", writing)
    with pytest.raises(Killed):
        quantize(options)
    monkeypatch.setattr(command, "write_refined", write)
    report = quantize(options)
    assert report["job"]["refine"] == 3
    assert not list(options.out.glob("refine*"))
    assert read_json(options.out / "report.json")["linears"][0]["online_multiply_adds"] >= 32

    model, state = load(tiny_directory), load_any(options.out)
    calibration = {"calibration_text": tiny_text, "calibration_tokens": 2 * TARGETS}
    given = {"model": tiny_directory, "text": tiny_text, "tokens": TARGETS} | calibration
    cell = Cell("clipped", fits=fits, refine=3, **given)
    plan = Plan.of(model.config, cell.method(), fits=load_fits(fits, sha256(tiny_directory))[0])
    plain = quantize_decoder(plan, model, rows)[2]
    losses = []
    found = refine(plan, model, plain, rows, 3, callback=lambda *said: losses.append(said))
    refined = refitted(plain, found)
    for site, quantized in refined.items():
        for a, b in zip(*map(jax.tree.leaves, (quantized, state[2][site])), strict=True):
            np.testing.assert_array_equal(a, b)
        assert quantized.weights == plain[site].weights
        assert 0 < np.abs(quantized.clip - 0.9).max() < 0.1
        assert quantized.scale_offset.shape == plain[site].scale_offset.shape
    evaluated = load_rows(tiny_directory, tiny_text, TARGETS, "evaluation").tokens
    found = Reference(Predictor(model), evaluated)
    kl = found.row_sums(Predictor(*state)).kl
    np.testing.assert_allclose(kl, Bench().run(cell).sums.kl, rtol=0, atol=1e-6 * TARGETS)
    assert cell.row == "clipped, refined 3 steps"

    held_out = Reference(Predictor(model), rows[-1:])
    before, after = (
        held_out.row_sums(Predictor(model, plan.linear, sites)).kl.sum() / (TARGETS - 1)
        for sites in (plain, refined)
    )
    ((_, numbers),) = losses
    loss = numbers["held_out_loss"]
    assert loss < before
    assert after == pytest.approx(loss, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"fuse": True}, "leave out --fuse"),
        ({"exclude": ("*.mlp.*",)}, "leave out"),
        ({"recipe": "full_hadamard"}, "not made of matrices of side 32"),
        ({"activation_formats": ("bf16",)}, "not bf16"),
        ({"activation_formats": ("mlp_in=mxfp6",)}, "one format for the activations"),
        ({"rows": 1}, "at least two rows"),
        ({"refine": -1}, "--refine -1"),
    ],
)
def test_what_cannot_be_refined_is_refused_in_a_line(
    tiny_directory, tiny_text, tmp_path, changes, says
):
    given = {"model": tiny_directory, "calibration_text": tiny_text, "rows": 2, "refine": 1}
    with pytest.raises(ValueError, match=says):
        quantize(QuantizeOptions(out=tmp_path / "out", **given | changes))
