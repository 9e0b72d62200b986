"""Every implementation of quantize_pack gives the bytes of the formats."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duquantpp_jax.core import MXArray
from duquantpp_jax.formats import E2M1, MXFP4
from duquantpp_jax.formats.packing import pack_nibbles, unpack_nibbles
from duquantpp_jax.kernels.block_scale import RAISED_ABOVE
from duquantpp_jax.kernels.quantize_pack import reference, triton
from duquantpp_jax.kernels.quantize_pack.api import quantize_pack, unpack_dequantize

RULES = pytest.mark.parametrize("rule", list(RAISED_ABOVE), ids=lambda r: r.value)
on_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")


def every_bfloat16() -> jax.Array:
    """Every pattern in blocks of neighbours, and random ones in blocks of like size."""
    bits = np.arange(1 << 16, dtype=np.uint16).reshape(-1, 64)
    mixed = np.random.default_rng(0).integers(0, 1 << 16, (2048, 64)).astype(np.uint16)
    exponents = np.repeat(np.arange(256, dtype=np.uint16), 8)[:, None]
    near = (mixed & 0x81FF) | (np.minimum(exponents, 252) << 7)
    return jax.lax.bitcast_convert_type(jnp.asarray(np.r_[bits, mixed, near]), jnp.bfloat16)


def assert_same(got, expected):
    for mine, theirs in zip(got, expected, strict=True):
        np.testing.assert_array_equal(mine, theirs)


@RULES
def test_reference_gives_codes_and_bytes_of_the_format(rule):
    x = every_bfloat16()
    q = MXFP4(scale_rule=rule).quantize(x)
    expected = pack_nibbles(q.codes()), q.scale_bytes()
    assert_same(quantize_pack(x, scale_rule=rule, implementation="reference"), expected)


@RULES
def test_triton_gives_the_same_bytes_where_a_cpu_can_interpret_it(rule):
    """The largest of a block takes every bfloat16 significand: each rule's border is among them."""
    # A CPU flushes what stands for elements below 1, so here there are none.
    rng = np.random.default_rng(1)
    largest = 8 * (1 + np.arange(192) % 128 / 128)[:, None]
    x = largest * rng.uniform(0.5, 1, (192, 32))
    x[:, 7:8] = largest
    x = (x * rng.choice([-1, 1], x.shape)).reshape(96, 64) * 2.0 ** rng.integers(-90, 90, (96, 1))
    x[3, 5], x[4, 40], x[5] = np.nan, -np.inf, 0
    x = jnp.asarray(x, jnp.bfloat16)
    assert_same(triton.quantize_pack(x, rule, interpret=True), reference.quantize_pack(x, rule))


@on_gpu
@RULES
def test_triton_gives_the_same_bytes_for_every_bfloat16(rule):
    x = every_bfloat16()
    assert_same(
        quantize_pack(x, scale_rule=rule, implementation="triton"),
        quantize_pack(x, scale_rule=rule, implementation="reference"),
    )


def test_what_cannot_run_is_refused_with_the_reason():
    x = jnp.ones((1, 32), jnp.bfloat16)
    if jax.default_backend() != "gpu":
        with pytest.raises(RuntimeError, match="needs an NVIDIA GPU, and this is cpu"):
            quantize_pack(x, implementation="triton")
    with pytest.raises((ValueError, TypeError), match="cuda"):
        quantize_pack(x, implementation="cuda")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not a multiple of block 32"):
        quantize_pack(x[:, :8])


def test_every_code_under_every_scale_is_its_number():
    packed = jnp.tile(jnp.arange(256, dtype=jnp.uint8), (256, 1))
    byte = jnp.tile(jnp.arange(256, dtype=jnp.uint8)[:, None], (1, 16))
    scales = jax.lax.bitcast_convert_type(byte, jnp.float8_e8m0fnu)
    q = MXArray(unpack_nibbles(packed), scales, element=E2M1, block_size=32)
    expected = np.asarray(q.dequantize())
    eager, jitted = unpack_dequantize(packed, byte), jax.jit(unpack_dequantize)(packed, byte)
    for got in (eager, jitted):
        np.testing.assert_array_equal(np.asarray(got).view(np.uint32), expected.view(np.uint32))


def test_there_and_back_is_fake_quantize():
    x = jax.random.normal(jax.random.key(0), (3, 5, 96))
    np.testing.assert_array_equal(unpack_dequantize(*quantize_pack(x)), MXFP4().fake_quantize(x))
    packed, byte = quantize_pack(x)
    with pytest.raises(ValueError, match="a block of 32 has 16 bytes"):
        unpack_dequantize(packed[..., :-2], byte)
