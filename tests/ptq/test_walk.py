"""A layer at a time gives what the whole model at once gives."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duquantpp_jax.core import Fitted, MXArray, Needs, Stats
from duquantpp_jax.formats import MXFP8
from duquantpp_jax.formats.plain import BFloat16
from duquantpp_jax.models import SITES
from duquantpp_jax.ptq import walk
from duquantpp_jax.ptq.calibration import calibrate, layers_of
from duquantpp_jax.ptq.plan import Plan
from duquantpp_jax.ptq.report import report_layer
from duquantpp_jax.ptq.walk import (
    check_fit,
    check_input,
    fit_decoder,
    fit_layer,
    quantize_decoder,
    quantize_layer,
    stack_layers,
    warn_of_few_tokens,
)
from duquantpp_jax.recipes import recipe
from duquantpp_jax.transforms.basic import Smooth
from tests.conftest import TINY, tiny_decoder

TOKENS = np.asarray(jax.random.randint(jax.random.key(3), (8, 32), 0, 257))
CONFIG = dataclasses.replace(TINY, num_hidden_layers=3)
RUN = jax.jit(lambda model, tokens, state, linear: model(tokens, linear, state)[0],
              static_argnames="linear")  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return tiny_decoder(num_hidden_layers=3)


def plan_of(name="smooth_hadamard", rounding="rtn", **changes):
    recipes = dict.fromkeys(SITES, recipe(name, "floor", rounding))
    return dataclasses.replace(Plan(CONFIG, recipes), **changes)


def logits(model, plan, state):
    return RUN(model, TOKENS, state, plan.linear)


def assert_same_bits(state, other):
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@pytest.mark.slow
@pytest.mark.parametrize("rounding", ["rtn", "gptq"])
def test_stats_and_fits_that_were_found_before_change_no_bit(model, rounding):
    plan = plan_of("random_hadamard", rounding, seed=5)
    *_, wanted = quantize_decoder(plan, model, TOKENS)
    more = Needs.GRAM | Needs.POSITIONS
    stats = calibrate(model, TOKENS, plan.widths(0), needs=more)
    assert_same_bits(quantize_decoder(plan, model, TOKENS, stats=stats)[-1], wanted)
    given = plan_of("rtn", rounding, fits=fit_decoder(plan, model, stats))
    assert_same_bits(quantize_decoder(given, model, TOKENS)[-1], wanted)


def test_what_is_drawn_differs_at_every_block_site_and_layer_and_with_the_seed(model):
    plan = plan_of("random_hadamard")
    widths = plan.widths(0)
    stats = {site: Stats.init(width, 1, 1) for site, width in widths.items()}
    found = []
    for seed in (0, 1):
        for number, parameters in enumerate(layers_of(model)):
            own = dataclasses.replace(plan, seed=seed)
            for site, fitted in fit_layer(own, number, parameters, stats).items():
                found += [*np.asarray(fitted.transform.as_blocks(widths[site], 32).matrices)]
    assert len(np.unique(found, axis=0)) == len(found) == 2 * 3 * sum(widths.values()) // 32


def test_fits_that_are_given_must_cover_all_sites_and_layers(model):
    fits = dict.fromkeys(SITES, Fitted(Smooth(jnp.ones((3, 64)))))
    fits["mlp_out"] = Fitted(Smooth(jnp.ones((2, 96))))
    with pytest.raises(ValueError, match="none for mlp_out of 3 layers"):
        quantize_decoder(plan_of("rtn", fits=fits), model, TOKENS)


def test_the_report_has_a_row_for_each_linear_and_says_what_rounding_costs(
    model, monkeypatch, caplog
):
    monkeypatch.setattr(walk, "FEWEST", 257)  # so that 256 tokens are few
    plan = plan_of("block_hadamard")
    parameters = {name: np.asarray(array[...][0]) for name, array in model.layers.items()}
    hidden = np.array(model.embedding[...])[TOKENS]
    layer = quantize_layer(plan, 0, parameters, hidden)
    report = report_layer(plan, 0, layer)
    assert [row["linear"].split(".")[-1] for row in report] == [
        *("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj")
    ]
    for row in report:
        # Two independent roundings of about 19 dB each give 16; one of them alone is half of that.
        assert 13 < row["sqnr_db"] < 20
        assert 0.2 < row["weight_error"] * 10 ** (row["sqnr_db"] / 10) < 0.8
    assert report[0]["bytes"] == 64 * 64 // 2 + 64 * 64 // 32
    assert len(caplog.messages) == 4
    assert caplog.messages[0].endswith(
        "attention_in is calibrated on 256 tokens, and an input of 64 channels takes 257: give "
        "more rows of text"
    )
    far = layer._replace(samples={site: 1e25 * x for site, x in layer.samples.items()})
    says = r"layers\.0\.self_attn\.q_proj: 3 of 5 sums of squares, .* NaN or Inf: the model overf"
    with pytest.raises(ValueError, match=says):
        report_layer(plan, 0, far)


def test_sequential_calibrates_each_layer_on_the_quantized_ones_before_it(model):
    *_, at_once = quantize_decoder(plan_of(), model, TOKENS)
    *_, in_turn = quantize_decoder(plan_of(sequential=True), model, TOKENS)
    for site in SITES:
        smooth = lambda state, layer: state[site].transform.links[0].scale[layer]  # noqa: B023, E731
        np.testing.assert_array_equal(smooth(at_once, 0), smooth(in_turn, 0))
        assert bool(jnp.any(smooth(at_once, 1) != smooth(in_turn, 1)))


@pytest.mark.slow
def test_sequential_hands_on_what_the_quantized_model_computes(model):
    plan = plan_of(sequential=True)
    hidden = np.array(model.embedding[...])[TOKENS]
    layers = []
    for number in range(3):
        parameters = {name: np.asarray(array[...][number]) for name, array in model.layers.items()}
        layers.append(quantize_layer(plan, number, parameters, hidden).sites)
    norm = hidden / np.sqrt(np.mean(hidden**2, axis=-1, keepdims=True) + TINY.rms_norm_eps)
    wanted = norm * np.asarray(model.norm[...]) @ np.asarray(model.embedding[...]).T
    np.testing.assert_allclose(logits(model, plan, stack_layers(layers)), wanted, atol=2e-3)


def test_what_is_excluded_stays_float_and_the_rest_is_what_it_was(model):
    exclude = ("*.1.mlp.down_proj", "*.k_proj")
    plan = plan_of(exclude=exclude)
    *_, runs = quantize_decoder(plan, model, TOKENS)
    assert isinstance(runs, tuple)
    assert len(runs) == 3
    assert not isinstance(runs[1]["mlp_out"].weights[0], MXArray)
    *_, whole = quantize_decoder(plan_of(), model, TOKENS)
    for layer in range(3):
        kept = runs[layer]["attention_in"].weights[1]
        np.testing.assert_array_equal(kept[0], model.weights("attention_in")[1][layer])
        for a, b in zip(runs[layer]["mlp_in"].weights, whole["mlp_in"].weights, strict=True):
            np.testing.assert_array_equal(a.codes()[0], b.codes()[layer])


@pytest.mark.slow
def test_a_model_runs_in_runs_where_its_layers_differ(model):
    plan = plan_of()
    *_, state = quantize_decoder(plan, model, TOKENS)
    parts = (slice(0, 1), slice(1, 3))
    split = tuple(jax.tree.map(lambda leaf: leaf[part], state) for part in parts)  # noqa: B023
    np.testing.assert_allclose(
        logits(model, plan, split), logits(model, plan, state), rtol=1e-4, atol=1e-4
    )


@pytest.mark.slow
def test_formats_may_differ_by_site(model):
    w4a8 = dataclasses.replace(recipe("rtn", "floor"), activation_format=MXFP8())
    w4a16 = dataclasses.replace(recipe("rtn", "floor"), activation_format=BFloat16())
    mixed = plan_of("rtn", recipes=dict.fromkeys(SITES, w4a8) | {"mlp_out": w4a16})
    exact = jax.jit(lambda m, t: m(t)[0])(model, TOKENS)

    def off(plan):
        *_, state = quantize_decoder(plan, model, TOKENS)
        return float(jnp.mean(jnp.square(logits(model, plan, state) - exact)))

    assert off(mixed) < 0.8 * off(plan_of("rtn"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"exclude": ("*.lm_head",)}, r"--exclude '\*.lm_head' matches no linear"),
        ({"exclude": ("*",)}, "leave nothing to quantize"),
    ],
)
def test_a_choice_that_cannot_be_meant_is_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        plan_of(**changes).check()


def test_fewer_tokens_than_a_fit_needs_are_a_warning_that_says_how_many_do(caplog):
    widths = Plan.of(TINY, recipe("wush")).widths(0)
    for seen, warned in ((63, 4), (95, 1), (96, 0), (1, 4)):
        caplog.clear()
        for site, width in widths.items():
            warn_of_few_tokens(site, recipe("wush"), width, seen)
        assert len(caplog.messages) == warned
    assert (
        "mlp_out is calibrated on 1 tokens, and a Gram matrix of 96 channels takes 96"
        in (caplog.messages[3])
    )


def test_what_a_walk_is_not_given_is_asked_for(model):
    stats = {s: Stats.init(width, 1, 1) for s, width in plan_of().widths(0).items()}
    wanted = {
        "calibrated on hidden states": (plan_of("rtn"), None),
        "looks at moved inputs: give the hidden states": (plan_of("rtn", rounding="gptq"), stats),
    }
    for says, (plan, own) in wanted.items():
        with pytest.raises(ValueError, match=says):
            quantize_layer(plan, 0, next(layers_of(model)), None, stats=own)
    with pytest.raises(ValueError, match="calibrates on the quantized layers: give no stats"):
        quantize_decoder(plan_of("rtn", sequential=True), model, TOKENS, stats=stats)
    with pytest.raises(ValueError, match="quantized in float32, not in bfloat16: load it so"):
        quantize_decoder(plan_of("rtn"), model.computing(jnp.bfloat16), TOKENS)


def test_an_input_or_a_fit_that_is_nan_names_layer_and_site_and_counts():
    spoilt = Stats.init(64, 1, 1).replace(absmax=jnp.full(64, jnp.inf))
    with pytest.raises(ValueError, match=r"layers\.3\.mlp_in: .* moved is NaN or Inf in 64 of 64"):
        check_input("model.layers.3.mlp_in", spoilt, "before it is moved")
    fitted = Fitted(Smooth(jnp.asarray([1.0, jnp.nan])))
    with pytest.raises(ValueError, match=r"layers\.3\.mlp_in: its fit has NaN or Inf in 1 of 2"):
        check_fit("model.layers.3.mlp_in", fitted)
