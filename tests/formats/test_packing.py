"""Layouts lose nothing and put every byte where the hardware and other libraries look for it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duquantpp_jax.formats import MXFP4, MXFP6
from duquantpp_jax.formats.packing import (
    pack_blocks,
    pack_nibbles,
    swizzle_scales,
    unpack_nibbles,
    unswizzle_scales,
)


def codes_of(shape, seed=0, below=16):
    return jnp.asarray(np.random.default_rng(seed).integers(0, below, shape, np.uint8))


def test_lower_index_lies_in_the_low_nibble():
    packed = pack_nibbles(jnp.asarray([0x1, 0x2, 0xF, 0x0], jnp.uint8))
    assert packed.tolist() == [0x21, 0x0F]


def test_packing_is_the_bitcast_of_float4_pairs():
    codes = codes_of((3, 8))
    pairs = codes.astype(jnp.uint4).reshape(3, 4, 2)
    float4 = jax.lax.bitcast_convert_type(pairs, jnp.float4_e2m1fn)
    assert (jax.lax.bitcast_convert_type(float4, jnp.uint8) == pack_nibbles(codes)).all()


@settings(max_examples=12, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=2), st.integers(0, 5), st.integers(0, 99))
def test_unpacking_undoes_packing_for_every_shape(batch, width, seed):
    codes = codes_of((*batch, 2 * width), seed)
    packed = pack_nibbles(codes)
    assert packed.shape == (*batch, width)
    np.testing.assert_array_equal(unpack_nibbles(packed), codes)


def test_odd_width_is_refused():
    for shape in ((2, 3), ()):
        with pytest.raises(ValueError, match="leaves half a byte"):
            pack_nibbles(codes_of(shape))


@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 0, 32), (0, 32)])
def test_elements_of_blocks_are_packed_as_their_codes_are(shape):
    x = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)
    packed = pack_nibbles(MXFP4().quantize(x).codes())
    in_a_jit = jax.jit(lambda x: pack_blocks(MXFP4().encode(x)))(x)
    for found in (pack_blocks(MXFP4().quantize(x)), pack_blocks(MXFP4().encode(x)), in_a_jit):
        np.testing.assert_array_equal(found.reshape(packed.shape), packed)


def test_elements_that_do_not_fill_bytes_are_refused():
    with pytest.raises(ValueError, match="elements of 6 bits"):
        pack_blocks(MXFP6().quantize(jnp.ones((1, 32))))
    with pytest.raises(ValueError, match="block of 3 leaves half a byte"):
        pack_blocks(MXFP4(block_size=3).quantize(jnp.ones((1, 6))))


def offset(r, c, columns):
    """The published address of a scale, in bytes."""
    tile = (r // 128) * -(-columns // 4) + c // 4
    return tile * 512 + (r % 32) * 16 + ((r % 128) // 32) * 4 + c % 4


@pytest.mark.parametrize(("rows", "columns"), [(128, 4), (256, 12), (1, 1), (130, 5), (31, 9)])
def test_every_scale_lies_at_its_published_offset_and_the_rest_is_zero(rows, columns):
    scales = codes_of((rows, columns), below=255) + jnp.uint8(1)
    flat = np.asarray(swizzle_scales(scales)).ravel()
    expected = np.zeros(-(-rows // 128) * -(-columns // 4) * 512, np.uint8)
    for r in range(rows):
        for c in range(columns):
            expected[offset(r, c, columns)] = scales[r, c]
    np.testing.assert_array_equal(flat, expected)


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.integers(1, 3), max_size=2),
    st.integers(0, 300),
    st.integers(0, 11),
    st.integers(0, 99),
)
def test_unswizzling_undoes_swizzling_for_every_shape(batch, rows, columns, seed):
    scales = codes_of((*batch, rows, columns), seed, below=256)
    tiles = swizzle_scales(scales)
    assert tiles.shape[len(batch) :] == (-(-rows // 128), -(-columns // 4), 32, 16)
    np.testing.assert_array_equal(unswizzle_scales(tiles, rows, columns), scales)


def test_shape_that_the_tiles_do_not_hold_is_refused():
    tiles = swizzle_scales(codes_of((128, 4)))
    with pytest.raises(ValueError, match="1 x 1 tiles of 128 x 4 do not hold 129 x 4"):
        unswizzle_scales(tiles, 129, 4)
    with pytest.raises(ValueError, match="rows and columns, not 1"):
        swizzle_scales(codes_of((4,)))
