"""A tiny model, rows of tokens, and the model quantized."""

import jax
import numpy as np
import pytest

from duquantpp_jax.evaluation.predict import Predictor
from duquantpp_jax.models import SITES
from duquantpp_jax.ptq.calibration import calibrate, site_widths
from duquantpp_jax.ptq.site import QuantizedLinear, fit_model, quantize_model
from duquantpp_jax.recipes import recipe
from tests.conftest import tiny_decoder

ROWS, LENGTH = 5, 24


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor(tiny_decoder())


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 257, (ROWS, LENGTH)).astype(np.int32)


@pytest.fixture(scope="module")
def quantize(predictor, tokens):
    """Quantizes the tiny model by a recipe and a format."""
    model = predictor.model

    def quantize(name: str, format: str) -> Predictor:
        chosen = recipe(name, format)
        weights = {site: model.weights(site) for site in SITES}
        stats = calibrate(model, tokens, site_widths(model, 32))
        fits = fit_model(chosen, weights, stats, jax.random.key(0))
        state = quantize_model(chosen, weights, stats, fits)
        return Predictor(model, QuantizedLinear(chosen.activation_format), state)

    return quantize


@pytest.fixture(scope="module")
def quantized(quantize) -> Predictor:
    return quantize("block_hadamard", "floor")
