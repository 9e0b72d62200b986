"""A tiny model, rows of tokens, and the model quantized."""

import numpy as np
import pytest

from duquantpp_jax.evaluation.predict import Predictor
from duquantpp_jax.ptq.plan import Plan
from duquantpp_jax.ptq.walk import quantize_decoder
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
        plan = Plan.of(model.config, recipe(name, format))
        return Predictor(*quantize_decoder(plan, model, tokens))

    return quantize


@pytest.fixture(scope="module")
def quantized(quantize) -> Predictor:
    return quantize("block_hadamard", "floor")
