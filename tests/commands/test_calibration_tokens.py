"""Rows to calibrate on, from each of the three places that they come from."""

import dataclasses

import numpy as np
import pytest

from duquantpp_jax.checkpoints import save
from duquantpp_jax.commands.quantize import QuantizeOptions, calibration_tokens
from duquantpp_jax.evaluation.rows import TARGETS
from tests.conftest import byte_tokenizer, tiny_decoder

BOS = 256


@pytest.fixture
def options(request, tiny_directory, tiny_text):
    """Of a model whose beginning-of-sequence token is 256, or of the one inside the package."""
    if request.param == "embedded":
        return QuantizeOptions(rows=5)
    text = tiny_text if request.param == "text" else None
    return QuantizeOptions(tiny_directory, calibration_text=text, rows=5)


SOURCES = pytest.mark.parametrize("options", ["random", "text", "embedded"], indirect=True)


@SOURCES
def test_every_row_begins_as_a_row_that_is_measured_does(options):
    tokens, source = calibration_tokens(options)
    begins = tokens[:, 0]
    assert (begins == (BOS if options.model else begins[0])).all()
    assert (tokens[:, 1:] != begins[0]).mean() > 0.9
    assert tokens.shape == (5, TARGETS + (source == "random ids"))


def test_random_ids_are_any_of_the_vocabulary_and_follow_the_seed(tiny_directory):
    options = QuantizeOptions(tiny_directory, rows=16)
    tokens, _ = calibration_tokens(options)
    assert set(tokens.ravel()) == set(range(257))
    np.testing.assert_array_equal(calibration_tokens(options)[0], tokens)
    other, _ = calibration_tokens(dataclasses.replace(options, seed=1))
    assert (other[:, 1:] != tokens[:, 1:]).mean() > 0.9


def test_random_rows_are_no_longer_than_the_model_has_positions(tmp_path):
    model = tiny_decoder(max_position_embeddings=64)
    save(model, byte_tokenizer().to_str(), tmp_path / "m")
    assert calibration_tokens(QuantizeOptions(tmp_path / "m", rows=2))[0].shape == (2, 64)


def test_a_model_without_a_first_token_has_random_ids_there_too(tmp_path):
    save(tiny_decoder(bos_token_id=None), byte_tokenizer().to_str(), tmp_path)
    tokens, _ = calibration_tokens(QuantizeOptions(tmp_path, rows=64))
    assert len(set(tokens[:, 0])) > 32
