"""Few tokens times packed weights: every implementation against float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duquantpp_jax.core import MXArray, ScaleRule
from duquantpp_jax.formats import E2M1, MXFP4
from duquantpp_jax.kernels.matvec import move, reference, triton, unpack
from duquantpp_jax.kernels.matvec.api import FEW, matvec, quantized_matvec, unpacked
from duquantpp_jax.kernels.matvec.rows import PackedRows
from duquantpp_jax.kernels.matvec.tokens import Tokens
from duquantpp_jax.models.in_place import InPlace
from duquantpp_jax.models.layers import ACTIVATIONS
from duquantpp_jax.models.prologue import Prologue

on_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")


RULE = ScaleRule.EVEN


def random_mx(seed, *shape, low=60, high=180):
    """Every code is as likely, and every scale byte from low to high."""
    draw = np.random.default_rng(seed)
    codes = jnp.asarray(draw.integers(0, 16, shape).astype(np.uint8))
    scale_bytes = draw.integers(low, high + 1, (*shape[:-1], shape[-1] // 32)).astype(np.uint8)
    scales = jax.lax.bitcast_convert_type(jnp.asarray(scale_bytes), jnp.float8_e8m0fnu)
    return MXArray(codes, scales, element=E2M1, block_size=32)


def wide(q):
    return np.asarray(q.dequantize(), np.float64)


def assert_equal(a, b):
    """The same numbers, of whatever float types, and NaN in the same places."""
    np.testing.assert_array_equal(*(np.asarray(x.astype(jnp.float32)) for x in (a, b)))


def assert_near(found, x, w, blocks):
    """As near to the product as float32 sums of so many exact numbers are."""
    bound = 2.0**-23 * blocks * np.abs(x) @ np.abs(w)
    assert np.all(np.abs(np.asarray(found, np.float64) - x @ w) <= bound)


@pytest.mark.slow
def test_products_are_those_of_float64():
    """Widths that no program divides, linears that share an input, and each of two layers."""
    weights = [random_mx(seed, 2, n, 32 * 35) for seed, n in enumerate((40, 9))]
    x, rows = random_mx(5, 2, 32 * 35), PackedRows.of(weights)
    run = jax.jit(lambda x, layer: triton.matvec(x, rows, layer, interpret=True))
    for layer in range(2):
        found = [
            matvec(x, rows, layer, implementation="reference"),
            run(Tokens.of(x, rows), jnp.int32(layer)),
        ]
        for number, w in enumerate(weights):
            factors = wide(x), wide(w)[layer].T
            bound = 2.0**-23 * 35 * np.abs(factors[0]) @ np.abs(factors[1])
            for ys in found:
                assert np.all(
                    np.abs(np.asarray(ys[number], np.float64) - np.matmul(*factors)) <= bound
                )


@pytest.mark.slow
def test_the_sum_of_a_block_is_exact_and_nan_stays_nan():
    """One block: a sum has 13 bits, so float32 holds it; the third row's scale is NaN."""
    w = random_mx(1, 1, 64, 32, low=100, high=150)
    w = w.where(jnp.arange(64).reshape(1, 64, 1) != 2, random_mx(1, 1, 64, 32, low=255, high=255))
    x, rows = random_mx(2, 1, 32, low=100, high=150), PackedRows.of([w])
    wanted = wide(x) @ wide(w)[0].T
    assert np.isnan(wanted[:, 2]).all()
    run = jax.jit(lambda x: triton.matvec(x, rows, jnp.int32(0), interpret=True))
    for found in (matvec(x, rows)[0], run(Tokens.of(x, rows))[0]):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("rule", [ScaleRule.FLOOR, ScaleRule.EVEN], ids=lambda rule: rule.value)
def test_a_token_is_moved_and_quantized_as_its_format_says(rule):
    """Ties of every step, zeros of both signs, blocks of all sizes, and NaN."""
    draw = np.random.default_rng(0)
    x = draw.standard_normal((2, 20, 32)) * 2.0 ** draw.integers(-120, 120, (2, 20, 1))
    x[0, :2] = np.arange(64).reshape(2, 32) / 8
    x[1, 0], x[1, 1], x[1, 2, 5] = -0.0, -x[0, 1], np.nan
    matrices = _moves(1, 20)
    moved = np.einsum("mbi,bij->mbj", np.where(np.isnan(x), 0, x), matrices[0])
    moved[1, 2] = np.nan
    wanted = MXFP4(scale_rule=rule).encode(moved.reshape(2, -1).astype(np.float32))
    rows = PackedRows.of([random_mx(0, 1, 8, 640)], matrices)
    given = Prologue((jnp.asarray(x.reshape(2, -1), jnp.float32),))
    found = move.to_tokens(given, rows.matrices, jnp.int32(0), rule, interpret=True)
    expected = Tokens.of(wanted, rows)
    np.testing.assert_array_equal(found.scale_bytes, expected.scale_bytes)
    # The elements of a block that is NaN are zero whatever their signs.
    np.testing.assert_array_equal(found.words, expected.words)
    ys = quantized_matvec(jnp.asarray(x[:1].reshape(1, -1), jnp.float32), rows, scale_rule=rule)
    np.testing.assert_array_equal(
        ys[0], rows.split(reference.matvec(expected, rows, jnp.int32(0)))[0][:1]
    )


def _moves(layers, blocks):
    """A permutation of each block with signs, which moves exactly."""
    draw = np.random.default_rng(0)
    signs = draw.choice([-1.0, 1.0], (layers, blocks, 32, 1))
    return jnp.asarray(signs * np.eye(32)[draw.permutation(32)], jnp.float32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["norm", "activation", "neither"])
def test_what_precedes_a_move_is_applied_in_its_kernel(kind, dtype):
    """Integers, whose squares add up exactly in any order; the second layer's gain."""
    draw = np.random.default_rng(1)
    parts = tuple(jnp.asarray(draw.integers(-40, 41, (2, 640)), jnp.float32) for _ in range(2))
    gain = InPlace(jnp.asarray(draw.uniform(0.5, 2, (2, 640)), jnp.bfloat16), jnp.int32(1))
    if kind == "norm":
        x = Prologue(parts[:1], gain, eps=1e-5, offset=1.0, dtype=dtype)
    elif kind == "activation":
        x = Prologue(parts, activation=ACTIVATIONS["silu"], dtype=dtype)
    else:
        x = Prologue((parts[0].astype(dtype),), dtype=dtype)
    rows = PackedRows.of([random_mx(0, 2, 8, 640)], _moves(2, 20))
    run = jax.jit(lambda x: move.to_tokens(x, rows.matrices, jnp.int32(1), RULE, interpret=True))
    moved = jnp.einsum(
        "mbi,bij->mbj", x.applied().reshape(2, 20, 32).astype(jnp.float32), _moves(2, 20)[1]
    )
    wanted = Tokens.of(MXFP4(scale_rule=RULE).encode(moved.reshape(2, -1)), rows)
    found = run(x)
    np.testing.assert_array_equal(found.scale_bytes, wanted.scale_bytes)
    np.testing.assert_array_equal(found.words, wanted.words)


def test_a_product_adds_the_residual():
    x, rows = random_mx(2, 1, 96, low=120, high=130), PackedRows.of([random_mx(1, 1, 40, 96)])
    added = jax.random.normal(jax.random.key(0), (1, 40))
    run = jax.jit(lambda *more: triton.matvec(Tokens.of(x, rows), rows, *more, interpret=True))
    (alone,), (both,) = run(jnp.int32(0)), run(jnp.int32(0), added)
    np.testing.assert_array_equal(both, alone + added)


def test_rows_are_unpacked_exactly():
    """Every scale byte; and without .5 where Triton is interpreted, which a CPU flushes."""
    w = random_mx(3, 2, 40, 32 * 35, low=0, high=255)
    rows = PackedRows.of([w])
    for layer in range(2):
        found = unpacked(rows, layer, implementation="reference")
        assert found.dtype == jnp.bfloat16
        assert_equal(found[:40], w.dequantize()[layer])
    codes = jnp.where(w.codes() & 7 == 1, 2, w.codes())
    scales = jax.lax.bitcast_convert_type(jnp.maximum(w.scale_bytes(), 2), w.scales.dtype)
    rows = PackedRows.of([dataclasses.replace(w, elements=codes, scales=scales)])
    run = jax.jit(lambda layer: unpack.unpacked(rows, layer, interpret=True))
    assert_equal(run(jnp.int32(1)), unpacked(rows, 1, implementation="reference"))


@on_gpu
def test_a_gpu_unpacks_every_code_and_scale():
    rows = PackedRows.of([random_mx(3, 2, 40, 32 * 35, low=0, high=255)])
    assert_equal(*(unpacked(rows, 1, implementation=i) for i in ("triton", "reference")))


@on_gpu
@pytest.mark.parametrize("tokens", range(1, FEW + 1))
def test_a_gpu_gives_what_float64_gives(tokens):
    w, x = random_mx(0, 2, 272, 32 * 45), random_mx(1, tokens, 32 * 45)
    (found,) = matvec(x, PackedRows.of([w]), 1, implementation="triton")
    assert_near(found, wide(x), wide(w)[1].T, blocks=45)


def test_what_does_not_fit_is_said():
    rows = PackedRows.of([random_mx(0, 1, 8, 64)])
    x = random_mx(1, 2, 64)
    with pytest.raises(ValueError, match=r"takes 1 to 4 tokens \[m, k\] in MXFP4"):
        matvec(random_mx(1, FEW + 1, 64), rows)
    with pytest.raises(ValueError, match="tokens have 32 columns and weights 64"):
        matvec(random_mx(1, 1, 32), rows)
    with pytest.raises(ValueError, match="needs rows with matrices"):
        quantized_matvec(jnp.ones((1, 64)), rows)
    if jax.default_backend() == "cpu":
        with pytest.raises(RuntimeError, match="cannot run as 'triton': it needs an NVIDIA GPU"):
            matvec(x, rows, implementation="triton")
