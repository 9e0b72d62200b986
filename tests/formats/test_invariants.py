"""What MX formats keep: rounding again, scaling, permuting; one result however it is computed."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duquantpp_jax.core import MXArray, ScaleRule
from duquantpp_jax.formats import MXFP4
from tests.formats.test_mx import ALL_RULES, COUNT, FORMATS, assert_same, blocks_of, both

seeds = st.integers(0, 2**32 - 1)


def canonical(format, seed: int) -> MXArray:
    """Blocks in whose largest element the rule recognises their scale."""
    name, bits = format.element.name, format.element.bits
    exponent = lambda v: oracle.scale_exponent(v, format.scale_rule, name)  # noqa: E731
    top = max(c for c, v in enumerate(oracle.magnitudes(name)) if v and exponent(v) == 0)
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, top + 1, (COUNT, 32), dtype=np.uint8)
    codes[np.arange(COUNT), rng.integers(0, 32, COUNT)] = top
    codes |= rng.integers(0, 2, codes.shape, dtype=np.uint8) << (bits - 1)
    # Below 2, elements of e5m2 fall below the smallest float32; above, those of all reach Inf.
    bytes_ = rng.integers(2, 250 - format.element.emax, (COUNT, 1), dtype=np.uint8)
    return MXArray(
        format.element.store(jnp.asarray(codes)),
        jax.lax.bitcast_convert_type(jnp.asarray(bytes_), jnp.float8_e8m0fnu),
        element=format.element,
        block_size=32,
    )


@settings(max_examples=25, deadline=None)
@given(seeds, st.sampled_from(oracle.AMAX_RULES), st.sampled_from(FORMATS))
def test_quantizing_the_dequantized_gives_back_canonical_codes_and_bytes(seed, rule, make):
    format = make(scale_rule=rule)
    q = canonical(format, seed)
    assert_same(format.quantize(q.dequantize()), q)


@settings(max_examples=20, deadline=None)
@given(seeds, st.sampled_from(ALL_RULES), st.sampled_from(FORMATS))
def test_fake_quantize_is_idempotent(seed, rule, make):
    format = make(scale_rule=rule)
    once = format.fake_quantize(blocks_of(seed=seed))
    np.testing.assert_array_equal(np.asarray(format.fake_quantize(once)), np.asarray(once))


@settings(max_examples=20, deadline=None)
@given(seeds, st.integers(-20, 20), st.sampled_from(ALL_RULES), st.sampled_from(FORMATS))
def test_scaling_by_powers_of_two_moves_bytes_and_nothing_else(seed, power, rule, make):
    x = np.random.default_rng(seed).standard_t(3, (COUNT, 32)).astype(np.float32)
    format = make(scale_rule=rule)
    codes, bytes_ = both(format.quantize(x))
    moved_codes, moved_bytes = both(format.quantize(np.ldexp(x, power)))
    np.testing.assert_array_equal(moved_codes, codes)
    np.testing.assert_array_equal(moved_bytes.astype(int), bytes_.astype(int) + power)


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(seeds, st.sampled_from(FORMATS))
def test_error_of_mse_is_at_most_that_of_the_rules_it_chooses_among(seed, make):
    x = blocks_of(seed=seed)
    x[np.abs(x).max(axis=-1) > 1e30] = 1

    def error(rule):
        rounded = np.asarray(make(scale_rule=rule).fake_quantize(x), np.float64)
        return np.square(x.astype(np.float64) - rounded).sum(axis=-1)

    least = error(ScaleRule.MSE)
    for rule in (ScaleRule.FLOOR, ScaleRule.CEIL, ScaleRule.EVEN):
        assert (least <= error(rule) * (1 + 2.0**-22)).all()


@settings(max_examples=15, deadline=None)
@given(seeds, st.sampled_from(ALL_RULES))
def test_permuting_blocks_permutes_the_result(seed, rule):
    x = blocks_of(seed=seed)
    order = np.random.default_rng(seed).permutation(COUNT)
    codes, bytes_ = both(MXFP4(scale_rule=rule).quantize(x))
    moved_codes, moved_bytes = both(MXFP4(scale_rule=rule).quantize(x[order]))
    np.testing.assert_array_equal(moved_codes, codes[order])
    np.testing.assert_array_equal(moved_bytes, bytes_[order])


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (MXFP4, ScaleRule.FLOOR),
        *[pytest.param(MXFP4, r, marks=pytest.mark.slow) for r in ALL_RULES[1:]],
        *[pytest.param(m, r, marks=pytest.mark.slow) for m in FORMATS[1:] for r in ALL_RULES],
    ],
)
def test_jit_eager_and_vmap_agree_bit_for_bit(make, rule):
    format, x = make(scale_rule=rule), jnp.asarray(blocks_of())
    q = format.quantize(x)
    with jax.disable_jit():
        assert_same(format.quantize(x), q)
    assert_same(jax.jit(jax.vmap(format.quantize))(x), q)
    if rule is ScaleRule.FLOOR:  # each by itself, and rows of several blocks
        wide = x.reshape(-1, 64)
        q_wide = format.quantize(wide)
        assert_same(jax.jit(format.quantize)(wide), q_wide)
        assert_same(jax.vmap(format.quantize)(wide), q_wide)
        np.testing.assert_array_equal(q_wide.codes().reshape(x.shape), q.codes())
    np.testing.assert_array_equal(jax.jit(MXArray.dequantize)(q), q.dequantize())
    np.testing.assert_array_equal(jax.vmap(MXArray.dequantize)(q), q.dequantize())


def test_stacked_arrays_scan_over_their_leading_axis():
    x = jnp.asarray(blocks_of(24).reshape(3, 4, 64))
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *[MXFP4().quantize(row) for row in x])
    assert_same(stacked, MXFP4().quantize(x))
    _, rounded = jax.lax.scan(lambda carry, q: (carry, q.dequantize()), 0, stacked)
    np.testing.assert_array_equal(rounded, MXFP4().fake_quantize(x))
