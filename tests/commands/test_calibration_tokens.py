"""Rows to calibrate on, from each of the three places that they come from."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest

from duquantpp_jax.checkpoints import save, sha256
from duquantpp_jax.commands.options.common import MODEL
from duquantpp_jax.commands.quantize import QuantizeOptions, calibration_tokens, quantize
from duquantpp_jax.evaluation.own_text import own_rows
from duquantpp_jax.evaluation.rows import TARGETS
from duquantpp_jax.lab import Cell, bench
from tests.conftest import TEXT, byte_tokenizer, tiny_decoder

BOS = 256


@pytest.fixture
def options(request, tiny_directory, tiny_text):
    """Of a model whose beginning-of-sequence token is 256, or of the one inside the package."""
    if request.param == "embedded":
        return QuantizeOptions(rows=2)
    text = tiny_text if request.param == "text" else None
    return QuantizeOptions(tiny_directory, calibration_text=text, rows=2, seed=1)


SOURCES = pytest.mark.parametrize("options", ["model", "text", "embedded"], indirect=True)


@pytest.mark.slow
@SOURCES
def test_every_row_begins_as_a_row_that_is_measured_does(options):
    tokens, _ = calibration_tokens(options)
    begins = tokens[:, 0]
    assert (begins == (BOS if options.model else begins[0])).all()
    assert (tokens[:, 1:] != begins[0]).mean() > 0.9
    assert tokens.shape == (2, TARGETS)


def test_without_a_text_the_rows_are_those_that_the_model_writes_from_the_seed(tiny_directory):
    options = QuantizeOptions(tiny_directory, rows=2, seed=1)
    tokens, source = calibration_tokens(options)
    assert source == "model"
    np.testing.assert_array_equal(tokens, own_rows(tiny_directory, 2, 1)[:, :-1])
    dry, _ = calibration_tokens(dataclasses.replace(options, dry_run=True))
    assert dry.shape == tokens.shape
    assert not dry.any()


def test_a_comparison_calibrates_on_the_same_rows(tiny_directory):
    cell = Cell("rtn", model=tiny_directory, calibration_text=MODEL, seed=1)
    cell = dataclasses.replace(cell, calibration_tokens=2 * TARGETS)
    options = QuantizeOptions(tiny_directory, rows=2, seed=1)
    np.testing.assert_array_equal(bench._calibration(cell), calibration_tokens(options)[0])
    assert cell.draws
    assert bench._keys(cell)[2] != bench._keys(dataclasses.replace(cell, seed=0))[2]
    given = dataclasses.replace(cell, calibration_text=TEXT)
    assert not given.draws
    assert bench._keys(given)[2] == bench._keys(dataclasses.replace(given, seed=0))[2]


def test_bad_options_are_refused_before_the_model_writes(tiny_directory, tmp_path):
    with pytest.raises(ValueError, match="did you mean duquantpp"):
        quantize(QuantizeOptions(tiny_directory, recipe="duqantpp", seed=9, out=tmp_path / "q"))
    assert not [*Path(os.environ["DUQUANTPP_CACHE"]).glob(f"{sha256(tiny_directory)}-9-*")]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"bos_token_id": None}, "no bos_token_id"),
        ({"max_position_embeddings": 64}, "64 positions"),
    ],
)
def test_a_model_that_takes_no_such_rows_writes_none(changes, says, tmp_path):
    save(tiny_decoder(**changes), byte_tokenizer().to_str(), tmp_path / "m")
    for dry in (False, True):
        with pytest.raises(ValueError, match=says):
            calibration_tokens(QuantizeOptions(tmp_path / "m", rows=2, dry_run=dry))


def test_the_embedded_model_can_write_its_rows_too():
    options = QuantizeOptions(calibration_text=MODEL, rows=2, dry_run=True)
    assert calibration_tokens(options)[0].shape == (2, TARGETS)
