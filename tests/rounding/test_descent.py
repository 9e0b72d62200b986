"""Coordinate descent: never above where it starts; at its end no single code can be bettered."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from duquantpp_jax import Stats
from duquantpp_jax.formats import MXFP4, NVFP4, FP32Scale, Log256
from duquantpp_jax.recipes import recipe
from duquantpp_jax.rounding.descent import descend
from duquantpp_jax.rounding.gptq import damped, gptq, weighted_error
from tests.rounding import test_gptq


def _case():
    w, gram, _ = test_gptq._case(mix=1.0)  # in the shapes that GPTQ is compiled for there
    return w, gram, damped(gram, 0.01)


@pytest.mark.slow
def test_no_pass_raises_the_error():
    w, gram, h = _case()
    rounded = gptq(w, MXFP4(), gram)
    before = np.asarray(weighted_error(w, rounded, h))
    for passes in (1, 3):
        after = np.asarray(weighted_error(w, descend(w, rounded, h, passes), h))
        assert (after <= before * (1 + 1e-6)).all()
        assert after.sum() < 0.95 * before.sum()
        before = after


@pytest.mark.slow
@pytest.mark.parametrize("format", [NVFP4(), FP32Scale(), Log256()], ids=lambda f: type(f).__name__)
def test_descent_by_its_name_is_no_worse_than_gptq_under_other_formats(format):
    w, gram, h = _case()
    empty = Stats.init(96, 1, 1)
    stats = dataclasses.replace(empty, gram=gram, count=jnp.int32(1))
    by_gptq, by_descent = (
        weighted_error(w, recipe("rtn", "floor", name).rounding(w, format, stats), h)
        for name in ("gptq", "descent")
    )
    assert float(jnp.sum(by_descent)) < 0.97 * float(jnp.sum(by_gptq))


def test_at_the_end_no_other_element_of_a_column_is_better():
    w, gram, h = _case()
    rounded = descend(w, gptq(w, MXFP4(), gram), h, 30)
    q = np.asarray(rounded.dequantize(), np.float64)
    scale = np.asarray(rounded.limit(), np.float64) / 6
    h = np.asarray(h, np.float64)
    error = np.asarray(w, np.float64) - q
    elements = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    for value in np.concatenate([elements, -elements]):
        step = value * scale - q
        change = step**2 * np.diag(h) - 2 * step * (error @ h)
        assert change.min() > -1e-4 * np.diag(h).mean()
