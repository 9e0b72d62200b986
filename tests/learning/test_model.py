"""Learning through the model: the loss falls on rows that it did not learn from, and what is
learned is what the quantized model then has."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from duquantpp_jax.checkpoints import load, testbed
from duquantpp_jax.evaluation.predict import Predictor, Reference, kl_divergence, normalized
from duquantpp_jax.formats import MXFP4
from duquantpp_jax.learning import model as learning_model
from duquantpp_jax.learning.model import Divergence, at_rates, head_divergence, learn_model
from duquantpp_jax.learning.moves import Learned, Moves
from duquantpp_jax.learning.training import held_out_loss
from duquantpp_jax.models import SITES, dense
from duquantpp_jax.ptq.plan import Plan
from duquantpp_jax.ptq.site import QuantizedLinear
from duquantpp_jax.ptq.walk import quantize_decoder
from duquantpp_jax.recipes import recipe
from duquantpp_jax.transforms.block import BlockAffine
from duquantpp_jax.transforms.learned import PARAMETRIZATIONS
from tests.conftest import tiny_decoder

FORMATS = (MXFP4(), MXFP4())


@pytest.fixture(scope="module")
def model(shallow):
    return load(testbed.directory())


def _start(model):
    """Random rotations: Hadamard matrices make 32 equal numbers of position 0, which may all round
    the other way when a sum is taken in another order."""
    start, random = {}, np.random.default_rng(0)
    for site in SITES:
        layers, _, width = model.weights(site)[0].shape
        normal = random.standard_normal((layers, width // 32, 32, 32))
        r = np.linalg.qr(normal)[0].astype(np.float32)
        start[site] = BlockAffine(jnp.asarray(r), jnp.asarray(r.swapaxes(-1, -2)))
    return start


def _divergence(model, format, state, rows):
    """Mean KL in nats, as the engine measures it."""
    sums = Reference(Predictor(model), rows).row_sums(
        Predictor(model, QuantizedLinear(format), state)
    )
    return sums.kl.sum() / rows[:, 1:].size


@pytest.mark.slow
def test_held_out_loss_falls_and_the_best_is_kept(model):
    moves = Moves(PARAMETRIZATIONS["affine"], weights="moved", scale_offset=True, through_amax=True)
    rows = testbed.calibration_rows()[:20, :64]

    def learn(steps, rates):
        return learn_model(
            model,
            _start(model),
            moves,
            FORMATS,
            rows[:16],
            rows[16:],
            jax.random.key(0),
            steps=steps,
            optimizer=at_rates(rates),
            batch_rows=4,
            check_every=4,
            dtype=jnp.float32,
        )

    constant = optax.constant_schedule
    learning = learn(8, {"transform": constant(1e-3), "weights": constant(1e-4)})
    best = min(loss for _, _, loss in learning.history)
    assert best < learning.start_loss
    assert [step for step, _, _ in learning.history] == [4, 8]

    # The quantized model made of what was learned has the loss that was measured, but for single
    # numbers that round the other way (1 % on so few targets).
    plan = Plan.of(model.config, recipe("rtn", "floor"), fits=learning.fits)
    *_, state = quantize_decoder(plan, model, rows[16:, :-1])

    assert _divergence(model, MXFP4(), state, rows[16:]) == pytest.approx(best, rel=0.05)


@pytest.mark.slow
def test_what_is_kept_of_the_float_model_changes_no_loss_and_is_bounded(model, monkeypatch):
    rows = testbed.calibration_rows()[:3, :33]
    moves, start = Moves(PARAMETRIZATIONS["affine"], through_amax=True), _start(model)
    objective = Divergence(start, moves, FORMATS, model, dtype=jnp.float32)
    learned = {site: moves.init(start[site], model.weights(site)) for site in start}
    assert objective.prepared(rows, 2, 1.5) is rows
    kept = objective.prepared(rows, 2, 2.0)
    assert kept[1].shape == (3, 32, model.config.hidden_size)
    found = [held_out_loss(objective, learned, each, 3) for each in (rows, kept)]
    assert found[0] > 0
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    monkeypatch.setattr(learning_model, "KEPT_BYTES", kept[1].nbytes - 1)
    assert objective.prepared(rows, 2, 2.0) is rows


def test_the_gradient_of_the_head_row_by_row_and_of_layers_run_again_is_that_of_the_whole():
    model, draw = tiny_decoder(), np.random.default_rng(0)
    rows = jnp.asarray(draw.integers(0, 257, (3, 17)), jnp.int32)
    wanted = jnp.asarray(draw.standard_normal((3, 17, model.config.hidden_size), np.float32))

    def linear(site, x, weights, state):
        return dense(site, x * state, weights, None)

    def whole(scales, model):
        hidden = model.hidden(rows, linear, scales)
        log_q, log_p = (normalized(model.logits(h)) for h in (hidden, wanted))
        return jnp.mean(kl_divergence(log_p, log_q))

    def by_row(scales, model):
        return head_divergence(model, model.hidden(rows, linear, scales), wanted)

    scales = dict.fromkeys(SITES, jnp.ones(model.config.num_hidden_layers))
    loss, gradient = jax.jit(jax.value_and_grad(whole))(scales, model)
    for each in (model, model.rematerializing()):
        found, moved = jax.jit(jax.value_and_grad(by_row))(scales, each)
        np.testing.assert_allclose(found, loss, rtol=1e-5)
        for site in SITES:
            np.testing.assert_allclose(moved[site], gradient[site], rtol=1e-3, atol=1e-6)
            assert np.all(np.abs(gradient[site]) > 1e-5)


@jax.numpy_dtype_promotion("standard")  # optax counts on it
def test_each_part_moves_by_its_own_rate_of_each_step_and_others_stay():
    rates = {"transform": lambda step: 0.5 + step, "log_clip": lambda step: 1 / (2 + step)}
    update = Learned({"a": jnp.ones((1, 2, 2))}, (jnp.ones((2, 2)),), None, jnp.ones(1), None)
    optimizer = at_rates(rates, optax.identity())
    state = optimizer.init(update)
    for step in range(3):
        moved, state = optimizer.update(update, state)
        np.testing.assert_allclose(moved.transform["a"], -(0.5 + step))
        np.testing.assert_allclose(moved.log_clip, -1 / (2 + step), rtol=1e-6)
        np.testing.assert_array_equal(moved.weights[0], 0)


def test_rates_are_for_parts_that_learn():
    with pytest.raises(ValueError, match="weight does not learn: rates are for transform, weights"):
        at_rates({"weight": optax.constant_schedule(1e-3)})
