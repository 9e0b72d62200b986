"""Experts in the walk: each is treated as a linear alone would be, on the tokens that it gets."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duquantpp_jax.core import Fitted, MXArray, Needs, Stats
from duquantpp_jax.models import SITES, dense
from duquantpp_jax.ptq import experts as module
from duquantpp_jax.ptq.calibration import calibrate, keep
from duquantpp_jax.ptq.experts import pooled, pooled_moved
from duquantpp_jax.ptq.plan import Plan
from duquantpp_jax.ptq.report import costs_by_site, report_layer
from duquantpp_jax.ptq.site import fit_linear, layer_of, quantize_linear
from duquantpp_jax.ptq.walk import fit_decoder, quantize_decoder, quantize_layer
from duquantpp_jax.recipes import find_format, recipe
from duquantpp_jax.transforms.basic import Smooth
from tests.conftest import mixture

TOKENS = np.random.default_rng(3).integers(0, 257, (8, 32), np.int32)
NEEDS = Needs.GRAM | Needs.POSITIONS


@pytest.fixture(scope="module")
def model():
    return mixture("GptOssForCausalLM")


@pytest.fixture(scope="module")
def inputs(model):
    """What each expert of layer 0 gets at each site, token by token."""

    @jax.jit
    def run(model, tokens):
        return model(tokens, lambda site, x, w, s: (dense(site, x, w, s)[0], x))[1]

    outs = {site: layer_of(x, 0) for site, x in run(model, TOKENS).items()}
    own = {}
    for site in ("mlp_in", "mlp_out"):
        x, expert = np.asarray(outs[site].x), np.asarray(outs[site].expert)
        own[site] = [x[expert == e] for e in range(model.config.num_experts)]
    return own


@pytest.fixture(scope="module")
def stats(model):
    return calibrate(model, TOKENS, needs=NEEDS)


def test_stats_of_an_expert_are_of_the_tokens_it_gets(stats, inputs):
    for site, parts in inputs.items():
        found = layer_of(stats[site], 0)
        for e, tokens in enumerate(parts):
            assert int(found.count[e]) == len(tokens)
            np.testing.assert_allclose(found.absmax[e], np.abs(tokens).max(axis=0), rtol=1e-5)
            gram = tokens.T @ tokens
            np.testing.assert_allclose(found.gram[e], gram, atol=1e-4 * np.abs(gram).max())
            kept = min(len(tokens), found.sample.shape[1])  # in order, until there is no room
            np.testing.assert_allclose(found.sample[e][:kept], tokens[:kept], rtol=1e-4, atol=1e-5)
            sums = np.asarray(found.position_sum[e]).sum(axis=0)
            np.testing.assert_allclose(sums, tokens.sum(axis=0), rtol=1e-3, atol=1e-3)
            assert int(found.position_count[e].sum()) == len(tokens)


@functools.partial(jax.jit, static_argnames="linear")
def run(model, linear, state):
    """Logits, and what every site gets and makes."""

    def both(site, x, weights, state):
        ys, _ = linear(site, x, weights, state)
        return ys, (x, ys)

    return model(jnp.asarray(TOKENS), both, state)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rounding"),
    [("rtn", "rtn"), ("duquantpp", "rtn"), ("wush", "rtn"), ("block_hadamard", "gptq")],
)
def test_an_expert_is_quantized_as_a_linear_alone_would_be(model, stats, name, rounding):
    method = recipe(name, "floor", rounding)
    plan = Plan.of(model.config, method, include=("*.mlp.*",))
    _, linear, state = quantize_decoder(plan, model, TOKENS, stats=stats)
    e, site = 2, "mlp_in"
    own = pooled(model.config, site, layer_of(stats[site], 0))
    weights = tuple(w[0, e] for w in model.weights(site))
    place = jax.random.fold_in(jax.random.key(0), SITES.index(site))
    key = jax.random.split(jax.random.split(place, 2)[0], model.config.num_experts)[e]
    fitted = fit_linear(method, weights, layer_of(own, e), key)
    got = jax.tree.map(lambda leaf: leaf[0, e], state[site])
    for a, b in zip(jax.tree.leaves(got.transform), jax.tree.leaves(fitted.transform), strict=True):
        np.testing.assert_array_equal(a, b)
    if rounding == "rtn":
        alone = quantize_linear(method, weights, layer_of(own, e), fitted)
        for a, b in zip(got.weights, alone.weights, strict=True):
            np.testing.assert_array_equal(a.codes(), b.codes())
    logits, _ = run(model, linear, state)
    assert np.isfinite(logits).all()


@pytest.mark.slow
def test_quantized_experts_compute_what_their_parts_say(model, stats):
    plan = Plan.of(model.config, recipe("block_hadamard", "floor"))
    _, linear, state = quantize_decoder(plan, model, TOKENS, stats=stats)
    site = layer_of(state["mlp_in"], 0)

    x, ys = layer_of(run(model, linear, state)[1]["mlp_in"], 0)
    tokens, expert = np.asarray(x.x), np.asarray(x.expert)
    format = plan.recipes["mlp_in"].activation_format
    for e in range(model.config.num_experts):
        part = layer_of(site, e)
        moved = format.fake_quantize(part.transform.activations(jnp.asarray(tokens[expert == e])))
        for y, w in zip(ys, part.weights, strict=True):
            wanted = np.asarray(moved) @ np.asarray(w.dequantize()).T
            np.testing.assert_allclose(np.asarray(y)[expert == e], wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_fits_made_before_change_no_bit(model, stats):
    plan = Plan.of(model.config, recipe("random_hadamard", "floor"), seed=5)
    *_, wanted = quantize_decoder(plan, model, TOKENS, stats=stats)
    given = dataclasses.replace(plan, fits=fit_decoder(plan, model, stats))
    *_, found = quantize_decoder(given, model, TOKENS, stats=stats)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


def test_an_expert_with_few_tokens_takes_the_layers_stats(model, stats, monkeypatch):
    own = layer_of(stats["mlp_in"], 0)
    counts = np.asarray(own.count)
    monkeypatch.setattr(module, "FEWEST", int(counts.min()) + 1)
    found = pooled(model.config, "mlp_in", own)
    few = int(counts.argmin())
    assert int(found.count[few]) == counts.sum()
    np.testing.assert_allclose(found.gram[few], own.gram.sum(axis=0), rtol=1e-6)
    np.testing.assert_array_equal(found.absmax[few], own.absmax.max(axis=0))
    tokens = {row.tobytes() for x in np.asarray(own.sample) for row in x}
    drawn = np.asarray(found.sample[few])
    assert {row.tobytes() for row in drawn} <= tokens
    assert (np.abs(drawn).max(axis=1) > 0).all()
    for e in set(range(len(counts))) - {few}:
        for name in ("count", "absmax", "gram", "position_sum"):
            np.testing.assert_array_equal(getattr(found, name)[e], getattr(own, name)[e])
        assert (np.abs(np.asarray(found.sample[e])).max(axis=1) > 0).all()
        drawn = {row.tobytes() for row in np.asarray(found.sample[e])}
        assert drawn == {row.tobytes() for row in np.asarray(own.sample[e]) if row.any()}


def test_an_expert_with_few_tokens_moves_the_layers_sample_by_its_own_fit(
    model, stats, monkeypatch
):
    own = keep(layer_of(stats["mlp_in"], 0), Needs.GRAM)
    counts = np.asarray(own.count)
    monkeypatch.setattr(module, "FEWEST", int(counts.min()) + 1)
    few, plain = int(counts.argmin()), pooled(model.config, "mlp_in", own)
    scales = np.random.default_rng(0).uniform(0.5, 2, own.absmax.shape).astype(np.float32)
    fits, format = Fitted(Smooth(jnp.asarray(scales))), find_format("mxfp4")
    found = pooled_moved(model.config, "mlp_in", own, plain, fits, format)
    tokens = np.asarray(format.fake_quantize(plain.sample[few] / scales[few]))
    gram = tokens.T @ tokens
    assert int(found.count[few]) == len(tokens)
    np.testing.assert_array_equal(found.sample[few], tokens)
    np.testing.assert_array_equal(found.absmax[few], np.abs(tokens).max(axis=0))
    np.testing.assert_allclose(found.gram[few], gram, rtol=1e-5, atol=1e-5 * np.abs(gram).max())
    for e in set(range(len(counts))) - {few}:
        np.testing.assert_array_equal(found.gram[e], own.gram[e])


@pytest.mark.slow
def test_the_report_has_a_row_for_each_expert_and_says_who_took_the_layers_stats(model):
    plan = Plan.of(model.config, recipe("block_hadamard", "floor"))
    parameters = {name: np.asarray(array[...][0]) for name, array in model.layers.items()}
    hidden = np.array(model.embedding[...])[TOKENS]
    made = quantize_layer(plan, 0, parameters, hidden)
    rows = [row for row in report_layer(plan, 0, made) if "tokens" in row]
    assert len(rows) == 3 * model.config.num_experts
    assert rows[0]["linear"] == "model.layers.0.mlp.experts.0.up_proj"
    assert sum(row["tokens"] for row in rows) == 3 * TOKENS.size * model.config.num_experts_per_tok
    for row in rows:
        assert row["pooled"] == (row["tokens"] < module.FEWEST)
        assert 10 < row["sqnr_db"] < 22
    assert isinstance(made.sites["mlp_out"].weights[0], MXArray)


@pytest.mark.slow
def test_costs_are_of_all_experts(model, stats):
    plan = Plan.of(model.config, recipe("block_hadamard", "floor"))
    *_, state = quantize_decoder(plan, model, TOKENS, stats=stats)
    costs = costs_by_site(state)
    assert costs["mlp_in"]["multiply_adds"] == costs["attention_in"]["multiply_adds"] == 32
    more = costs["mlp_in"]["bytes"] / costs["attention_in"]["bytes"]
    assert more == model.config.num_experts


def test_what_experts_do_not_have_is_refused(model):
    for method in (recipe("rtn", "floor", "asymmetric"), recipe("rtn", "nvfp4_calibrated")):
        with pytest.raises(ValueError, match="not for experts"):
            Plan.of(model.config, method).check()


def test_a_mask_leaves_tokens_out_of_stats():
    random = np.random.default_rng(0)
    x, chosen = random.standard_normal((4, 5, 8), np.float32), random.random((4, 5)) < 0.5
    masked = np.where(chosen[..., None], x, np.float32(0))
    empty = Stats.init(8, 4, 5, sample_limit=20, needs=NEEDS)
    found = empty.update(jnp.asarray(masked), jnp.int32(0), chosen=jnp.asarray(chosen))
    tokens = x[chosen]
    assert int(found.count) == len(tokens)
    np.testing.assert_array_equal(found.sample[: len(tokens)], tokens)
    np.testing.assert_array_equal(found.absmax, np.abs(tokens).max(axis=0))
    rows = np.maximum(np.asarray(chosen).sum(axis=0), 1)[:, None]
    wanted = np.asarray(masked).sum(axis=0) / rows
    np.testing.assert_allclose(found.position_mean("a fit"), wanted, rtol=1e-6)
