"""Arrays come back from their tensors bit for bit, and other tensors are refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duquantpp_jax import recipes
from duquantpp_jax.formats import MXFP4
from duquantpp_jax.formats.packing import pack_nibbles
from duquantpp_jax.formats.tensors import from_tensors, pack_codes, to_tensors, unpack_codes

FORMATS = {name: f for name, f in recipes.FORMATS.items() if f.holds_weights}
FORMATS |= {"odd": MXFP4(block_size=3)}


def arrays():
    x = jax.random.normal(jax.random.key(0), (3, 5, 96)).at[0, 0, 0].set(jnp.nan)
    return {name: format.quantize(x[..., :93] if name == "odd" else x)
            for name, format in FORMATS.items()}  # fmt: skip


@pytest.mark.slow
def test_arrays_come_back_from_their_tensors_bit_for_bit():
    for name, q in arrays().items():
        tensors, about = to_tensors(name, q)
        again = from_tensors(name, json.loads(json.dumps(about)), tensors)
        assert jax.tree.structure(again) == jax.tree.structure(q)
        for mine, theirs in zip(jax.tree.leaves(again), jax.tree.leaves(q), strict=True):
            assert mine.dtype == theirs.dtype
            np.testing.assert_array_equal(np.asarray(mine).tobytes(), np.asarray(theirs).tobytes())


def test_tensors_are_packed_codes_and_scale_bytes():
    q = MXFP4().quantize(jax.random.normal(jax.random.key(1), (2, 64)))
    tensors, _ = to_tensors("w", q)
    np.testing.assert_array_equal(tensors["w.codes"], pack_nibbles(q.codes()).ravel())
    np.testing.assert_array_equal(tensors["w.scales"], q.scale_bytes())
    assert set(tensors) == {"w.codes", "w.scales"}


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5), (2, 2, 7)])
def test_packing_loses_nothing_for_any_shape(bits, shape):
    codes = np.random.default_rng(0).integers(0, 1 << bits, shape, np.uint8)
    packed = pack_codes(codes, bits)
    assert packed.size == -(-codes.size * bits // 8)
    np.testing.assert_array_equal(unpack_codes(packed, bits, shape), codes)


def test_six_bit_codes_lie_lowest_bits_first():
    codes = np.array([0b000001, 0b100000, 0b111111, 0b010101], np.uint8)
    number = sum(int(c) << 6 * i for i, c in enumerate(codes))
    assert pack_codes(codes, 6).tolist() == list(number.to_bytes(3, "little"))


def test_tensors_that_do_not_fit_are_refused():
    tensors, about = to_tensors("w", MXFP4().quantize(jnp.ones((2, 32))))
    with pytest.raises(ValueError, match="w has no codes or no scales"):
        from_tensors("w", about, {"w.codes": tensors["w.codes"]})
    with pytest.raises(ValueError, match=r"needs 32 bytes of codes .* the file has \(31,\)"):
        from_tensors("w", about, tensors | {"w.codes": tensors["w.codes"][:-1]})
    with pytest.raises(ValueError, match="of float32"):
        from_tensors("w", about, tensors | {"w.scales": tensors["w.scales"].astype(np.float32)})
