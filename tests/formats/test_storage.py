"""What is saved is loaded again, bit for bit, and other files are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from duquantpp_jax.formats import MXFP4, MXFP6, MXFP8, NVFP4, Log256
from duquantpp_jax.formats.elements import E3M2, E5M2
from duquantpp_jax.formats.packing import pack_nibbles
from duquantpp_jax.formats.storage import load, pack_codes, save, unpack_codes

FORMATS = {
    "mxfp4": MXFP4(),
    "mxfp6": MXFP6(),
    "mxfp6_e3m2": MXFP6(E3M2),
    "mxfp8": MXFP8(),
    "mxfp8_e5m2": MXFP8(E5M2),
    "nvfp4": NVFP4(),
    "log256": Log256(),
    "odd": MXFP4(block_size=3),
}


def arrays():
    x = jax.random.normal(jax.random.key(0), (3, 5, 96)).at[0, 0, 0].set(jnp.nan)
    return {name: format.quantize(x[..., :93] if name == "odd" else x)
            for name, format in FORMATS.items()}  # fmt: skip


def test_loading_gives_what_was_saved_bit_for_bit(tmp_path):
    saved = arrays()
    save(tmp_path / "x.safetensors", saved)
    loaded = load(tmp_path / "x.safetensors")
    assert loaded.keys() == saved.keys()
    for name, q in saved.items():
        again = loaded[name]
        assert jax.tree.structure(again) == jax.tree.structure(q)
        for mine, theirs in zip(jax.tree.leaves(again), jax.tree.leaves(q), strict=True):
            assert mine.dtype == theirs.dtype
            np.testing.assert_array_equal(np.asarray(mine).tobytes(), np.asarray(theirs).tobytes())


def test_file_holds_packed_codes_and_scale_bytes(tmp_path):
    x = jax.random.normal(jax.random.key(1), (2, 64))
    q = MXFP4().quantize(x)
    save(tmp_path / "x.safetensors", {"w": q})
    with safe_open(tmp_path / "x.safetensors", framework="numpy") as file:
        np.testing.assert_array_equal(file.get_tensor("w.codes"), pack_nibbles(q.codes()).ravel())
        np.testing.assert_array_equal(file.get_tensor("w.scales"), q.scale_bytes())
        assert set(file.keys()) == {"w.codes", "w.scales"}


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


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"w": np.zeros(3, np.float32)}, path)
    with pytest.raises(ValueError, match="says format None"):
        load(path)
    save(path, {"w": MXFP4().quantize(jnp.ones((2, 32)))})
    with safe_open(path, framework="numpy") as file:
        metadata, codes = file.metadata(), file.get_tensor("w.codes")
    save_file({"w.codes": codes}, path, metadata)
    with pytest.raises(ValueError, match="w has no codes or no scales"):
        load(path)
    save_file({"w.codes": codes[:-1], "w.scales": np.zeros((2, 1), np.uint8)}, path, metadata)
    with pytest.raises(ValueError, match=r"needs 32 bytes of codes .* the file has \(31,\)"):
        load(path)


def test_a_failed_save_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match='cannot be named "format"'):
        save(tmp_path / "x.safetensors", {"format": MXFP4().quantize(jnp.ones((1, 32)))})
    assert not list(tmp_path.iterdir())
