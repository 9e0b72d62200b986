"""GPTQ against a plain float64 NumPy loop, and against what it is for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duquantpp_jax import MXFP4, ScaleRule, Stats
from duquantpp_jax.core.notices import about
from duquantpp_jax.formats import NVFP4, FP32Scale
from duquantpp_jax.recipes import FITS, recipe
from duquantpp_jax.rounding.asymmetric import Asymmetric
from duquantpp_jax.rounding.clip import SCALE
from duquantpp_jax.rounding.gptq import (
    GPTQ,
    damped,
    gptq,
    inverse_factor,
    steady,
    weighted_error,
)

VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def nearest(x):
    """x on the E2M1 grid, ties to the even code, saturated."""
    codes = np.arange(8)
    distance = np.abs(np.abs(x)[..., None] - VALUES)
    best = distance.min(axis=-1, keepdims=True)
    code = np.where(distance == best, codes % 2 * 8 + codes, 99).argmin(axis=-1)
    return np.sign(x) * VALUES[code]


def reference(w, gram, rule, damping=0.01, size=32, steps=(0,)):
    """The equations of gptq.py, a column at a time in float64.

    Of the rule's scale times 2^step a block takes the first with the least weighted error.
    """
    w, k = np.array(w, np.float64), w.shape[1]
    h = gram + damping * np.mean(np.diag(gram)) * np.eye(k)
    u = np.linalg.cholesky(np.linalg.inv(h)).T
    q = np.zeros_like(w)
    for j in range(k):
        if j % size == 0:
            amax = np.abs(w[:, j : j + size]).max(axis=1)
            if rule is ScaleRule.EVEN:
                mantissa, exponent = np.frexp(amax)
                amax = np.ldexp(np.floor(mantissa * 4 + 0.5) / 4, exponent)
            scales = [2.0 ** (np.frexp(amax)[1] - 1 - 2 + step)[:, None] for step in steps]
            part, weight = w[:, j : j + size], np.diag(gram)[j : j + size]
            errors = [((part - nearest(part / s) * s) ** 2 * weight).sum(axis=1) for s in scales]
            scale = np.choose(np.argmin(errors, axis=0), [s[:, 0] for s in scales])
        q[:, j] = nearest(w[:, j] / scale) * scale
        w[:, j:] -= np.outer((w[:, j] - q[:, j]) / u[j, j], u[j, j:])
    return q


def _case(mix=0.125, rows=24, width=96, tokens=400):
    random = np.random.default_rng(0)
    mixed = np.eye(width) + mix * random.standard_normal((width, width))
    x = random.standard_normal((tokens, width)) @ mixed
    arrays = random.standard_normal((rows, width)), x.T @ x / tokens, x
    return tuple(jnp.asarray(a, jnp.float32) for a in arrays)


@pytest.mark.parametrize("rule", [ScaleRule.FLOOR, ScaleRule.EVEN])
def test_gptq_equals_the_plain_loop(rule):
    w, gram, _ = _case()
    format = MXFP4(scale_rule=rule)
    found = np.asarray(gptq(w, format, gram).dequantize(), np.float64)
    wanted = reference(np.asarray(w, np.float64), np.asarray(gram, np.float64), rule)
    h = np.asarray(damped(gram, 0.01), np.float64)
    plain = np.asarray(format.quantize(w).dequantize(), np.float64)
    errors = [np.einsum("nk,kl,nl->n", w - q, h, w - q) for q in (wanted, plain)]
    wanted = np.where((errors[0] > errors[1])[:, None], plain, wanted)
    # A number next to a border may round the other way in float32, and moves those after it.
    assert np.mean(found != wanted) < 0.01
    assert np.mean((found == wanted).all(axis=1)) > 0.8


def test_a_search_weighs_each_channel_by_its_own_mean_square():
    w, gram, _ = _case()
    size = jnp.where(jnp.arange(96) % 3 == 0, 4.0, 0.25)
    gram = gram * size * size[:, None]
    found = np.asarray(gptq(w, MXFP4(), gram, search=SCALE).dequantize())
    wanted = reference(w, np.asarray(gram, np.float64), ScaleRule.FLOOR, steps=SCALE.candidates)
    assert np.mean((found == wanted).all(axis=1)) > 0.8
    unsearched = reference(w, np.asarray(gram, np.float64), ScaleRule.FLOOR)
    assert np.mean((found == unsearched).all(axis=1)) < 0.5


def test_the_factor_is_that_of_the_inverse():
    _, gram, _ = _case()
    h = np.asarray(damped(gram, 0.01), np.float64)
    u = np.asarray(inverse_factor(jnp.asarray(h, jnp.float32)), np.float64)
    assert np.allclose(np.tril(u, -1), 0)
    np.testing.assert_allclose(u @ h @ u.T, np.eye(96), atol=1e-4)


@pytest.mark.parametrize("format", [MXFP4(), FP32Scale(), NVFP4()], ids=lambda f: type(f).__name__)
def test_gptq_lowers_the_error_of_the_output_and_never_raises_that_of_a_row(format):
    w, gram, x = _case()
    h = damped(gram, 0.01)
    better, plain = gptq(w, format, gram), format.quantize(w)
    after, before = weighted_error(w, better, h), weighted_error(w, plain, h)
    assert bool(jnp.all(after <= before * 1.0001))
    output = lambda q: float(jnp.mean(jnp.square(x @ (w - q.dequantize()).T)))  # noqa: E731
    assert output(better) < 0.9 * output(plain)
    assert better.scales.dtype == plain.scales.dtype
    assert better.elements.dtype == plain.elements.dtype


@pytest.mark.parametrize("format", [MXFP4(), FP32Scale(), NVFP4()], ids=lambda f: type(f).__name__)
def test_a_row_of_zeros_stays_zero_to_the_bit(format):
    """Its scales are the least there are, by which not even zero can be divided."""
    w, gram, _ = _case()
    rounded = gptq(w.at[3].set(0.0), format, gram)
    assert not np.any(np.asarray(rounded.codes())[3])
    assert np.isfinite(rounded.dequantize()).all()


@pytest.mark.parametrize("rule", [ScaleRule.FLOOR, ScaleRule.EVEN])
def test_rows_that_the_loop_makes_worse_are_rounded_to_nearest_and_only_they(rule):
    """Inputs that are almost white leave little to gain: the loop harms 1 or 2 of these 24 rows.

    Of them elements and scales are those of nearest rounding, scaled blocks apart or not.
    """
    w, gram, _ = _case(mix=0.02)
    format = MXFP4(scale_rule=rule)
    loop = reference(np.asarray(w), np.asarray(gram, np.float64), rule)
    plain = np.asarray(format.quantize(w).dequantize(), np.float64)
    h = np.asarray(damped(gram, 0.01), np.float64)
    errors = [np.einsum("nk,kl,nl->n", w - q, h, w - q) for q in (loop, plain)]
    worse = errors[0] > errors[1]
    assert 0 < worse.sum() < 12
    found = gptq(w, format, gram).dequantize()
    np.testing.assert_array_equal(found, np.where(worse[:, None], plain, loop))


def test_a_row_that_is_rounded_to_nearest_takes_its_scales_too():
    """Also where the error of a block moves the next one to another binade."""
    rows, gram, _ = _case(mix=0.03, rows=504)
    h, harmed = damped(gram, 0.01), 0
    for w in jnp.split(rows, 21):
        found, plain = gptq(w, MXFP4(), gram), MXFP4().quantize(w)
        after, before = weighted_error(w, found, h), weighted_error(w, plain, h)
        nearest = np.asarray((found.codes() == plain.codes()).all(axis=1))
        harmed += nearest.sum()
        np.testing.assert_array_equal(found.scale_bytes()[nearest], plain.scale_bytes()[nearest])
        assert bool(jnp.all(after <= before * 1.0001))
    assert harmed > 5


def test_white_inputs_leave_nothing_to_make_good():
    w, _, _ = _case()
    better = gptq(w, MXFP4(), jnp.eye(96))
    np.testing.assert_array_equal(better.dequantize(), MXFP4().quantize(w).dequantize())


def test_dead_channels_and_no_input_at_all_give_numbers():
    w, gram, _ = _case()
    for g in (gram.at[5].set(0.0).at[:, 5].set(0.0), jnp.zeros_like(gram)):
        assert bool(jnp.all(jnp.isfinite(gptq(w, MXFP4(), g).dequantize())))


@pytest.mark.slow
def test_gptq_maps_over_layers():
    w, gram, _ = _case()
    both = jax.vmap(lambda w, g: gptq(w, MXFP4(), g))(jnp.stack([w, 2 * w]), jnp.stack([gram] * 2))
    alone = gptq(w, MXFP4(), gram)
    np.testing.assert_array_equal(both.codes()[0], alone.codes())


def test_it_refuses_stats_without_a_gram_matrix():
    w, _, _ = _case()
    with pytest.raises(ValueError, match=r"GPTQ needs Needs\.GRAM"):
        GPTQ()(w, MXFP4(), Stats.init(96, 1, 4))


@pytest.mark.parametrize("name", sorted(FITS))
def test_every_recipe_can_be_rounded_by_gptq(name):
    assert recipe(name, "floor", "gptq").rounding == GPTQ()


def test_rows_whose_error_is_nan_are_rounded_to_nearest():
    w, gram, _ = _case()
    spoilt = gram.at[0, 0].set(jnp.nan)
    found = gptq(w, MXFP4(), spoilt)
    np.testing.assert_array_equal(found.dequantize(), MXFP4().fake_quantize(w))


def test_damping_is_raised_with_a_warning_until_the_gram_matrix_can_be_factorized(caplog):
    ones = np.ones((96, 96), np.float32)
    stats = Stats.init(96, 1, 1).replace(gram=jnp.asarray(ones), count=jnp.int32(1))
    assert steady(GPTQ(), stats) == GPTQ()
    assert caplog.messages == []
    with about("layer 3"):
        raised = steady(GPTQ(damping=1e-12), stats)
    assert 1e-12 < raised.damping < 1e-4
    inside = steady(Asymmetric(rounding=GPTQ(damping=1e-12)), stats)
    assert inside == Asymmetric(rounding=raised)
    assert caplog.messages[0].startswith("layer 3: GPTQ: damping raised from 1e-12 to ")
    ones[5] = np.nan
    says = "layer 3: the Gram matrix of the moved input has NaN or Inf in 96 of 9216 numbers"
    with pytest.raises(ValueError, match=says), about("layer 3"):
        steady(GPTQ(), stats.replace(gram=jnp.asarray(ones)))
