"""Where fit, transform, rounding and format meet."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duquantpp_jax.core import Needs
from duquantpp_jax.formats import MXFP4, Log256
from duquantpp_jax.formats.plain import BFloat16
from duquantpp_jax.models import SITES, dense
from duquantpp_jax.ptq.calibration import (
    calibrate,
    calibrate_layer,
    embed,
    layers_of,
)
from duquantpp_jax.ptq.layout import decoded_once
from duquantpp_jax.ptq.plan import Plan
from duquantpp_jax.ptq.site import (
    QuantizedLinear,
    QuantizedSite,
    fit_linear,
    layer_of,
    pad_channels,
    quantize_linear,
)
from duquantpp_jax.ptq.walk import fit_decoder, quantize_decoder
from duquantpp_jax.recipes import FITS, recipe
from duquantpp_jax.transforms.basic import Identity
from duquantpp_jax.transforms.block import BlockRotation
from tests.conftest import stats_of, tiny_decoder

KEY = jax.random.key(5)
_WEIGHTS = np.random.default_rng(1).uniform(1, 2, (48, 64)).astype(np.float32)


def _site(width=64, tokens=(2, 24), outputs=(32, 16, 16)):
    x = jax.random.normal(jax.random.key(0), (*tokens, width))
    weights = tuple(
        jax.random.normal(k, (n, width))
        for k, n in zip(jax.random.split(KEY, len(outputs)), outputs, strict=True)
    )
    return x, weights


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(FITS))
def test_a_quantized_linear_errs_like_its_format_and_no_more(name):
    # Shapes and rule of tests/transforms/test_fits.py: the programs are compiled once.
    x, weights = _site(128, (4, 64), (48, 16))
    method = recipe(name, "even")
    stats = stats_of(x)
    site = quantize_linear(method, weights, stats, fit_linear(method, weights, stats, KEY))
    ys, _ = QuantizedLinear(method.activation_format)("site", x, weights, site)
    for y, w in zip(ys, weights, strict=True):
        wanted = x @ w.T
        sqnr = 10 * np.log10(float(jnp.sum(wanted**2) / jnp.sum((y - wanted) ** 2)))
        assert 13 < sqnr < 20  # two independent roundings of about 19 dB each give 16


@pytest.mark.slow
def test_both_sides_are_quantized():
    x, weights = _site()
    method = recipe("rtn", "floor")
    stats = stats_of(x)
    site = quantize_linear(method, weights, stats, fit_linear(method, weights, stats, KEY))
    linear = QuantizedLinear(method.activation_format)
    ys, _ = linear("site", x, weights, site)
    q = method.activation_format.fake_quantize
    for y, w in zip(ys, weights, strict=True):
        np.testing.assert_allclose(y, q(x) @ q(w).T, atol=1e-4)


@pytest.mark.slow
def test_padding_with_zeros_is_exact():
    x, weights = _site(44)
    wide = (pad_channels(x, 64), tuple(pad_channels(w, 64) for w in weights))
    method = recipe("block_hadamard", "floor")
    stats = stats_of(wide[0])
    fitted = fit_linear(method, weights, stats, KEY)
    narrow_site = quantize_linear(method, weights, stats, fitted)
    wide_site = quantize_linear(method, wide[1], stats, fitted)
    linear = QuantizedLinear(method.activation_format)
    for y, z in zip(
        linear("site", x, weights, narrow_site)[0],
        linear("site", wide[0], wide[1], wide_site)[0],
        strict=True,
    ):
        np.testing.assert_array_equal(y, z)
    moved = fitted.transform.activations(wide[0]) @ fitted.transform.weights(wide[1][0]).T
    np.testing.assert_allclose(moved, x @ weights[0].T, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["duquantpp", "wush"])
def test_a_model_is_quantized_site_by_site_and_layer_by_layer(name):
    model = tiny_decoder()
    tokens = np.asarray(jax.random.randint(KEY, (3, 32), 0, 257))
    method = recipe(name, "floor")
    stats = calibrate(model, tokens, needs=method.needs)
    *_, state = quantize_decoder(Plan.of(model.config, method, seed=5), model, tokens, stats=stats)
    number, layer = 2, 1
    site = SITES[number]
    weights, seen = layer_of((model.weights(site), stats[site]), layer)
    key = jax.random.split(jax.random.fold_in(KEY, number), 2)[layer]
    alone = quantize_linear(method, weights, seen, fit_linear(method, weights, seen, key))
    for a, b in zip(
        jax.tree.leaves(layer_of(state[site], layer)), jax.tree.leaves(alone), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


def test_calibration_sees_what_the_linears_see():
    model = tiny_decoder()
    tokens = np.asarray(jax.random.randint(KEY, (5, 20), 0, 257))
    stats = calibrate(model, tokens, needs=Needs.GRAM)
    _, inputs = jax.jit(lambda m, t: m(t, lambda s, x, w, _: (dense(s, x, w, _)[0], x)))(
        model, tokens
    )
    for site in SITES:
        x = np.asarray(inputs[site], np.float64).reshape(2, 100, -1)
        np.testing.assert_allclose(stats[site].absmax, np.abs(x).max(axis=1), rtol=1e-4)
        np.testing.assert_allclose(stats[site].sample, x, atol=1e-4)
        np.testing.assert_allclose(
            stats[site].gram, np.einsum("lti,ltj->lij", x, x), rtol=1e-3, atol=1e-3
        )
        assert stats[site].count.tolist() == [100, 100]


def test_a_width_that_blocks_do_not_divide_is_refused_by_name_unless_padded():
    plan = Plan.of(tiny_decoder(intermediate_size=88).config, recipe("rtn"))
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.down_proj has input width 88.*--pad"):
        plan.widths(0)
    assert dataclasses.replace(plan, pad=True).widths(0)["mlp_out"] == 96


@pytest.mark.slow
def test_the_second_calibration_sees_the_moved_and_quantized_input():
    model = tiny_decoder()
    tokens = np.asarray(jax.random.randint(KEY, (3, 32), 0, 257))
    plan = Plan.of(model.config, recipe("smooth_hadamard", "floor"))
    formats, widths = dict(plan.formats), plan.widths(0)
    stats = calibrate(model, tokens, widths)
    fits = fit_decoder(plan, model, stats)
    hidden = embed(model, tokens)
    for layer, parameters in enumerate(layers_of(model)):
        moved = calibrate_layer(
            model.config,
            layer,
            parameters,
            hidden,
            widths,
            Needs.GRAM,
            fits=layer_of(fits, layer),
            formats=formats,
            after=hidden,
        )
        for site in SITES:
            x, transform = layer_of((stats[site].sample, fits[site].transform), layer)
            seen = formats[site].fake_quantize(transform.activations(x))
            np.testing.assert_array_equal(moved[site].sample, seen)
            np.testing.assert_allclose(moved[site].gram, seen.T @ seen, rtol=1e-3, atol=1e-3)


def test_weights_are_decoded_once_where_an_accelerator_has_room():
    w = MXFP4().quantize(_WEIGHTS)
    x = np.linspace(-3, 3, 128, dtype=np.float32).reshape(2, 64)
    odd = Log256().quantize(x)
    state = QuantizedSite(Identity(), (w, odd))

    def device(platform, limit):
        memory = {"bytes_limit": limit}
        return types.SimpleNamespace(platform=platform, memory_stats=lambda: memory)

    size = 2 * 48 * 64
    assert decoded_once(state, device("cpu", 9 * size)) is state
    assert decoded_once(state, device("gpu", 4 * size - 1)) is state
    found = decoded_once(state, device("gpu", 4 * size))
    assert found.weights[0].numbers.dtype == jnp.bfloat16
    assert found.weights[1] is odd
    linear = QuantizedLinear(MXFP4())
    for own in range(2):
        before, after = (
            linear("site", jnp.asarray(x), (), QuantizedSite(Identity(), part.weights[own:][:1]))
            for part in (state, found)
        )
        np.testing.assert_array_equal(before[0][0], after[0][0])


def test_inputs_in_bfloat16_meet_quantized_weights_as_they_are():
    w = MXFP4().quantize(_WEIGHTS)
    x = jnp.asarray(np.linspace(-3, 3, 512).reshape(8, 64), jnp.bfloat16)
    linear, state = QuantizedLinear(MXFP4()), QuantizedSite(Identity(), (w,))
    found, wanted = (linear("site", each, (), state)[0] for each in (x, x.astype(jnp.float32)))
    np.testing.assert_array_equal(found[0], wanted[0])


def test_inputs_left_in_float_are_rounded_where_a_model_computes_in_bfloat16():
    matrix = jnp.asarray(np.linalg.qr(np.random.default_rng(0).normal(size=(1, 32, 32)))[0])
    state = QuantizedSite(BlockRotation(jnp.float32(matrix)), (MXFP4().quantize(_WEIGHTS),))
    x = jnp.asarray(np.linspace(-3, 3, 512).reshape(8, 64), jnp.bfloat16)
    left = QuantizedLinear(None)
    (found,), (wide,) = (left("site", each, (), state)[0] for each in (x, jnp.float32(x)))
    ((wanted,), _) = QuantizedLinear(BFloat16())("site", jnp.float32(x), (), state)
    np.testing.assert_array_equal(found, wanted)
    assert np.any(found != wide)
