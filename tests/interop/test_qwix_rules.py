"""Formats and rotations of this package inside rules of qwix, and MXFP4 arrays there and back."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from duquantpp_jax import MXFP4, MXFP8, MXLinear, ScaleRule, quantize
from duquantpp_jax.interop import from_qwix, qwix_provider, to_qwix
from tests.nnx_models import WIDTH, Mlp

qwix = pytest.importorskip("qwix", reason="the extra qwix")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:qwix", "ignore:The 'm.iter")

RNG = np.random.default_rng(0)
X = RNG.standard_normal((64, WIDTH), np.float32)
X[:, 3] *= 30
EVEN = qwix.QuantizationRule(weight_qtype="mxfp4:even", act_qtype="mxfp4:even")


@pytest.fixture(scope="module")
def mlp():
    made = Mlp(WIDTH, WIDTH, nnx.Rngs(0))
    made.eval()
    return made


def same(a, b):
    """Equal, up to a code that a sum in another order rounds otherwise."""
    return np.mean(np.isclose(a, b, rtol=1e-5, atol=1e-5)) > 0.99


def test_a_rule_of_qwix_computes_what_our_quantize_does(mlp):
    ours, _ = quantize(mlp, "block_hadamard", [X])  # under the rule floor
    floor = qwix.QuantizationRule(weight_qtype="mxfp4", act_qtype="mxfp4")
    theirs = qwix.quantize_model(mlp, qwix_provider([floor], "block_hadamard"), X)
    plain = qwix.quantize_model(mlp, qwix_provider([floor]), X)
    assert same(theirs(X), ours(X))
    assert not same(theirs(X), plain(X))
    assert not same(theirs(X), mlp(X))


def test_transforms_that_were_fitted_are_applied_by_path(mlp):
    ours, _ = quantize(mlp, "duquantpp", [X])
    modules = nnx.iter_modules(ours)
    moves = {"/".join(path): m.site.transform for path, m in modules if isinstance(m, MXLinear)}
    floor = qwix.QuantizationRule(weight_qtype="mxfp4", act_qtype="mxfp4")
    theirs = qwix.quantize_model(mlp, qwix_provider([floor], moves), X)
    assert sorted(moves) == ["first", "second"]
    assert same(theirs(X), ours(X))


def test_only_matched_modules_are_rounded_and_gradients_pass_straight_through(mlp):
    rule = qwix.QuantizationRule(module_path="first", weight_qtype="mxfp4:even")
    model = qwix.quantize_model(mlp, qwix_provider([rule], "block_hadamard"), X)
    gradient = nnx.grad(lambda m: (m(X) ** 2).sum())(model)
    expected = nnx.grad(lambda m: (m(X) ** 2).sum())(mlp)
    cosine = [
        (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())
        for a, b in zip(*map(jax.tree.leaves, (gradient, expected)), strict=True)
    ]
    assert min(cosine) > 0.95


def test_what_formats_here_do_not_do_is_refused(mlp):
    with pytest.raises(ValueError, match="duquantpp is fitted to inputs"):
        qwix_provider([EVEN], "duquantpp")
    for field, told in (
        ({"weight_qtype": "int3"}, "int3"),
        ({"weight_qtype": jnp.int8}, "names of formats"),
        ({"tile_size": 16}, "blocks of 32"),
        ({"weight_calibration_method": "rms,7"}, "chooses its scales itself"),
    ):
        fields = {"weight_qtype": "mxfp4", **field}
        with pytest.raises(ValueError, match=told):
            qwix_provider([qwix.QuantizationRule(**fields)])

    class Attention(nnx.Module):
        def __call__(self, x):
            return jnp.einsum("bi,bi->b", x, x)

    with pytest.raises(ValueError, match=r"no product of an input with one matrix"):
        qwix.quantize_model(Attention(), qwix_provider([EVEN]), X)


@pytest.mark.parametrize(("format", "axis"), [(MXFP4(), 0), (MXFP8(), -1)])
def test_arrays_go_there_and_back_bit_for_bit(format, axis):
    q = format.quantize(np.ldexp(X, RNG.integers(-99, 99, (64, 1))))
    theirs = to_qwix(q, axis)
    assert theirs.shape == (X.T if axis == 0 else X).shape
    plain = qwix.dequantize(theirs)
    np.testing.assert_array_equal(plain.T if axis == 0 else plain, q.dequantize())
    back = from_qwix(theirs)
    np.testing.assert_array_equal(back.codes(), q.codes())
    np.testing.assert_array_equal(back.scale_bytes(), q.scale_bytes())


def test_its_scale_is_our_rceil_and_one_in_blocks_below_its_least():
    blocks = X * np.float32(2.0) ** np.arange(-104, 88, 3, dtype=np.float32)[:, None]
    blocks[0] = 0
    theirs = from_qwix(qwix.quantize(jnp.asarray(blocks.T), "mxfp4", tiled_axes={0: 32},
                                     channelwise_axes=(1,)))  # fmt: skip
    ours = MXFP4(scale_rule=ScaleRule.RCEIL).quantize(blocks)
    least = np.abs(blocks).reshape(64, -1, 32).max(axis=-1) / 6 < 2.0**-63
    assert 20 < least.sum() < 40
    np.testing.assert_array_equal(np.asarray(theirs.scale_bytes())[least], 127)
    assert not np.asarray(theirs.dequantize()).reshape(64, -1, 32)[least].any()
    np.testing.assert_array_equal(theirs.scale_bytes()[~least], ours.scale_bytes()[~least])
    floor = MXFP4().quantize(blocks).scale_bytes()
    assert (np.asarray(floor) != np.asarray(ours.scale_bytes())).mean() > 0.1


def test_arrays_that_have_no_counterpart_are_refused():
    with pytest.raises(ValueError, match="blocks of 16"):
        to_qwix(MXFP4(block_size=16).quantize(X))
    with pytest.raises(ValueError, match="2\\^-127"):
        to_qwix(MXFP4().quantize(X * np.float32(2.0**-126)))
    with pytest.raises(ValueError, match="only mxfp4 and mxfp8"):
        from_qwix(qwix.quantize(jnp.asarray(X), jnp.int8, channelwise_axes=(0,)))
    whole = to_qwix(MXFP4().quantize(X))
    with pytest.raises(ValueError, match="no power of two"):
        from_qwix(whole.replace(scale=whole.scale * 1.5))


def test_the_code_of_its_page_runs():
    page = (pathlib.Path(__file__).parents[2] / "docs/qwix.md").read_text(encoding="utf-8")
    names = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, names)  # what the page tells a reader to type
    assert names["y"].shape == (8, 64)
    np.testing.assert_array_equal(names["again"].qvalue, names["kernel"].qvalue)
    np.testing.assert_array_equal(names["again"].scale, names["kernel"].scale)
