"""Learning block by block: the memory of one block, each given what those before it make."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from duquantpp_jax.formats import MXFP4
from duquantpp_jax.learning.blocks import learn_blocks, stack_blocks
from duquantpp_jax.learning.model import at_rates
from duquantpp_jax.learning.moves import Moves
from duquantpp_jax.learning.training import Trained
from duquantpp_jax.models import SITES, dense
from duquantpp_jax.models.layers import layer, positional_of
from duquantpp_jax.ptq.plan import Plan
from duquantpp_jax.ptq.site import QuantizedLinear, layer_of
from duquantpp_jax.ptq.walk import quantize_decoder
from duquantpp_jax.recipes import recipe
from duquantpp_jax.transforms.block import BlockAffine
from duquantpp_jax.transforms.learned import Cayley
from tests.conftest import tiny_decoder

FORMATS = (MXFP4(), MXFP4())
MOVES = Moves(Cayley())
KEY = jax.random.key(3)
OPTIMIZER = at_rates({"transform": optax.constant_schedule(3e-3)})
OPTIONS = {"steps": 6, "check_every": 3, "optimizer": OPTIMIZER}
TOKENS = np.random.default_rng(0).integers(0, 257, (12, 17)).astype(np.int32)


@pytest.fixture(scope="module")
def model():
    return tiny_decoder()


def start(model, seed=0):
    """Random rotations."""
    found, random = {}, np.random.default_rng(seed)
    for site in SITES:
        layers, _, width = model.weights(site)[0].shape
        normal = random.standard_normal((layers, width // 32, 32, 32))
        r = np.linalg.qr(normal)[0].astype(np.float32)
        found[site] = BlockAffine(jnp.asarray(r), jnp.asarray(r.swapaxes(-1, -2)))
    return found


def blocks_of(model, starts, asked=None, **options):
    """`learn_blocks`, saying in `asked` which blocks it has asked for."""
    arrays = {name: array[...] for name, array in model.layers.items()}
    embedding = np.asarray(model.embedding[...])
    hidden = embedding[TOKENS[:8, :-1]], embedding[TOKENS[8:, :-1]]

    def blocks():
        for number in range(2):
            if asked is not None:
                asked.append(number)
            yield layer_of((arrays, starts), number)

    return learn_blocks(model.config, blocks(), MOVES, FORMATS, *hidden, KEY, **options)


@pytest.fixture(scope="module")
def learned(model):
    return stack_blocks(list(blocks_of(model, start(model), **OPTIONS)))


@pytest.mark.slow
def test_held_out_loss_falls_and_is_that_of_the_quantized_blocks(model, learned):
    least = min(loss for _, _, loss in learned.history)
    assert least < learned.start_loss
    assert [step for step, _, _ in learned.history] == [3, 6]

    plan = Plan.of(model.config, recipe("rtn", "floor"), fits=learned.fits)
    *_, state = quantize_decoder(plan, model, TOKENS[8:, :-1])
    plain = hidden = model.embedding[...][TOKENS[8:, :-1]]
    losses = []
    block = jax.jit(functools.partial(layer, model.config), static_argnums=(3,))
    for number in range(2):
        arrays = {name: array[...][number] for name, array in model.layers.items()}
        where = positional_of(model.config, number)
        plain, *_ = block(plain, arrays, where, dense, dict.fromkeys(SITES))
        rounding = QuantizedLinear(FORMATS[0])
        hidden, *_ = block(hidden, arrays, where, rounding, layer_of(state, number))
        off = jnp.sum((hidden - plain) ** 2, axis=-1) / jnp.sum(plain**2, axis=-1)
        losses.append(float(jnp.mean(off)))
    assert np.mean(losses) <= min(learned.start_loss, 1.05 * least)


@pytest.mark.slow
def test_a_block_that_cannot_be_learned_is_named_by_its_number_of_all(model):
    spoilt = jax.tree.map(lambda leaf: leaf * np.float32(np.nan), start(model))
    says = "^block 1 of 2: where learning starts the loss of 4 held-out rows is NaN or Inf"
    with pytest.raises(ValueError, match=says):
        next(blocks_of(model, spoilt, **OPTIONS))


@pytest.mark.slow
def test_the_history_of_blocks_ends_with_that_of_a_block_that_diverged():
    whole = Trained(None, 1.0, [(3, 1.0, 2.0), (6, 0.5, 1.0)], {})
    diverged = Trained(None, 3.0, [(3, float("nan"), 4.0)], {})
    found = stack_blocks([whole, diverged])
    np.testing.assert_array_equal(found.history, [(3, np.nan, 3.0)])
    assert found.start_loss == 2.0


@pytest.mark.slow
def test_blocks_know_of_those_before(model):
    other = start(model)
    for site, rotations in start(model, seed=1).items():
        first = lambda a, b: jnp.stack([b[0], a[1]])  # noqa: E731
        other[site] = jax.tree.map(first, other[site], rotations)

    def second_loss(starts):
        _, second = blocks_of(model, starts, **OPTIONS | {"steps": 3})
        return second.start_loss

    assert second_loss(start(model)) != second_loss(other)


@pytest.mark.slow
def test_blocks_are_asked_for_one_at_a_time_and_a_killed_run_goes_on(model, learned, tmp_path):
    asked = []

    def run(**options):
        return blocks_of(model, start(model), asked, checkpoint=tmp_path, **options)

    running = run(**OPTIONS)
    next(running)
    assert asked == [0]
    assert [path.name for path in tmp_path.iterdir()] == ["block_0.safetensors"]
    running.close()  # killed between two blocks

    class Killed(Exception):
        pass

    steps = []

    def report(step, *_):
        steps.append(step)
        raise Killed

    with pytest.raises(Killed):  # and within the second
        list(run(callback=report, **OPTIONS))
    seen = lambda step, *_: steps.append(step)  # noqa: E731
    _, second = run(callback=seen, **OPTIONS)
    assert steps == [3, 6]
    for site in SITES:
        np.testing.assert_array_equal(
            second.fits[site].transform.matrices, learned.fits[site].transform.matrices[1]
        )
