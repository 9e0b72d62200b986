"""Cache formats on blocks whose largest number lies anywhere within a binade."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duquantpp_jax.core import ScaleRule
from duquantpp_jax.ptq.stores import FORMATS, HeadStore, store

BINADE = jnp.exp2(jnp.linspace(-3, 3, 6 * 64, endpoint=False))
"""Largest numbers of blocks, 64 a binade."""
BLOCKS = jax.random.uniform(jax.random.key(0), (384, 32), minval=-1, maxval=1)
BLOCKS = (BLOCKS.at[:, 0].set(1.0) * BINADE[:, None]).reshape(1, 384, 1, 32)

ULPS = {"float32": 2.0**-24, "bf16": 2.0**-8, "mxfp8": 2.0**-4}


def through(cache: HeadStore, x):
    return np.asarray(cache.decode(cache.encode(x)))


@pytest.mark.parametrize("name", sorted(ULPS))
def test_the_largest_number_of_a_block_never_saturates(name):
    """Half an ulp is its whole error, wherever in its binade it lies."""
    largest = BLOCKS[..., 0]
    error = np.abs(through(store(name, 32), BLOCKS)[..., 0] - largest)
    assert (error <= ULPS[name] * largest).all()


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8"])
def test_no_other_scale_rule_of_its_kind_errs_less(name):
    """Mean square over normal blocks: what the choice of a rule was made for."""
    chosen = store(name, 32)
    x = jax.random.normal(jax.random.key(1), (4, 512, 1, 32))
    errors = {}
    for rule in (ScaleRule.FLOOR, ScaleRule.EVEN, ScaleRule.RCEIL):
        other = HeadStore(dataclasses.replace(FORMATS[name], scale_rule=rule))
        errors[rule] = float(np.mean((through(other, x) - x) ** 2))
    assert min(errors, key=errors.__getitem__) is chosen.format.scale_rule, errors


def test_heads_that_do_not_fit_are_refused_by_name():
    with pytest.raises(ValueError, match=r"head_dim 80 is not a multiple of block 32.*bf16"):
        store("mxfp8", 80)
    with pytest.raises(ValueError, match=r"power of two.* 96"):
        store("mxfp4", 96, rotate_keys=True)
    with pytest.raises(ValueError, match="unknown cache format 'mxfp5': did you mean"):
        store("mxfp5", 64)
    assert store("bf16", 80).format == jnp.bfloat16
