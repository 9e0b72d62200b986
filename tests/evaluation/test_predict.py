"""Row sums against their equations in float64, in any batches and on any number of devices."""

import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

import duquantpp_jax
from duquantpp_jax.evaluation import predict
from duquantpp_jax.evaluation.predict import Reference
from tests.evaluation.conftest import LENGTH, ROWS

PACKAGE = pathlib.Path(duquantpp_jax.__file__).parent
PROGRAM = pathlib.Path(__file__).with_name("sharded.py")


@pytest.fixture(scope="module")
def sums(predictor, quantized, tokens):
    return Reference(predictor, tokens).row_sums(quantized)


def test_row_sums_are_the_equations(sums, predictor, quantized, tokens):
    logs = []
    for each in (predictor, quantized):
        logits, _ = jax.jit(lambda p, t: p.model(t, p.linear, p.state))(each, tokens[:, :-1])
        logits = np.asarray(logits, np.float64)
        logs.append(logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True)))
    log_p, log_q = logs
    for log, found in ((log_q, sums.nll), (log_p, sums.reference_nll)):
        nll = -np.take_along_axis(log, tokens[:, 1:, None], axis=-1).sum(axis=(1, 2))
        np.testing.assert_allclose(found, nll, rtol=1e-6)
    # float32 sums of 257 terms p (log p - log q), the logs good to 2^-22: 23 targets of 3e-7 each
    kl = (np.exp(log_p) * (log_p - log_q)).sum(axis=(1, 2))
    np.testing.assert_allclose(sums.kl, kl, rtol=1e-5, atol=7e-6)
    assert (kl > 1e-2).all()
    same = (log_p.argmax(axis=-1) == log_q.argmax(axis=-1)).sum(axis=1)
    np.testing.assert_array_equal(sums.agreement, same)
    assert (same < LENGTH - 1).any()


def test_a_model_does_not_diverge_from_itself(predictor, tokens):
    same = Reference(predictor, tokens).row_sums(predictor)
    np.testing.assert_allclose(same.kl, 0, atol=7e-6)
    np.testing.assert_array_equal(same.agreement, LENGTH - 1)
    np.testing.assert_array_equal(same.nll, same.reference_nll)


def test_a_model_alone_has_the_nll_that_it_has_beside_another(sums, predictor, quantized, tokens):
    np.testing.assert_array_equal(Reference(predictor, tokens).nll(), sums.reference_nll)
    np.testing.assert_allclose(Reference(quantized, tokens).nll(), sums.nll, rtol=1e-6)


def test_rows_do_not_depend_on_the_batch_and_progress_counts_them(
    sums, predictor, quantized, tokens
):
    calls = []
    reference = Reference(predictor, tokens, batch_rows=2)
    few = reference.row_sums(quantized, lambda *done: calls.append(done))
    assert calls == [(2, 5), (4, 5), (5, 5)]
    np.testing.assert_allclose(few.reference_nll, sums.reference_nll, rtol=1e-5)
    # At the same places among other rows every bit is the same; in a batch of another size a sum
    # may be taken in another order, and what is near a tie rounds the other way.
    order = [0, 3, 2, 1, 4]
    moved = Reference(predictor, tokens[order], batch_rows=2).row_sums(quantized)
    for values, others in zip(moved, few, strict=True):
        np.testing.assert_array_equal(values, others[order])


@pytest.mark.slow
def test_a_batch_that_is_filled_up_has_the_sums_of_one_that_is_not(predictor, quantize, tokens):
    log256 = quantize("rtn", "log256")  # its scale spans the batch
    filled = Reference(predictor, tokens, batch_rows=2).row_sums(log256)
    alone = Reference(predictor, tokens[2:], batch_rows=1).row_sums(log256)
    np.testing.assert_allclose(filled.kl[4], alone.kl[2], rtol=1e-4)
    others = filled.kl[2:4] / alone.kl[:2]  # a batch of other rows is another result
    assert np.abs(others - 1).max() > 1e-3


def test_a_large_vocabulary_runs_one_row_at_a_time(predictor, tokens, monkeypatch):
    monkeypatch.setattr(predict, "LARGEST_LOGITS", LENGTH * 257)
    assert Reference(predictor, tokens).batch_rows == 1


def test_the_reference_is_computed_once_within_the_bound_and_anew_beyond_it(
    predictor, tokens, monkeypatch
):
    calls, compute = [], predict._predicted

    def counted(predictor, tokens, mesh):
        calls.append(len(tokens))
        return compute(predictor, tokens, mesh=mesh)

    monkeypatch.setattr(predict, "_predicted", counted)
    batch_bytes = 4 * 1 * (LENGTH - 1) * 257
    for batches, wanted in ((ROWS, ROWS), (1, 2 * ROWS - 1), (0, 2 * ROWS)):
        del calls[:]
        reference = Reference(predictor, tokens, batch_rows=1, keep_bytes=batches * batch_bytes)
        first, second = reference.nll(), reference.nll()
        np.testing.assert_array_equal(first, second)
        assert calls == [1] * wanted


@pytest.mark.parametrize(("rows", "batch_rows"), [(0, 16), (5, 0)])
def test_no_rows_are_refused(rows, batch_rows, predictor, tokens):
    with pytest.raises(ValueError, match="give at least one"):
        Reference(predictor, tokens[:rows], batch_rows=batch_rows)


@pytest.mark.parametrize("expression", ["exp(log_p", "log_softmax("])
def test_kl_is_written_down_once(expression):
    places = [
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        for _ in range(path.read_text("utf-8").count(expression))
    ]
    assert places == ["evaluation/predict.py"]


@pytest.mark.slow
def test_eight_devices_agree_with_one():
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, PROGRAM], capture_output=True, text=True, env=environment, timeout=240
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["8", "devices", "agree"]
