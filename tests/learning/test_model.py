"""Learning through the model: the loss falls on rows that it did not learn from, and what is
learned is what the quantized model then has."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from duquantpp_jax.calibration import calibrate, site_widths
from duquantpp_jax.formats import MXFP4
from duquantpp_jax.learning.model import batches, held_out_loss, learn_model
from duquantpp_jax.learning.moves import Moves
from duquantpp_jax.models import SITES, load, testbed
from duquantpp_jax.ptq import QuantizedLinear, quantize_model
from duquantpp_jax.recipes import recipe
from duquantpp_jax.transforms.block import BlockAffine
from duquantpp_jax.transforms.hadamard import hadamard
from duquantpp_jax.transforms.learned import PARAMETRIZATIONS

FORMATS = (MXFP4(), MXFP4())


@pytest.fixture(scope="module")
def model():
    return load(testbed.directory())


def _hadamard(model):
    start = {}
    for site in SITES:
        layers, _, width = model.weights(site)[0].shape
        h = jnp.broadcast_to(hadamard(32), (layers, width // 32, 32, 32))
        start[site] = BlockAffine(h, jnp.swapaxes(h, -1, -2))
    return start


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moves", "rate"),
    [
        (Moves(PARAMETRIZATIONS["affine"], through_amax=True), 1e-3),
        (Moves(PARAMETRIZATIONS["expm"], weights="given", scale_offset=True), 1e-4),
        (Moves(None, weights="moved"), 1e-3),
    ],
    ids=["affine", "rotation and weights", "weights"],
)
def test_held_out_loss_falls_and_the_best_is_kept(model, moves, rate):
    rows = testbed.calibration_rows()[:20, :128]

    def learn(steps, rates):
        return learn_model(
            model,
            _hadamard(model),
            moves,
            FORMATS,
            rows[:16],
            rows[16:],
            jax.random.key(0),
            steps=steps,
            rates=rates,
            batch_rows=4,
            check_every=4,
        )

    constant = optax.constant_schedule
    learning = learn(8, {"transform": constant(rate), "weights": constant(1e-4)})
    still = learn(4, {})
    best = min(loss for _, _, loss in learning.history)
    assert best < still.history[-1][2]
    assert [step for step, _, _ in learning.history] == [4, 8]

    # The quantized model made of what was learned has the loss that was measured, up to the
    # products in bfloat16.
    widths = site_widths(model, 32)
    weights = {site: model.weights(site) for site in SITES}
    one = recipe("rtn", "floor")
    stats = calibrate(model, rows[16:, :-1], widths, batch_rows=4)
    state = quantize_model(one, weights, stats, learning.fits)

    @jax.jit
    def divergence(tokens):
        log_p = jax.nn.log_softmax(model(tokens)[0])
        log_q = jax.nn.log_softmax(model(tokens, QuantizedLinear(MXFP4()), state)[0])
        return jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1))

    assert float(divergence(jnp.asarray(rows[16:, :-1]))) == pytest.approx(best, rel=0.05)


def test_every_pass_takes_every_row_once():
    order = batches(jax.random.key(0), 10, 5, 6)
    assert order.shape == (6, 5)
    for number in range(3):
        np.testing.assert_array_equal(
            np.sort(order[2 * number : 2 * number + 2].ravel()), range(10)
        )
    assert not np.array_equal(order[:2], order[2:4])


def test_held_out_loss_weighs_rows_alike_and_wants_some(model):
    start, moves = _hadamard(model), Moves(None)
    learned = {site: moves.init(start[site], model.weights(site)) for site in SITES}
    rows = testbed.calibration_rows()[:3, :64]

    def loss(rows, batch_rows):
        static = {"moves": moves, "formats": FORMATS}
        return held_out_loss(model, start, learned, rows, batch_rows, **static)

    assert loss(rows, 2) == pytest.approx((2 * loss(rows[:2], 2) + loss(rows[2:], 2)) / 3)
    with pytest.raises(ValueError, match="no rows are held out"):
        loss(rows[:0], 2)


def test_too_few_rows_are_refused():
    with pytest.raises(ValueError, match="less than a batch of 16"):
        batches(jax.random.key(0), 10, 16, 6)
