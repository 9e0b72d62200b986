"""Other libraries on the same blocks: equal where they should be, different where it is known.

The files were made by tests/goldens/make.py, which names the versions.
"""

import pathlib

import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from duquantpp_jax.core import ElementRounding, ScaleRule
from duquantpp_jax.formats import MX, MXFP4, MXFP8, NVFP4
from duquantpp_jax.formats.packing import pack_nibbles, unpack_nibbles

HERE = pathlib.Path(__file__).parent.parent / "goldens"
ELEMENTS = pytest.mark.parametrize("element", oracle.ELEMENTS, ids=repr)


def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(HERE / f"{name}.npz", allow_pickle=False) as file:
        return dict(file)


X = golden("inputs")["x"]
AMAX = np.abs(X).max(axis=-1)
ZERO = AMAX == 0


def test_inputs_hold_what_tells_libraries_apart():
    assert X.shape == (96, 32)
    assert ZERO.sum() >= 2
    assert (AMAX[~ZERO] < 2.0**-126).any()
    assert (AMAX > 2.0**127).any()
    for amax in (1, 1.5, 1.75, 3.5, 5, 6, 6.5, 7, 448, 57344):
        assert amax in AMAX


@ELEMENTS
@pytest.mark.parametrize("rule", ["floor", "ceil", "even", "rceil"])
def test_torchao_agrees_but_for_elements_under_the_smallest_scale(element, rule):
    theirs = golden("torchao")
    codes = theirs[f"{element.name}.{rule}.codes"]
    if element.bits == 4:
        codes = np.asarray(unpack_nibbles(jnp.asarray(codes)))
    q = MX(element, scale_rule=ScaleRule(rule)).quantize(X)
    bytes_ = np.asarray(q.scale_bytes())
    np.testing.assert_array_equal(bytes_, theirs[f"{element.name}.{rule}.bytes"])
    smallest = bytes_[:, 0] == 0  # torchao divides by 2^-126 there, or by 1, and not by 2^-127
    np.testing.assert_array_equal(np.asarray(q.codes())[~smallest], codes[~smallest])
    differs = (np.asarray(q.codes()) != codes).any(axis=-1)
    assert differs.any()
    assert (differs <= (smallest & ~ZERO)).all()


@pytest.mark.parametrize(("bits", "name"), [(4, "e2m1"), (6, "e2m3")])
def test_compressed_tensors_has_the_bytes_of_even_where_its_scale_is_finite(bits, name):
    theirs = golden("compressed_tensors")[f"bytes{bits}"]
    element = next(e for e in oracle.ELEMENTS if e.name == name)
    bytes_ = np.asarray(MX(element, scale_rule=ScaleRule.EVEN).quantize(X).scale_bytes())[:, 0]
    finite = np.isfinite(theirs) & (theirs >= 0)
    np.testing.assert_array_equal(bytes_[finite], theirs[finite])
    assert (bytes_[~finite] == 0).sum() >= 5  # it has no smallest scale: -Inf, and below zero
    assert 85 < finite.sum() < 96


def test_compressed_tensors_rounds_the_amax_of_mxfp8_to_one_bit_and_not_to_three():
    theirs = golden("compressed_tensors")["bytes8"]
    bytes_ = np.asarray(MXFP8(scale_rule=ScaleRule.EVEN).quantize(X).scale_bytes())[:, 0]
    finite = np.isfinite(theirs) & (theirs >= 0)
    mantissa = np.frexp(AMAX)[0] * 2
    one_bit = (mantissa >= 1.75) & (mantissa < 1.9375)
    np.testing.assert_array_equal((theirs - bytes_)[finite], one_bit[finite])
    assert one_bit[finite].sum() > 10


def test_compressed_tensors_packs_the_lower_index_into_the_low_nibble():
    theirs = golden("compressed_tensors")
    codes = MXFP4(block_size=16).quantize(theirs["values"]).codes()
    np.testing.assert_array_equal(pack_nibbles(codes), theirs["packed"])


@ELEMENTS
def test_microxcaling_agrees_and_its_nearest_is_away_from_zero(element):
    theirs = golden("microxcaling")
    found = {r: np.asarray(MX(element, rounding=r).fake_quantize(X)) for r in oracle.DETERMINISTIC}
    even, away = found[ElementRounding.NEAREST_EVEN], found[ElementRounding.AWAY]
    np.testing.assert_array_equal(even, theirs[f"{element.name}.even"])
    np.testing.assert_array_equal(away, theirs[f"{element.name}.nearest"])
    assert (even != away).any() == (
        theirs[f"{element.name}.even"] != theirs[f"{element.name}.nearest"]
    ).any()
    if element.name == "e2m1":
        assert (even != away).sum() > 10


@pytest.mark.parametrize("format", [MXFP4, MXFP8], ids=lambda f: f.__name__)
def test_qwix_has_the_scales_of_rceil_but_for_log2_and_flushes_tiny_blocks(format):
    theirs = golden("qwix")
    name = format.__name__.lower()
    q = format(scale_rule=ScaleRule.RCEIL).quantize(X)
    scales = np.ldexp(1.0, np.asarray(q.scale_bytes(), int) - 127)
    same = (scales == theirs[f"{name}.scales"])[:, 0]
    values = np.asarray(q.elements.astype(jnp.float32))
    np.testing.assert_array_equal(values[same], theirs[f"{name}.values"][same])
    flushed = theirs[f"{name}.scales"][:, 0] == 1
    assert (AMAX[~same & flushed] < 2.0**-60).all()
    log2_wrong = ~same & ~flushed
    assert (theirs[f"{name}.scales"] / scales)[log2_wrong].tolist() in ([], [[2.0]])
    assert log2_wrong.sum() == (1 if name == "mxfp8" else 0)
    assert (~same & flushed).sum() >= 8


def test_torchao_nvfp4_agrees_but_for_block_scales_below_two_to_the_minus_six():
    theirs, x = golden("torchao"), X[:24].reshape(-1, 16)
    q = NVFP4().quantize(x)
    assert float(q.tensor_scale) == theirs["nvfp4.tensor_scale"]
    bytes_, codes = np.asarray(q.scale_bytes()), np.asarray(q.codes())
    np.testing.assert_array_equal(np.maximum(bytes_, 8), theirs["nvfp4.bytes"])
    assert (bytes_ < 8).any()
    same = bytes_[:, 0] >= 8
    packed = np.asarray(pack_nibbles(jnp.asarray(codes)))
    np.testing.assert_array_equal(packed[same], theirs["nvfp4.codes"][same])


def test_compressed_tensors_has_the_bits_of_calibrated_nvfp4():
    theirs = golden("compressed_tensors")
    q = NVFP4(calibrated=True).quantize(theirs["nvfp4.x"])
    assert float(q.tensor_scale) == 1 / theirs["nvfp4.reciprocal"]
    bytes_ = np.asarray(q.scale_bytes())
    np.testing.assert_array_equal(bytes_, theirs["nvfp4.bytes"])
    np.testing.assert_array_equal(pack_nibbles(q.codes()), theirs["nvfp4.codes"])
    assert 1 < (bytes_ == 0x20).sum() < 24  # 2^-3 in place of zero


def test_four_over_six_agrees_with_its_authors():
    theirs, x = golden("fouroversix"), X[:24].reshape(-1, 16)
    q = NVFP4(four_over_six=True).quantize(x)
    np.testing.assert_array_equal(q.scale_bytes(), theirs["bytes"])
    np.testing.assert_array_equal(q.elements.astype(jnp.float32), theirs["values"])
    six = NVFP4().quantize(x, tensor_scale=q.tensor_scale)
    assert 5 < (np.asarray(six.scale_bytes()) != theirs["bytes"]).sum() < 43
