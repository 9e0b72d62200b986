"""Few tokens in float times packed weights: every implementation against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duquantpp_jax.kernels.float_matvec import fixed_point, triton
from duquantpp_jax.kernels.float_matvec.api import float_matvec
from duquantpp_jax.kernels.matvec.api import FEW
from duquantpp_jax.kernels.matvec.rows import PackedRows
from duquantpp_jax.models.in_place import InPlace
from duquantpp_jax.models.prologue import Prologue, rms_norm
from tests.kernels.test_matvec import assert_equal, on_gpu, random_mx, wide

WIDTH = 32 * 35  # that no program divides


def tokens(seed, count, width=WIDTH):
    """Blocks of all sizes, in each of which numbers are of all sizes."""
    draw = np.random.default_rng(seed)
    sizes = draw.integers(-20, 20, (count, width // 32, 1)) - draw.integers(0, 9, (width // 32, 32))
    x = draw.standard_normal((count, width // 32, 32)) * 2.0**sizes
    return jnp.asarray(x.reshape(count, width), jnp.float32)


def assert_near(found, x, w):
    """As near as the bits that x keeps and float32 sums of blocks are."""
    x, w = np.asarray(x, np.float64), w.reshape(len(w), -1, 32)
    x = x.reshape(len(x), -1, 32)
    wanted = np.einsum("mbi,nbi->mn", x, w)
    kept = 2.0**-30 * np.einsum("mb,nbi->mn", np.abs(x).max(axis=-1), np.abs(w))
    sums = 2.0**-23 * x.shape[1] * np.abs(np.einsum("mbi,nbi->mnb", x, w)).sum(axis=-1)
    assert np.all(np.abs(np.asarray(found, np.float64) - wanted) <= kept + sums)


def interpreted(x, rows, layer):
    """What the kernels give, as a CPU interprets them."""
    given = fixed_point.to_fixed(Prologue((x,)), rows, layer, interpret=True)
    return rows.split(triton.matvec(given, rows, layer, interpret=True))


@pytest.mark.slow
def test_products_are_those_of_float64():
    """Widths that no program divides, linears that share an input, and each of two layers."""
    weights = [random_mx(seed, 2, n, WIDTH) for seed, n in enumerate((40, 9))]
    x, rows = tokens(5, 2), PackedRows.of(weights)
    run = jax.jit(lambda x, layer: interpreted(x, rows, layer))
    for layer in range(2):
        for ys in (float_matvec(x, rows, layer), run(x, jnp.int32(layer))):
            for y, w in zip(ys, weights, strict=True):
                assert_near(y, x, wide(w)[layer])


@pytest.mark.slow
def test_a_block_of_one_token_is_exact_and_what_is_not_finite_is_nan():
    """One block of bfloat16 numbers, whose sums have 24 bits; the third row's scale is NaN."""
    w = random_mx(1, 1, 64, 32, low=100, high=150)
    w = w.where(jnp.arange(64).reshape(1, 64, 1) != 2, random_mx(1, 1, 64, 32, low=255, high=255))
    draw = np.random.default_rng(0)
    x = jnp.asarray(draw.integers(-255, 256, (1, 32)) * 2.0 ** draw.integers(0, 8, (1, 32)))
    x, rows = x.astype(jnp.bfloat16), PackedRows.of([w])
    wanted = np.asarray(x, np.float64) @ wide(w)[0].T
    assert np.isnan(wanted[:, 2]).all()
    run = jax.jit(lambda x: interpreted(x.astype(jnp.float32), rows, jnp.int32(0))[0])
    for found in (float_matvec(x, rows)[0], run(x)):
        np.testing.assert_array_equal(found, wanted)
    for bad in (np.nan, np.inf, -np.inf):
        for found in (float_matvec(x.at[0, 3].set(bad), rows)[0], run(x.at[0, 3].set(bad))):
            assert np.isnan(found).all()


def test_a_token_is_moved_and_taken_in_fixed_point_as_the_law_says():
    """The kernel that moves tokens against float64: each number, and the bytes of it."""
    draw = np.random.default_rng(0)
    x = np.asarray(tokens(1, 2, 640), np.float64).reshape(2, 20, 32)
    x[0, 3], x[1, 4] = 0.0, x[1, 4] * 2.0**100
    signs = draw.choice([-1.0, 1.0], (1, 20, 32, 1))  # exact in any order of additions
    matrices = signs * np.eye(32)[draw.permutation(32)]
    moved = np.einsum("mbi,bij->mbj", x, matrices[0])
    rows = PackedRows.of([random_mx(0, 1, 8, 640)], jnp.asarray(matrices, jnp.float32))
    given = Prologue((jnp.asarray(x.reshape(2, 640), jnp.float32),))
    found = fixed_point.to_fixed(given, rows, jnp.int32(0), interpret=True)
    words, sums, exponents = (part[:, :20] for part in jax.tree.leaves(found))
    largest = np.abs(moved).max(axis=-1)
    exponent = np.where(largest > 0, np.frexp(largest)[1], -95)
    np.testing.assert_array_equal(exponents, exponent)
    whole = np.trunc(np.ldexp(moved, 31 - exponent[..., None])).astype(np.int64)
    np.testing.assert_array_equal(fixed_point.fixed(jnp.asarray(moved, jnp.float32))[0], whole)
    wanted = (whole[:, None] >> np.array([0, 8, 16, 24])[:, None, None]) & 255
    read = np.array(words).view(np.uint8).reshape(2, 4, 8, 20, 4)
    read = np.moveaxis(read, 3, 2).reshape(2, 4, 20, 32)
    np.testing.assert_array_equal(read, wanted)
    halves = 12 * np.stack([whole >> 16, whole & 0xFFFF], axis=1).sum(axis=-1)
    np.testing.assert_array_equal(sums, halves.reshape(4, 20))


def test_a_token_may_be_rounded_to_bfloat16_before():
    """Ties to even, and what rounds beyond the largest, which is NaN as it is in float32."""
    x = tokens(3, 2)
    x = x.at[0, :32].set(1 + jnp.arange(32) / 256).at[1, 40].set(np.finfo(np.float32).max)
    rows = PackedRows.of([random_mx(0, 1, 8, WIDTH)])
    (found,) = float_matvec(x, rows, dtype=jnp.bfloat16)
    (wanted,) = float_matvec(jax.lax.reduce_precision(x, 8, 7), rows)
    assert_equal(found, wanted)
    assert np.isnan(found[1]).all()
    assert not np.isnan(found[0]).any()
    with pytest.raises(ValueError, match="rounded to float32 or bfloat16, not float16"):
        float_matvec(x, rows, dtype="float16")


@pytest.mark.slow
def test_a_norm_an_activation_and_a_residual_are_those_before_and_after():
    """Kernels against the law: a norm without a matrix, an activation with one for each block."""
    gains = jnp.asarray(np.random.default_rng(0).uniform(0.5, 2, (1, WIDTH)), jnp.float32)
    x, up, w = *(tokens(seed, 2) for seed in (7, 8)), random_mx(0, 1, 32, WIDTH)
    eyes = jnp.broadcast_to(jnp.eye(32), (1, 35, 32, 32))
    layer, ones = jnp.int32(0), jnp.ones((2, 32))
    normed = Prologue((x,), InPlace(gains, layer), residual=ones, eps=1e-6)
    product = Prologue((x, up), residual=ones, activation=jnp.multiply)
    laws = rms_norm(x, gains[0], 1e-6, 0.0), x * up
    for given, law, matrices in zip((normed, product), laws, (None, eyes), strict=True):
        rows = PackedRows.of([w], matrices)
        assert_equal(float_matvec(given, rows)[0], float_matvec(law, rows)[0] + 1)
        fixed = fixed_point.to_fixed(given, rows, layer, interpret=True)
        y = triton.matvec(fixed, rows, layer, interpret=True)
        assert_near(y, law, wide(w)[0])
    assert_equal(triton.matvec(fixed, rows, layer, ones, interpret=True), y + 1)


def test_matrices_of_rows_move_the_input():
    draw = np.random.default_rng(0)
    matrices = jnp.asarray(np.eye(32)[draw.permutation(32)], jnp.float32)
    matrices = jnp.broadcast_to(matrices, (1, 35, 32, 32))
    w, x = random_mx(0, 1, 8, WIDTH), tokens(2, 1)
    moved = jnp.einsum("mbi,bij->mbj", x.reshape(1, 35, 32), matrices[0], precision="highest")
    (found,) = float_matvec(x, PackedRows.of([w], matrices))
    (wanted,) = float_matvec(moved.reshape(1, -1), PackedRows.of([w]))
    assert_equal(found, wanted)
    assert_near(found, moved.reshape(1, -1), wide(w)[0])


@on_gpu
@pytest.mark.parametrize("count", range(1, FEW + 1))
def test_a_gpu_gives_what_float64_gives(count):
    w, x = random_mx(0, 2, 272, 32 * 45), tokens(1, count, 32 * 45)
    matrices = jnp.broadcast_to(jnp.eye(32), (2, 45, 32, 32))
    for rows in (PackedRows.of([w]), PackedRows.of([w], matrices)):
        assert_near(float_matvec(x, rows, 1, implementation="triton")[0], x, wide(w)[1])


def test_what_does_not_fit_is_said():
    rows = PackedRows.of([random_mx(0, 1, 8, 64)])
    for shape in ((FEW + 1, 64), (1, 32)):
        with pytest.raises(ValueError, match="is not 1 to 4 tokens of 64 columns"):
            float_matvec(jnp.ones(shape), rows)
    if jax.default_backend() == "cpu":
        with pytest.raises(RuntimeError, match="cannot run as 'triton': it needs an NVIDIA GPU"):
            float_matvec(jnp.ones((1, 64)), rows, implementation="triton")
