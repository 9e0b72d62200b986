"""What every named fit must keep: the law, orthogonality, finite numbers, whatever the channels.

A new fit is one more line of recipes.py; it comes under these tests by its name there.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duquantpp_jax.core import Chain, stack
from duquantpp_jax.recipes import FITS, recipe
from duquantpp_jax.transforms import storage
from duquantpp_jax.transforms.basic import Smooth
from duquantpp_jax.transforms.block import BlockAffine, BlockRotation, KroneckerRotation
from experiments.health import health
from tests.conftest import heavy_tails, stats_of

WIDTH = 128
KEY = jax.random.key(3)
ROUNDING = 2.0**-24
UNPOLISHED = ("greedy_released", "duquantpp_released", "duquantpp_released_exact")


def _plain():
    x = heavy_tails(4.0, (4, 64, WIDTH))
    x = x * jnp.exp(0.7 * jax.random.normal(jax.random.key(1), (WIDTH,)))
    keys = jax.random.split(jax.random.key(2), 2)
    return (jax.random.normal(keys[0], (48, WIDTH)), jax.random.normal(keys[1], (16, WIDTH))), x


def _massive_channel():
    weights, x = _plain()
    median = jnp.median(jnp.max(jnp.abs(x), axis=(0, 1)))
    return weights, x.at[..., 37].multiply(1150 * median / jnp.max(jnp.abs(x[..., 37])))


def _massive_position():
    weights, x = _plain()
    median = jnp.median(jnp.max(jnp.abs(x), axis=(0, 1)))
    return weights, x.at[:, 0, 37].set(1150 * median)


def _dead_and_duplicate_channels():
    weights, x = _plain()
    twice = lambda a: a.at[..., 32:48].set(a[..., 48:64]).at[..., 6].set(a[..., 7])  # noqa: E731
    dead = jnp.arange(3, WIDTH, 7)
    weights = tuple(twice(w).at[:, 5].set(0.0).at[:, 3].set(0.0) for w in weights)
    return weights, twice(x).at[..., dead].set(0.0)


def _dead_block():
    weights, x = _plain()
    return tuple(w.at[:, 64:96].set(0.0) for w in weights), x.at[..., :32].set(0.0)


CASES = {
    "heavy tails": _plain,
    "massive channel": _massive_channel,
    "massive position": _massive_position,
    "dead and duplicate channels": _dead_and_duplicate_channels,
    "dead block": _dead_block,
}
QUICK = ("heavy tails", "massive position")
each_fit = pytest.mark.parametrize("name", sorted(FITS))
each_case = pytest.mark.parametrize(
    "case",
    [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in sorted(CASES)],
)


@functools.cache
def fitted(name, case):
    weights, x = _site(case)
    return FITS[name](weights, stats_of(x), recipe(name, "even"), KEY).transform


@functools.cache
def _site(case):
    return CASES[case]()


@functools.cache
def _product(case):
    """x W^T in float64, and what |x| |w| bounds each of its entries by."""
    weights, x = _site(case)
    x, w = np.asarray(x, np.float64), np.concatenate([np.asarray(w, np.float64) for w in weights])
    return x @ w.T, np.linalg.norm(x, axis=-1)[..., None] * np.linalg.norm(w, axis=-1)


def exact(transform):
    """The transform in float64: rotations made orthogonal, inverses computed anew."""

    def rotation(matrices):
        u, _, vt = np.linalg.svd(np.asarray(matrices, np.float64))
        return jnp.asarray(u @ vt)

    match transform:
        case Chain():
            return Chain(tuple(exact(link) for link in transform.links))
        case BlockRotation():
            return BlockRotation(rotation(transform.matrices))
        case KroneckerRotation():
            return KroneckerRotation(tuple(rotation(factor) for factor in transform.factors))
        case BlockAffine():
            matrices = np.asarray(transform.matrices, np.float64)
            return BlockAffine(jnp.asarray(matrices), jnp.asarray(np.linalg.inv(matrices)))
        case Smooth():
            return Smooth(transform.scale.astype(jnp.float64))
    return transform


@pytest.mark.slow
@each_fit
@pytest.mark.parametrize("case", QUICK)
def test_the_law_holds_in_float64(name, case):
    weights, x = _site(case)
    stored = fitted(name, case)
    with jax.enable_x64(True):
        transform = exact(stored)
        x, w = x.astype(jnp.float64), stack(weights).astype(jnp.float64)
        moved = np.asarray(transform.activations(x)) @ np.asarray(transform.weights(w)).T
    wanted, bound = _product(case)
    np.testing.assert_allclose(moved, wanted, atol=1e-9 * bound.max())


@each_fit
@each_case
def test_the_law_holds_in_float32_up_to_the_condition(name, case):
    weights, x = _site(case)
    transform, w = fitted(name, case), stack(weights)
    wanted, bound = _product(case)
    moved = np.asarray(transform.activations(x) @ transform.weights(w).T)
    found = health_of(transform)
    assert_stored_well(name, found)
    # The stored arrays are rounded once: law_error, over the width. Both sides are sums of as many
    # terms as the cost says, the product one of `width`, each rounded once, of |x| |T| |T^-1| |w|.
    roundings = 2 * transform.cost(WIDTH).multiply_adds + WIDTH
    relative = WIDTH * found.law_error + roundings * ROUNDING * found.condition
    assert np.all(np.abs(moved - wanted) <= relative * bound)


def health_of(transform):
    """Of its blocks of 32, whose condition is at most that of the whole, where it has them."""
    try:
        return health(transform, WIDTH, 32)
    except ValueError:  # it mixes blocks
        return health(transform, WIDTH)


def assert_stored_well(name, found):
    """What is stored fits together to float32, and rotations are orthogonal.

    As released, a rotation is the product of up to 128 of float32, each of whose entries is
    rounded, of rows of 32, and none of them is polished.
    """
    assert np.isfinite(found.condition)
    drift = 128 * np.sqrt(32) * ROUNDING
    assert found.law_error <= (drift if name in UNPOLISHED else 1e-6) * found.condition
    if found.condition < 1 + 1e-4:
        assert found.orthogonality_error <= (drift if name in UNPOLISHED else 1e-6)


@each_case
def test_conditioned_wush_keeps_its_bound_and_leaves_alone_what_is_within(case):
    bound = FITS["wush_conditioned"].max_condition
    plain, bounded = (fitted(n, case).matrices for n in ("wush", "wush_conditioned"))
    before, after = (np.linalg.cond(np.asarray(m, np.float64)) for m in (plain, bounded))
    assert np.all(after <= bound * (1 + 1e-5))  # up to float32
    within = before <= bound
    np.testing.assert_array_equal(plain[within], bounded[within])
    assert np.all(after[~within] >= bound / 10**0.25)  # one step of the grid less would be beyond


@each_case
def test_learned_affine_keeps_its_bound(case):
    bound = FITS["learned_affine"].moves.max_condition
    assert health(fitted("learned_affine", case), WIDTH, 32).condition <= bound * (1 + 1e-4)


@each_fit
def test_every_fit_is_stored_and_read_back_bit_for_bit(name):
    transform = fitted(name, "heavy tails")
    back = storage.from_arrays(*storage.to_arrays(transform))
    assert jax.tree.structure(back) == jax.tree.structure(transform)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(transform), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
@each_fit
def test_every_fit_on_a_real_models_massive_channel(name, data):
    with np.load(data / "activations/llama-3.2-1b.channel_absmax.npz") as maxima:
        absmax = maxima["model.layers.1.mlp.down_proj"]
    first = int(np.argmax(absmax)) // WIDTH * WIDTH
    absmax = absmax[first : first + WIDTH]
    assert absmax.max() > 500 * np.median(absmax)
    x = jax.random.normal(KEY, (4, 64, WIDTH))
    x = x / jnp.max(jnp.abs(x), axis=(0, 1)) * absmax
    weights = (jax.random.normal(jax.random.key(4), (48, WIDTH)),)
    transform = FITS[name](weights, stats_of(x), recipe(name, "even"), KEY).transform
    assert_stored_well(name, health_of(transform))


def test_wush_raises_its_damping_with_a_warning_and_names_nan(caplog):
    from duquantpp_jax.transforms.wush import wush

    alike = np.ones((1, 32, 32))
    forward, back = wush(alike, alike, 1e-20)
    np.testing.assert_allclose(forward @ back, np.eye(32)[None], atol=1e-3)
    assert caplog.messages[0].startswith("WUSH: damping raised from 1e-20 to 1e-")
    with pytest.raises(ValueError, match="NaN or Inf in 1024 numbers of the input's and 0 of"):
        wush(np.nan * alike, alike, 1e-3)
