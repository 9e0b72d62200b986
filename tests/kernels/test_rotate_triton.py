"""rotate_quantize and rotate_fake_quantize by Triton, interpreted, against their reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duquantpp_jax import MXFP4, ScaleRule
from duquantpp_jax.core import Chain
from duquantpp_jax.kernels import rotate_fake_quantize, rotate_quantize
from duquantpp_jax.kernels.block_scale import RAISED_ABOVE
from duquantpp_jax.kernels.rotate_quantize import triton
from duquantpp_jax.kernels.rotate_quantize.cases import SMALL, Case
from duquantpp_jax.ptq import site as sites
from duquantpp_jax.ptq.site import QuantizedLinear, QuantizedSite
from duquantpp_jax.transforms import BlockAffine, Smooth
from tests.kernels.test_rotate_quantize import exact_inputs

on_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
RULES = [
    pytest.param(rule, marks=() if rule is ScaleRule.EVEN else pytest.mark.slow, id=rule.value)
    for rule in RAISED_ABOVE
]
interpreted = functools.partial(triton.numbers, interpret=True)


def assert_same_bits(mine, law):
    pair = (np.asarray(y).astype(np.float32).view(np.uint32) for y in (mine, law))
    np.testing.assert_array_equal(*pair)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("m", "shared"), [(40, False), (3, True)])
def test_numbers_are_those_of_the_reference_where_the_rotation_is_exact(m, shared, rule):
    """Rows that two programs have, fewer rows than tensor cores take, zeros of both signs."""
    case = Case(m, 96, shared=shared, smooth=True, scale_rule=rule)
    x, rotation, smooth = exact_inputs(case)
    law = rotate_fake_quantize(x, rotation, smooth, scale_rule=rule, implementation="reference")
    matrices = triton.joined(rotation, smooth)
    for given in (x, x.astype(jnp.float32)):
        mine = interpreted(given, matrices, rule)
        assert mine.dtype == jnp.bfloat16
        np.testing.assert_array_equal(mine.astype(jnp.float32), law.astype(jnp.float32))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("width", "shared"), [(96, False), (128, False), (96, True)])
def test_codes_and_scales_are_those_of_the_reference(width, shared, rule):
    """Blocks by themselves and two at a time, and all alike. A CPU makes zero of what stands for
    elements below 1, so those are left out."""
    case = Case(40, width, shared=shared, scale_rule=rule)
    x, rotation, _ = exact_inputs(case)
    law = rotate_quantize(x, rotation, scale_rule=rule, implementation="reference").to_mx()
    found = triton.rotate_quantize(x, rotation, None, scale_rule=rule, interpret=True)
    mine = found.to_mx()
    assert mine.shape == (40, width)
    np.testing.assert_array_equal(mine.scale_bytes(), law.scale_bytes())
    kept = (np.asarray(law.codes()) & 7 >= 3) | (np.asarray(law.dequantize()) == 0)
    assert kept.mean() > 0.4
    np.testing.assert_array_equal(np.asarray(mine.codes())[kept], np.asarray(law.codes())[kept])


def test_every_border_of_elements_and_of_scales_is_that_of_the_format():
    """Ties, and bfloat16 significands of the largest, moved by nothing; NaN and Inf stay in."""
    draw = np.random.default_rng(0)
    largest = (1 + np.arange(128) % 128 / 128) * 2.0 ** draw.integers(-100, 100, 128)
    steps = draw.integers(0, 33, (128, 32)) / 32
    x = largest[:, None] * steps * draw.choice([-1, 1], (128, 32))
    x[:, 7], x[5, 3], x[6, 4] = largest, np.nan, -np.inf
    x = jnp.asarray(x, jnp.float32)
    for rule in (ScaleRule.FLOOR, ScaleRule.RCEIL):
        law = np.array(MXFP4(scale_rule=rule).fake_quantize(x))
        mine = np.asarray(interpreted(x, jnp.eye(32)[None], rule), np.float32)
        assert np.isnan(law[5:7]).all()
        np.testing.assert_array_equal(mine, law)


def test_a_product_in_parts_is_one_in_float32():
    """Numbers differ from those of the float64 product next to ties alone."""
    draw = np.random.default_rng(1)
    x = draw.standard_normal((64, 64)).astype(np.float32)
    matrices = draw.standard_normal((2, 32, 32)).astype(np.float32)
    y = np.einsum("mbi,bij->mbj", x.reshape(64, 2, 32), matrices, dtype=np.float64)
    law = np.asarray(MXFP4().fake_quantize(jnp.asarray(y.reshape(64, 64), jnp.float32)))
    mine = np.asarray(interpreted(jnp.asarray(x), jnp.asarray(matrices), ScaleRule.FLOOR))
    assert np.mean(mine.astype(np.float32) != law) < 1e-3
    without_last = jax.tree.map(lambda a: a.astype(jnp.bfloat16).astype(jnp.float32), (x, matrices))
    coarse = np.asarray(interpreted(*map(jnp.asarray, without_last), ScaleRule.FLOOR))
    assert np.mean(coarse.astype(np.float32) != law) > 3e-3


def test_a_linear_gives_by_the_kernel_what_it_gives_without(monkeypatch):
    """Also where the kernel is not for it: with a clip, and in another format."""
    monkeypatch.setattr(sites.triton, "numbers", interpreted)
    x, rotation, smooth = exact_inputs(Case(6, 64, shared=False, smooth=True))
    x = x.astype(jnp.float32).reshape(2, 3, 64)
    inverses = jnp.linalg.inv(rotation)
    move = Chain((Smooth(smooth), BlockAffine(rotation, inverses)))
    weight = MXFP4().quantize(jnp.ones((8, 64)))
    for format in (MXFP4(scale_rule="even"), MXFP4(scale_rule="mse")):
        for clip in (None, jnp.full(2, 0.5)):
            site = QuantizedSite(move, (weight,), clip)
            by_xla, by_kernel = (
                QuantizedLinear(format, name).quantized(x, site, format)
                for name in ("xla", "triton")
            )
            np.testing.assert_array_equal(by_kernel.numbers, by_xla.numbers)


@on_gpu
@pytest.mark.parametrize("rule", RAISED_ABOVE)
def test_a_gpu_gives_the_bits_of_the_reference(rule):
    for case in SMALL:
        given = exact_inputs(case)
        for call in (rotate_quantize, rotate_fake_quantize):
            run = functools.partial(call, *given, scale_rule=rule)
            mine, law = run(implementation="triton"), run(implementation="reference")
            if call is rotate_quantize:
                np.testing.assert_array_equal(mine.to_mx().codes(), law.to_mx().codes())
                np.testing.assert_array_equal(mine.scales, law.scales)
            else:
                assert_same_bits(mine, law)


def test_what_it_cannot_do_is_refused_with_the_reason():
    x, eye = jnp.ones((2, 32)), jnp.eye(32)[None]
    assert "no rule mse" in (triton.why_not(x, ScaleRule.MSE) or "")
    assert "x is float16" in (triton.why_not(x.astype(jnp.float16), ScaleRule.EVEN) or "")
    if jax.default_backend() != "gpu":
        with pytest.raises(RuntimeError, match="needs an NVIDIA GPU, and this is cpu"):
            rotate_fake_quantize(x, eye, implementation="triton")
    with pytest.raises(ValueError, match="not a multiple of block 32"):
        rotate_fake_quantize(x[:, :8], eye)
