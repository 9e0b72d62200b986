"""Row sums against their equations in float64, in any batches and on any number of devices."""

import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from duquantpp_jax.evaluation import predict as perplexity
from duquantpp_jax.evaluation.predict import Predictor, row_sums
from duquantpp_jax.models import dense
from duquantpp_jax.ptq import stores as cache
from tests.conftest import tiny_decoder

PROGRAM = pathlib.Path(__file__).with_name("sharded.py")
ROWS, LENGTH = 5, 24


@pytest.fixture(scope="module")
def predictor():
    return Predictor(tiny_decoder(), dense)


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, 257, (ROWS, LENGTH)).astype(np.int32)


@pytest.fixture(scope="module")
def coarse(predictor):
    return predictor._replace(store=cache.store("bf16", 16))


@pytest.fixture(scope="module")
def sums(predictor, coarse, tokens):
    return row_sums(coarse, predictor, tokens)


def test_row_sums_are_the_equations(sums, predictor, coarse, tokens):
    logs = []
    for one in (predictor, coarse):
        logits, _ = jax.jit(lambda m, t, s=one.store: m(t, store=s))(one.model, tokens[:, :-1])
        logits = np.asarray(logits, np.float64)
        logs.append(logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True)))
    log_p, log_q = logs
    for log, found in ((log_q, sums.nll), (log_p, sums.reference_nll)):
        nll = -np.take_along_axis(log, tokens[:, 1:, None], axis=-1).sum(axis=(1, 2))
        np.testing.assert_allclose(found, nll, rtol=1e-6)
    # float32 sums of 257 terms p (log p - log q), the logs good to 2^-22: 23 targets of 3e-7 each
    kl = (np.exp(log_p) * (log_p - log_q)).sum(axis=(1, 2))
    np.testing.assert_allclose(sums.kl, kl, atol=7e-6)
    assert (kl > 1e-4).all()
    same = (log_p.argmax(axis=-1) == log_q.argmax(axis=-1)).sum(axis=1)
    np.testing.assert_array_equal(sums.agreement, same)


def test_a_model_does_not_diverge_from_itself(predictor, tokens):
    same = row_sums(predictor, predictor, tokens)
    np.testing.assert_allclose(same.kl, 0, atol=7e-6)
    np.testing.assert_array_equal(same.agreement, LENGTH - 1)
    np.testing.assert_array_equal(same.nll, same.reference_nll)


def test_without_a_reference_there_is_nothing_but_nll(sums, coarse, tokens):
    alone = row_sums(coarse, None, tokens)
    np.testing.assert_allclose(alone.nll, sums.nll, rtol=1e-6)
    assert alone[1:] == (None, None, None)


def test_rows_do_not_depend_on_the_batch_and_progress_counts_them(
    sums, predictor, coarse, tokens, monkeypatch
):
    monkeypatch.setattr(perplexity, "MOST_ROWS", 2)
    calls = []
    few = row_sums(coarse, predictor, tokens, progress=lambda *done: calls.append(done))
    assert calls == [(2, 5), (4, 5), (5, 5)]
    for one, other in zip(few, sums, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=7e-6)


def test_a_large_vocabulary_runs_one_row_at_a_time(predictor, tokens, monkeypatch):
    monkeypatch.setattr(perplexity, "LARGEST_LOGITS", LENGTH * 257)
    calls = []
    row_sums(predictor, None, tokens[:2], progress=lambda *done: calls.append(done))
    assert calls == [(1, 2), (2, 2)]


@pytest.mark.slow
def test_eight_devices_agree_with_one():
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, PROGRAM], capture_output=True, text=True, env=environment, timeout=240
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["8", "devices", "agree"]
