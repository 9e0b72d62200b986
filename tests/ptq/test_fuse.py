"""Folding leaves the float function as it is, folds what it can and nothing else."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duquantpp_jax.core import Chain, Fitted
from duquantpp_jax.models import SITES, Decoder, dense, parameter_shapes
from duquantpp_jax.ptq.fuse import fuse_layer, grouped, online_cost
from duquantpp_jax.ptq.site import layer_of
from duquantpp_jax.transforms.basic import Identity, Permute, Smooth
from duquantpp_jax.transforms.block import BlockRotation
from duquantpp_jax.transforms.hadamard import hadamard
from tests.conftest import TINY
from tests.ptq.test_stream import logits as in_float64

LAYERS, HEADS, KV_HEADS, SIDE = 2, 4, 2, 16
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
BIASED = (*QKV, "mlp.up_proj", "mlp.gate_proj", "mlp.down_proj")
WIDTHS = {"attention_in": 64, "attention_out": 64, "mlp_in": 64, "mlp_out": 96}
TOKENS = jax.random.randint(jax.random.key(9), (2, 24), 0, 257)


@functools.cache
def _model(kv_heads=KV_HEADS, **changes) -> Decoder:
    """A random decoder with biases, its arrays large enough that everything matters."""
    changes |= {"biases": BIASED, "qk_norm": True, "num_key_value_heads": kv_heads}
    config = dataclasses.replace(TINY, **changes)
    shapes = parameter_shapes(config)
    keys = jax.random.split(jax.random.key(1), len(shapes))
    arrays = {}
    for key, (name, shape) in zip(keys, shapes.items(), strict=True):
        drawn = jax.random.normal(key, shape)
        arrays[name] = jnp.exp(0.3 * drawn) if name.endswith("norm") else 0.15 * drawn
    return Decoder(config, arrays)


def fuse(model, transforms):
    """`fuse_layer` on every layer: the new model, and what stays online, stacked."""
    stacked = model.parameters()
    inside = {n.removeprefix("model.layers.*."): a for n, a in stacked.items() if ".*." in n}
    layers = []
    for number in range(LAYERS):
        fits = {site: Fitted(layer_of(t, number)) for site, t in transforms.items()}
        layers.append(fuse_layer(model.config, layer_of(inside, number), fits))
    for name in inside:
        stacked[f"model.layers.*.{name}"] = jnp.stack([layer.parameters[name] for layer in layers])
    rests = [{site: fitted.transform for site, fitted in layer.fits.items()} for layer in layers]
    return Decoder(model.config, stacked), jax.tree.map(lambda *a: jnp.stack(a), *rests)


def _moving(site, x, weights, transform):
    """The linear of a model whose inputs and weights are moved, unless there is no transform."""
    if transform is not None:
        x = transform.activations(x)
        weights = tuple(transform.weights(w) for w in weights)
    return dense(site, x, weights, None)


_logits = jax.jit(lambda model, state: model(TOKENS, _moving, state)[0])


def _powers(key, shape):
    return 2.0 ** jax.random.randint(key, shape, -3, 4).astype(jnp.float32)


def _smooth(site, agreeing=True, key=0):
    """Scales that are powers of two: moving by them is exact. For attention_out the same in all
    query heads of a group, or not."""
    key = jax.random.fold_in(jax.random.key(key), SITES.index(site))
    if site == "attention_out" and agreeing:
        scale = _powers(key, (LAYERS, KV_HEADS, 1, SIDE))
        scale = jnp.broadcast_to(scale, (LAYERS, KV_HEADS, HEADS // KV_HEADS, SIDE))
        return Smooth(scale.reshape(LAYERS, -1))
    return Smooth(_powers(key, (LAYERS, WIDTHS[site])))


def _permute(site, agreeing=True):
    rng = np.random.default_rng(SITES.index(site))
    if site == "attention_out" and agreeing:
        within = np.stack([rng.permutation(SIDE) for _ in range(LAYERS * KV_HEADS)])
        within = np.repeat(within.reshape(LAYERS, KV_HEADS, SIDE), HEADS // KV_HEADS, axis=1)
        order = (within + SIDE * np.arange(HEADS)[:, None]).reshape(LAYERS, -1)
    else:
        order = np.stack([rng.permutation(WIDTHS[site]) for _ in range(LAYERS)])
    return Permute(jnp.asarray(order, jnp.int32))


def _rotation():
    return BlockRotation(jnp.broadcast_to(hadamard(32), (LAYERS, 1, 32, 32)))


@pytest.mark.slow
@pytest.mark.parametrize("site", SITES)
def test_folding_powers_of_two_changes_no_bit_of_the_float_function(site):
    model = _model()
    fused, rest = fuse(model, {site: _smooth(site)})
    assert rest == {site: Identity()}
    np.testing.assert_array_equal(_logits(fused, {}), _logits(model, {}))
    changed = [n for n, a in fused.parameters().items() if np.any(a != model.parameters()[n])]
    assert changed
    assert not [name for name in changed if name.endswith(("q_norm", "k_norm", "o_proj.bias"))]


def test_gains_that_are_one_more_than_their_weights_are_folded_exactly_in_float64():
    """Weights are multiples of 2^-8, so that a gain over a power of two, less 1, is a float32."""
    changes = {"norm_offset": 1.0, "post_norms": True, "activation": "gelu_pytorch_tanh"}
    drawn = _model(**changes)
    parameters = {
        name: jnp.round(256 * array) / 256 - 1 if name.endswith("norm") else array
        for name, array in drawn.parameters().items()
    }
    model = Decoder(drawn.config, parameters)
    fused, rest = fuse(model, {site: _smooth(site) for site in SITES})
    assert rest == dict.fromkeys(SITES, Identity())

    def logits(model):
        arrays = {n: np.asarray(a, np.float64) for n, a in model.parameters().items()}
        stacked = {n: arrays.pop(n) for n in [*arrays] if ".*." in n}
        for number in range(LAYERS):
            arrays |= {n.replace("*", str(number)): a[number] for n, a in stacked.items()}
        return in_float64(model.config, arrays, np.asarray(TOKENS[0])), arrays

    (wanted, before), (found, after) = logits(model), logits(fused)
    np.testing.assert_array_equal(found, wanted)
    moved = {name for name in before if np.any(before[name] != after[name])}
    norms = {f"model.layers.{n}.{name}_layernorm" for n in range(LAYERS)
             for name in ("input", "pre_feedforward")}  # fmt: skip
    assert {name for name in moved if name.endswith("norm")} == norms


@pytest.mark.parametrize("site", ["attention_out", "mlp_out"])
def test_permutations_between_two_linears_are_folded(site):
    model = _model()
    fused, rest = fuse(model, {site: _permute(site)})
    assert rest == {site: Identity()}
    _assert_near(_logits(fused, {}), _logits(model, {}))


@pytest.mark.parametrize("site", ["attention_in", "mlp_in"])
def test_a_norm_cannot_permute(site):
    model, chain = _model(), Chain((_permute(site), _rotation()))
    fused, rest = fuse(model, {site: chain})
    assert jax.tree.structure(rest[site]) == jax.tree.structure(chain)
    np.testing.assert_array_equal(_logits(fused, {}), _logits(model, {}))


@pytest.mark.parametrize("move", [_smooth, _permute])
def test_query_heads_that_disagree_stay_online_unless_each_has_its_own_value_head(move):
    shared, own = _model(), _model(kv_heads=HEADS)
    transform = move("attention_out", agreeing=False)
    _, rest = fuse(shared, {"attention_out": transform})
    assert isinstance(rest["attention_out"], type(transform))
    if move is _smooth:
        fused, rest = fuse(own, {"attention_out": transform})
        assert rest["attention_out"] == Identity()
        np.testing.assert_array_equal(_logits(fused, {}), _logits(own, {}))


def test_smoothing_made_the_same_over_heads_that_share_a_value_head_folds():
    model, smooth = _model(), layer_of(_smooth("attention_out", agreeing=False), 0)
    rotation = layer_of(_rotation(), 0)
    shared = grouped(Fitted(Chain((smooth, rotation))), model.config)
    layer = {n.removeprefix("model.layers.*."): a[0] for n, a in model.parameters().items()}
    fused = fuse_layer(model.config, layer, {"attention_out": shared})
    assert isinstance(fused.fits["attention_out"].transform, BlockRotation)
    heads = np.log2(np.asarray(smooth.scale)).reshape(KV_HEADS, -1, SIDE)
    ratio = np.log2(np.asarray(layer["self_attn.v_proj"] / fused.parameters["self_attn.v_proj"]))
    np.testing.assert_allclose(ratio[:, 0], heads.mean(axis=1).ravel(), atol=1e-5)
    assert online_cost(shared.transform, 64).multiply_adds == 33
    assert online_cost(fused.fits["attention_out"].transform, 64).multiply_adds == 32


def test_weights_of_a_fit_move_with_the_parameters_that_they_stand_for():
    model = _model()
    layer = {n.removeprefix("model.layers.*."): a[0] for n, a in model.parameters().items()}
    fits = {
        "attention_in": Fitted(layer_of(_smooth("attention_in"), 0), tuple(layer[n] for n in QKV)),
        "attention_out": Fitted(layer_of(_smooth("attention_out"), 0)),
    }
    fused = fuse_layer(model.config, layer, fits)
    for name, weight in zip(QKV, fused.fits["attention_in"].weights, strict=True):
        np.testing.assert_array_equal(weight, fused.parameters[name])
        assert np.any(weight != layer[name])


def test_whole_chains_at_all_sites_move_the_model_as_they_did_and_their_rest_is_the_rotation():
    model = _model()
    given = {
        "attention_in": Chain((_smooth("attention_in"), _rotation())),
        "attention_out": Chain((_permute("attention_out"), _smooth("attention_out"), _rotation())),
        "mlp_in": Chain((Chain((_smooth("mlp_in"), Identity())), _rotation())),
        "mlp_out": Chain((_smooth("mlp_out"), _permute("mlp_out"), _rotation())),
    }
    fused, rest = fuse(model, given)
    assert all(isinstance(left, BlockRotation) for left in rest.values())
    wanted = _logits(model, {})
    for moved in (_logits(fused, {}), _logits(fused, rest), _logits(model, given)):
        _assert_near(moved, wanted)


def _assert_near(moved, wanted):
    """Equal but for the order of float32 sums.

    A layer has four linears of at most 96 terms; an output errs by some sqrt(96) roundings of its
    size at each of the 2 x 4 linears it went through, magnified by the norms between: 16 for both.
    """
    bound = 16 * 8 * np.sqrt(96) * 2.0**-24 * float(jnp.max(jnp.abs(wanted)))
    np.testing.assert_allclose(moved, wanted, atol=bound)


def test_what_comes_after_a_rotation_stays_online():
    chain = Chain((_rotation(), _smooth("mlp_out")))
    _, rest = fuse(_model(), {"mlp_out": chain})
    assert [type(link) for link in rest["mlp_out"].links] == [BlockRotation, Smooth]


def test_linears_see_the_input_that_the_folded_part_would_have_moved():
    model, smooth = _model(), _smooth("mlp_out")
    seen = {}
    for name, decoder in {"plain": model, "fused": fuse(model, {"mlp_out": smooth})[0]}.items():
        keep = lambda site, x, w, s: (dense(site, x, w, None)[0], x)  # noqa: E731
        seen[name] = jax.jit(lambda m: m(TOKENS, keep)[1])(decoder)["mlp_out"]  # noqa: B023
    moved = jax.vmap(lambda t, x: t.activations(x))(smooth, seen["plain"])
    np.testing.assert_array_equal(seen["fused"], moved)


def test_widened_transforms_fold_on_the_channels_that_are_there():
    model = _model()
    wide = Smooth(jnp.concatenate([_smooth("mlp_out").scale, jnp.full((LAYERS, 32), 8.0)], axis=1))
    fused, rest = fuse(model, {"mlp_out": Chain((wide, _rotation()))})
    assert isinstance(rest["mlp_out"], BlockRotation)
    np.testing.assert_array_equal(_logits(fused, {}), _logits(model, {}))


def test_a_permutation_that_moves_widened_channels_in_stays_online():
    order = np.tile(np.r_[127, 1:127, 0], (LAYERS, 1))
    wide = Permute(jnp.asarray(order, jnp.int32))
    assert isinstance(fuse(_model(), {"mlp_out": wide})[1]["mlp_out"], Permute)


def test_what_is_no_site_is_refused():
    with pytest.raises(ValueError, match="'mlp' is no site: use attention_in"):
        fuse_layer(TINY, {}, {"mlp": Fitted(Identity())})
