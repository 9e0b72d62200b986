"""Searched scales: the best of the candidates, block by block or row by row."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duquantpp_jax import MXFP4
from duquantpp_jax.core import Stats
from duquantpp_jax.formats import NVFP4, FP32Scale
from duquantpp_jax.ptq.site import fit_linear, quantize_linear
from duquantpp_jax.recipes import ROUNDINGS, recipe
from duquantpp_jax.rounding.clip import SCALE, Search
from duquantpp_jax.rounding.gptq import damped, gptq, weighted_error
from tests.conftest import stats_of

KEY = jax.random.key(0)
RANDOM = np.random.default_rng(0)
W, X = (
    jnp.asarray(a, jnp.float32)
    for a in (
        RANDOM.standard_normal((24, 96)) * np.exp(RANDOM.standard_normal((24, 96))),
        RANDOM.standard_normal((4, 50, 96)) * np.exp(np.linspace(-2, 2, 96)),
    )
)
# A continuous scale leaves clipping the most to find; FLOOR saturates by itself.
SEARCHES = {
    "clip": (Search(), FP32Scale()),
    "clip_row": (Search(per="row"), FP32Scale()),
    "scale": (SCALE, MXFP4()),
}


def stats() -> Stats:
    return stats_of(X)


def errors(q, per):
    """Weighted squared error of each block or row, in float64."""
    h = np.mean(np.square(np.asarray(X, np.float64)), axis=(0, 1))
    off = np.asarray(W, np.float64) - np.asarray(q.dequantize(), np.float64)
    blocks = (h * off**2).reshape(len(W), -1, q.block_size).sum(axis=-1)
    return blocks if per == "block" else blocks.sum(axis=-1, keepdims=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", SEARCHES)
def test_each_block_or_row_has_the_least_error_of_all_candidates(name):
    search, format = SEARCHES[name]
    found = search(W, format, stats())
    kind = jnp.int32 if search.option == "scale_offset" else jnp.float32
    tried = [
        errors(format.quantize(W, **{search.option: jnp.asarray(c, kind)}), search.per)
        for c in search.candidates
    ]
    np.testing.assert_allclose(errors(found, search.per), np.min(tried, axis=0), rtol=1e-5)
    assert np.mean(np.min(tried, axis=0) < tried[0]) > 0.05  # there is something to find


@pytest.mark.parametrize("name", SEARCHES)
def test_the_first_candidate_wins_ties(name):
    search, format = SEARCHES[name]
    found, plain = search.encode(W, format, jnp.zeros(96)), format.encode(W)  # every error is 0
    np.testing.assert_array_equal(found.scales, plain.scales)
    np.testing.assert_array_equal(found.elements, plain.elements)


def test_a_search_over_offsets_finds_all_that_clipping_can_do_to_a_block():
    clip, scale = Search()(W, MXFP4(), stats()), SCALE(W, MXFP4(), stats())
    assert np.all(errors(scale, "block") <= errors(clip, "block") * (1 + 1e-6))


def test_clipping_goes_with_any_format_and_offsets_with_powers_of_two():
    plain = NVFP4().quantize(W)
    found = Search()(W, NVFP4(), stats())
    assert np.all(errors(found, "block") <= errors(plain, "block") * (1 + 1e-6))
    with pytest.raises(ValueError, match="scale_offset is for scales that are powers of two"):
        SCALE(W, NVFP4(), stats())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip", "scale"])
def test_gptq_with_a_search_is_no_worse_in_any_row_and_better_on_the_whole(name):
    search, format = SEARCHES[name]
    tokens = X.reshape(-1, 96)
    gram = tokens.T @ tokens / 200
    h = damped(gram, 0.01)
    plain = weighted_error(W, gptq(W, format, gram), h)
    found = weighted_error(W, gptq(W, format, gram, 0.01, search), h)
    nearest = weighted_error(W, search.encode(W, format, jnp.diagonal(gram)), h)
    assert bool(jnp.all(found <= nearest * 1.0001))
    assert float(jnp.sum(found)) < float(jnp.sum(plain))


@pytest.mark.parametrize("rounding", sorted(ROUNDINGS))
def test_every_rounding_composes_with_a_transform(rounding):
    method = recipe("smooth_hadamard", "floor", rounding)
    seen = stats()
    fitted = fit_linear(method, (W,), seen, KEY)
    both = dataclasses.replace(seen, cross=seen.gram)  # the float path gives the same input
    site = quantize_linear(method, (W,), both, fitted)
    wanted = fitted.transform.weights(W)
    error = jnp.linalg.norm(site.weights[0].dequantize() - wanted) / jnp.linalg.norm(wanted)
    assert 0.05 < float(error) < 0.2
