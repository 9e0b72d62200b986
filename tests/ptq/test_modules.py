"""Any flax nnx module: its linears get what the walk gives a decoder's; it is called as before."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from duquantpp_jax import (
    MXFP4,
    MXLinear,
    Plan,
    convert,
    quantize,
    quantize_decoder,
)
from duquantpp_jax.models import SITE_WEIGHTS, SITES, Decoder
from duquantpp_jax.models.attention import HIGHEST
from duquantpp_jax.models.layers import layer, positional_of, rms_norm
from duquantpp_jax.ptq.mx_linear import Contraction
from duquantpp_jax.recipes import recipe
from tests.conftest import tiny_decoder
from tests.nnx_models import INIT, DecoderOnly, Mixer, Mlp, Vit, batch_of, drawn


class Block(nnx.Module):
    """A layer of our decoder whose linears are nnx.Linear."""

    def __init__(self, config, number, parameters):
        self.config, self.number = config, number
        norms = {name: nnx.Param(a) for name, a in parameters.items() if name.endswith("norm")}
        self.norms, self.linears = nnx.Dict(norms), nnx.Dict()
        for name in (name for names in SITE_WEIGHTS.values() for name in names):
            linear = nnx.Linear(1, 1, use_bias=False, precision=HIGHEST, rngs=nnx.Rngs(0))
            linear.kernel = nnx.Param(parameters[name].T)
            linear.in_features, linear.out_features = linear.kernel.shape
            self.linears[name.replace(".", "_")] = linear

    def __call__(self, x):
        def linear(site, x, weights, state):
            names = (name.replace(".", "_") for name in SITE_WEIGHTS[site])
            return tuple(self.linears[name](x) for name in names), None

        nothing = {name: jnp.zeros(0) for names in SITE_WEIGHTS.values() for name in names}
        parameters = nothing | {name: norm[...] for name, norm in self.norms.items()}
        where = positional_of(self.config, self.number)
        return layer(self.config, x, parameters, where, linear, dict.fromkeys(SITES))[0]


class Ours(nnx.Module):
    """Our decoder, made of such layers."""

    def __init__(self, model: Decoder):
        layers = range(model.config.num_hidden_layers)
        parts = [{name: a[...][n] for name, a in model.layers.items()} for n in layers]
        self.blocks = nnx.List([Block(model.config, n, part) for n, part in enumerate(parts)])
        self.config, self.embedding, self.norm = model.config, model.embedding, model.norm

    def __call__(self, tokens):
        x = jnp.take(self.embedding[...], tokens, axis=0)
        for block in self.blocks:
            x = block(x)
        x = rms_norm(self.config, x, self.norm[...])
        return jnp.einsum("rlk,vk->rlv", x, self.embedding[...], precision=HIGHEST)


@pytest.mark.slow
def test_a_decoder_of_nnx_linears_gets_the_codes_and_logits_of_the_walk():
    model = tiny_decoder()
    tokens = np.random.default_rng(0).integers(0, 257, (3, 32))
    method = recipe("smooth_hadamard", "floor", "gptq")
    given = quantize_decoder(Plan.of(model.config, method), model, tokens)
    ours, report = quantize(Ours(model), method, [tokens])
    for site in SITES:
        for name, weight in zip(SITE_WEIGHTS[site], given[2][site].weights, strict=True):
            for number, block in enumerate(ours.blocks):
                found = block.linears[name.replace(".", "_")].weight.get_value()
                np.testing.assert_array_equal(found.codes(), weight.codes()[number])
                np.testing.assert_array_equal(found.scale_bytes(), weight.scale_bytes()[number])
    logits = jax.jit(lambda model, *rest: model(*rest)[0], static_argnums=2)
    wanted = logits(given[0], jnp.asarray(tokens), *given[1:])
    np.testing.assert_array_equal(nnx.jit(lambda m, t: m(t))(ours, tokens), wanted)
    assert len(report.linears) == 14
    assert report.left == {".": "is no linear: Ours with embedding"}
    q, k, v = (ours.blocks[0].linears[f"self_attn_{name}_proj"] for name in "qkv")
    assert q.moves is k.moves is v.moves


MODELS = {
    Mixer: ("embed", "blocks.0.tokens.first", "blocks.0.tokens.second",
            "blocks.0.channels.first", "blocks.0.channels.second"),
    Vit: ("blocks.0.attention.query", "blocks.0.attention.key", "blocks.0.attention.value",
          "blocks.0.attention.out", "blocks.0.mlp.first", "blocks.0.mlp.second"),
    DecoderOnly: ("blocks.0.q", "blocks.0.kv", "blocks.0.out",
                  "blocks.0.gate", "blocks.0.up", "blocks.0.down"),
}  # fmt: skip
"""The linears of each model in the order of their calls."""
LEFT = {
    Mixer: {"head": "is excluded"},
    Vit: {
        ".": "is no linear: Vit with positions",
        "head": "is excluded",
        "patches": "is no linear: Conv with kernel",
    },
    DecoderOnly: {"embed": "is no linear: Embed with embedding"},
}


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_a_model_of_flax_is_quantized_and_called_as_before(model):
    given, batch = model(nnx.Rngs(0)), batch_of(model)
    exclude = () if model is DecoderOnly else "head"
    quantized, report = quantize(given, "block_hadamard", [batch], exclude=exclude)
    assert tuple(row["linear"] for row in report.linears) == MODELS[model]
    assert report.left == LEFT[model]
    wanted, found = (nnx.eval_shape(lambda m, x: m(x), m, batch) for m in (given, quantized))
    assert found == wanted
    for row in report.linears:
        assert 12 < row["sqnr_db"] < row["weight_sqnr_db"] < 22
        assert row["bytes"] * 8 == 4.25 * row["weights"]
        assert f"{row['linear']} " in str(report)


@pytest.mark.parametrize(
    ("made", "options", "shape"),
    [
        ((nnx.Linear, 6, 4), {}, (5, 6)),
        ((nnx.Linear, 6, 4), {}, (6,)),
        ((nnx.LinearGeneral, (2, 6), (4, 3)), {"axis": (1, -1)}, (5, 2, 7, 6)),
        ((nnx.LinearGeneral, (2, 6), 4), {"axis": (2, 0)}, (2, 5, 6)),
        ((nnx.Einsum, "nta,hab->nthb", (4, 6, 3), (4, 3)), {}, (5, 7, 6)),
        ((nnx.Einsum, "...ka,cka->c...", (4, 2, 6), (4,)), {}, (5, 7, 2, 6)),
    ],
)
def test_a_linear_is_a_product_with_a_matrix_between_two_changes_of_axes(made, options, shape):
    module, *sizes = made
    options |= {"rngs": nnx.Rngs(0), "kernel_init": drawn, "bias_init": drawn}
    linear = module(*sizes, **options)
    x = jnp.asarray(np.random.default_rng(1).standard_normal(shape, np.float32))
    contraction = Contraction.of(linear)
    matrix = np.asarray(contraction.matrix(linear.kernel[...]))
    product = np.asarray(contraction.tokens(x)) @ matrix.T
    y = contraction.output(jnp.asarray(product), x.ndim)
    y = np.asarray(y) + np.reshape(linear.bias[...], contraction.bias_shape(x.ndim))
    np.testing.assert_allclose(y, linear(x), atol=1e-5)


class Doubled(nnx.Linear):
    """A linear of the user's own."""

    def __call__(self, x):
        return 2 * super().__call__(x)


class Strange(nnx.Module):
    """What can be quantized, twice called and under two names, beside what cannot."""

    def __init__(self):
        linear = partial(nnx.Linear, 64, 64, rngs=nnx.Rngs(0), **INIT)
        self.fine = linear()
        self.again = self.fine
        self.narrow = nnx.Linear(48, 64, rngs=nnx.Rngs(0), **INIT)
        self.doubled = Doubled(64, 64, rngs=nnx.Rngs(0), **INIT)
        self.idle = linear()
        self.tied, self.other = linear(), linear()
        self.other.kernel = self.tied.kernel
        self.own_product = linear(dot_general=lambda *given, **options: jax.lax.dot_general(*given))
        self.batched = nnx.Einsum("bk,bkn->bn", (2, 64, 64), rngs=nnx.Rngs(0), **INIT)
        self.counts = linear()
        stacked = nnx.vmap(lambda key: nnx.Linear(64, 64, rngs=nnx.Rngs(key), **INIT))
        self.stack = stacked(jax.random.split(jax.random.key(0), 2))

    def __call__(self, x):
        y = self.again(self.fine(x)) + self.narrow(x[:, :48]) + self.doubled(x) + self.other(x)
        y = y + self.own_product(x) + self.batched(x) + self.tied(x)
        return y + self.counts(jnp.ones((2, 64), jnp.int32))


def test_what_cannot_be_treated_is_left_in_float_and_listed_with_the_reason():
    module, batch = Strange(), np.random.default_rng(0).standard_normal((2, 64), np.float32)
    with jax.numpy_dtype_promotion("standard"):
        quantized, report = quantize(module, "block_hadamard", [batch, batch])
    assert report.left == {
        "batched": "computes bk,bkn->bn, which is no product of two matrices: each axis of the "
        "kernel is either summed with one of the input, or an axis of the output",
        "counts": "is called with int32: only float32, bfloat16, float16, float8_e4m3fn, "
        "float8_e5m2 are rounded",
        "doubled": "is a Doubled, whose arithmetic is not known here",
        "idle": "is not called on the batches",
        "narrow": "has input width 48, no multiple of block 32: pad=True widens it",
        "other": "shares its kernel with tied",
        "own_product": "multiplies by a dot_general of its own",
        "stack": "has a kernel (2, 64, 64) where its features are (64, 64): stacked",
        "tied": "shares its kernel with other",
    }
    assert [(row["linear"], row["tokens"]) for row in report.linears] == [("again", 8)]
    assert isinstance(quantized.fine, MXLinear)
    assert quantized.again is quantized.fine
    assert isinstance(module.fine, nnx.Linear)


class Nested(nnx.Module):
    """Linears under nnx.remat and nnx.jit, whose inputs can be seen, and a cell under nnx.scan."""

    def __init__(self, rngs):
        self.first, self.second, self.out = (nnx.Linear(64, 64, rngs=rngs, **INIT) for _ in "abc")
        self.rnn = nnx.RNN(nnx.GRUCell(64, 64, rngs=rngs, **INIT))

    def __call__(self, x):
        call = lambda linear, x: linear(x)  # noqa: E731
        return self.out(self.rnn(nnx.jit(call)(self.second, nnx.remat(call)(self.first, x))))


def test_linears_under_jit_and_remat_are_quantized_and_those_under_scan_are_left_by_name():
    batches = np.random.default_rng(0).standard_normal((2, 4, 16, 64), np.float32)
    _, report = quantize(Nested(nnx.Rngs(0)), "rtn", [*batches])
    seen = dict.fromkeys(("first", "second", "out"), 128)
    assert {row["linear"]: row["tokens"] for row in report.linears} == seen
    inside = [path for path, why in report.left.items() if "inside a transformation" in why]
    assert inside == ["rnn.cell.dense_h", "rnn.cell.dense_i"]


def test_a_linear_that_is_no_product_with_one_matrix_is_refused_by_its_reason():
    given = {"rngs": nnx.Rngs(0), **INIT}
    whole = nnx.Linear(64, 64, **given)
    whole.kernel = nnx.Param(jnp.zeros((64, 64), jnp.int32))
    cases = {
        "has a kernel of int32: only float32": whole,
        "has batch axes": nnx.LinearGeneral(64, 64, batch_axis={0: 2}, **given),
    }
    for says, linear in cases.items():
        with pytest.raises(ValueError, match=says):
            Contraction.of(linear)


def test_weights_to_be_trained_that_start_elsewhere_than_rounded_are_counted(caplog):
    linear = nnx.Linear(64, 64, rngs=nnx.Rngs(0), **INIT)
    x = np.random.default_rng(0).standard_normal((64, 64), np.float32)
    for rule, exact in (("ceil", False), ("even", True)):
        method = recipe("rtn", rule, "scale")
        rounded, trained = (quantize(linear, method, [x], qat=qat)[0] for qat in (False, True))
        codes = rounded.weight.get_value().dequantize()
        np.testing.assert_array_equal(trained.weight[...], codes)
        same = np.array_equal(method.weight_format.fake_quantize(codes), codes)
        said = [line for line in caplog.messages if "start elsewhere" in line]
        assert same == (not said) == exact
        caplog.clear()


def test_weights_are_trained_straight_through_and_stored_as_they_were_computed():
    linear = nnx.Linear(64, 64, rngs=nnx.Rngs(0), **INIT)
    x = np.random.default_rng(0).standard_normal((64, 64), np.float32)
    method, slope = recipe("rtn", "floor"), np.linspace(-1, 2, 64, dtype=np.float32)
    stored, _ = quantize(linear, method, [x])
    trained, _ = quantize(linear, method, [x], qat=True)
    assert len(jax.tree.leaves(nnx.state(stored, nnx.Param))) == 1  # the bias alone
    loss = nnx.jit(nnx.value_and_grad(lambda module, x: jnp.sum(slope * module(x))))
    value, gradient = loss(trained, x)
    given = np.broadcast_to(slope, x.shape).T @ np.asarray(MXFP4().fake_quantize(x))
    np.testing.assert_allclose(gradient["weight"][...], given, rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(gradient["bias"][...], 64 * slope)
    weight = trained.weight[...]
    for module in (stored, convert(trained)):
        found = module.weight.get_value()
        np.testing.assert_array_equal(found.dequantize(), MXFP4().fake_quantize(weight))
        assert loss(module, x)[0] == value
    assert isinstance(trained.weight, nnx.Param)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"module": tiny_decoder}, "a Decoder is quantized by quantize_decoder"),
        ({"batches": ()}, "there are no batches"),
        ({"recipe": recipe("rtn", rounding="asymmetric")}, "use gptq"),
        ({"include": "blocks.*"}, r"include='blocks\.\*' matches no linear: .* like first"),
        ({"exclude": "*"}, "no linear of the module can be quantized: .*first is excluded"),
    ],
)
def test_what_cannot_be_meant_is_refused(change, says):
    given = {"module": lambda: Mlp(64, 64, nnx.Rngs(0)), "recipe": "rtn", "batches": [0.0]} | change
    module, method, batches = (given.pop(name) for name in ("module", "recipe", "batches"))
    with pytest.raises(ValueError, match=says):
        quantize(module(), method, batches, **given)
