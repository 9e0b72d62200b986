"""Refining: the transform learns for weights as they were rounded, alike in a cell and on disk."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duquantpp_jax.checkpoints import load, load_any, testbed
from duquantpp_jax.checkpoints.shards import read_json
from duquantpp_jax.commands import quantize as command
from duquantpp_jax.commands.quantize import QuantizeOptions, quantize
from duquantpp_jax.evaluation.predict import Predictor, Reference
from duquantpp_jax.evaluation.rows import TARGETS
from duquantpp_jax.evaluation.subject import load_rows
from duquantpp_jax.lab.bench import Bench
from duquantpp_jax.lab.cells import Cell
from duquantpp_jax.learning.refine import refine, refitted
from duquantpp_jax.ptq.calibration import calibrate
from duquantpp_jax.ptq.plan import Plan
from duquantpp_jax.ptq.walk import fit_decoder, quantize_decoder
from duquantpp_jax.recipes import recipe


class Killed(Exception):
    """Stands for whatever ends a run."""


def test_a_refined_cell_measures_what_quantize_refine_writes_killed_and_resumed(
    tiny_directory, tiny_text, tmp_path, monkeypatch
):
    options = QuantizeOptions(model=tiny_directory, recipe="smooth_hadamard", rows=4, refine=3,
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
    cell = Cell("smooth_hadamard", model=tiny_directory, text=tiny_text, refine=3, tokens=TARGETS,
                calibration_text=tiny_text, calibration_tokens=4 * TARGETS)  # fmt: skip
    rows = load_rows(tiny_directory, tiny_text, 4 * TARGETS, "calibration").tokens[:, :-1]
    plan = Plan.of(model.config, cell.method())
    plain = quantize_decoder(plan, model, rows)[2]
    refined = refitted(plain, refine(plan, model, plain, rows, 3))
    for site, quantized in refined.items():
        for a, b in zip(*map(jax.tree.leaves, (quantized, state[2][site])), strict=True):
            np.testing.assert_array_equal(a, b)
        assert quantized.weights == plain[site].weights
    found = Reference(
        Predictor(model), load_rows(tiny_directory, tiny_text, TARGETS, "evaluation").tokens
    )
    kl = found.row_sums(Predictor(*state)).kl
    np.testing.assert_allclose(kl, Bench().run(cell).sums.kl, rtol=0, atol=1e-6 * TARGETS)
    assert cell.row == "smooth_hadamard, refined 3 steps"


@pytest.mark.slow
def test_it_makes_good_what_rounding_has_done_and_keeps_clips_and_scale_offsets():
    model, rows = load(testbed.directory()), testbed.calibration_rows()[:20, :64]
    plan = Plan.of(model.config, recipe("block_hadamard", "floor"))
    calibration = rows[:16, :-1]
    fits = fit_decoder(plan, model, calibrate(model, calibration, plan.widths(0)))
    blocks = {site: fitted.transform.links[1].matrices.shape[:2] for site, fitted in fits.items()}
    fits = {
        site: dataclasses.replace(fitted, clip=jnp.full(blocks[site], 0.9, jnp.float32),
                                  scale_offset=jnp.zeros(blocks[site], jnp.int32))
        for site, fitted in fits.items()
    }  # fmt: skip
    state = quantize_decoder(dataclasses.replace(plan, fits=fits), model, calibration)[2]
    losses = []
    fits = refine(
        plan, model, state, rows, 8, check_every=4, report=lambda *said: losses.append(said)
    )
    refined = refitted(state, fits)
    reference = Reference(Predictor(model), rows[-2:])

    def kl(state):
        return reference.row_sums(Predictor(model, plan.linear, state)).kl.sum() / (2 * 63)

    best = min(loss for _, _, loss in losses)
    assert best < kl(state)
    assert kl(refined) == pytest.approx(best, rel=0.05)
    for site, quantized in refined.items():
        assert quantized.weights == state[site].weights
        assert 0 < np.abs(quantized.clip - 0.9).max() < 0.1


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
