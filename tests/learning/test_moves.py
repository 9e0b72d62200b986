"""What an optimiser moves: what it gives out is what it learned with."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duquantpp_jax.learning.moves import Moves
from duquantpp_jax.transforms.block import BlockAffine
from duquantpp_jax.transforms.hadamard import hadamard
from duquantpp_jax.transforms.learned import Cayley

WEIGHTS = tuple(
    jax.random.normal(key, (n, 64))
    for key, n in zip(jax.random.split(jax.random.key(0)), (8, 4), strict=True)
)
H = jnp.broadcast_to(hadamard(32), (2, 32, 32))
START = BlockAffine(H, jnp.swapaxes(H, 1, 2))


def clipped(moves, log_clip):
    learned = moves.init(START, WEIGHTS)
    return dataclasses.replace(learned, log_weight_clip=jnp.asarray(log_clip, jnp.float32))


@pytest.mark.parametrize("weights", ["fixed", "given", "moved"])
def test_clipped_weights_lie_within_their_clip_and_are_what_is_fitted(weights):
    moves = Moves(Cayley(), weights, weight_clip="block")
    learned = clipped(moves, np.log([0.5, 2.0]))
    blocks = [np.asarray(START.weights(w)).reshape(-1, 2, 32) for w in WEIGHTS]
    moved = moves.moved_weights(START, START, learned, WEIGHTS)
    fitted = moves.fitted(START, learned, WEIGHTS)
    for before, after, given in zip(blocks, moved, fitted.weights, strict=True):
        limit = 0.5 * np.abs(before[:, 0]).max(-1, keepdims=True)
        wanted = np.stack([np.clip(before[:, 0], -limit, limit), before[:, 1]], axis=1)
        np.testing.assert_allclose(after, wanted.reshape(after.shape), rtol=1e-6)
        np.testing.assert_allclose(fitted.transform.weights(given), after, atol=2e-6)


def test_what_a_clip_cuts_off_pulls_at_it_and_at_the_largest_weight():
    moves = Moves(None, weight_clip="site")
    learned = clipped(moves, [np.log(0.5)])

    def total(learned, weights):
        moved = moves.moved_weights(START, START, learned, weights)
        return sum(jnp.sum(jnp.abs(w)) for w in moved)

    to_clip, to_weights = jax.grad(total, argnums=(0, 1))(learned, WEIGHTS)
    magnitudes = [np.abs(np.asarray(START.weights(w), np.float64)).reshape(-1, 32) for w in WEIGHTS]
    peaks = [m.max(-1) for m in magnitudes]
    cut = [(m > 0.5 * p[:, None]).sum(-1) for m, p in zip(magnitudes, peaks, strict=True)]
    wanted = sum(float(np.sum(0.5 * p * n)) for p, n in zip(peaks, cut, strict=True))
    np.testing.assert_allclose(to_clip.log_weight_clip, [wanted], rtol=1e-5)
    for gradient, w, m, n in zip(to_weights, WEIGHTS, magnitudes, cut, strict=True):
        sign = np.sign(np.asarray(START.weights(w))).reshape(m.shape)
        peak = m == m.max(-1, keepdims=True)
        slope = sign * np.where(peak, 0.5 * n[:, None], m <= 0.5 * m.max(-1, keepdims=True))
        np.testing.assert_allclose(START.weights(gradient), slope.reshape(w.shape), atol=1e-5)


def test_layers_are_fitted_together_as_each_alone():
    moves = Moves(Cayley(), "given", scale_offset=True, clip="site", weight_clip="block")
    keys = jax.random.split(jax.random.key(1), 6)

    def random(tree):
        leaves, structure = jax.tree.flatten(tree)
        drawn = zip(jax.random.split(keys[0], len(leaves)), leaves, strict=True)
        return jax.tree.unflatten(
            structure, [0.3 * jax.random.normal(k, a.shape) for k, a in drawn]
        )

    first = (START, random(moves.init(START, WEIGHTS)), WEIGHTS)
    other = (START, jax.tree.map(lambda a: 0.5 * a, first[1]), WEIGHTS)
    together = moves.fitted(*jax.tree.map(lambda a, b: jnp.stack([a, b]), first, other))
    for number, alone in enumerate((first, other)):
        fitted = moves.fitted(*alone)
        assert fitted.clip.shape == fitted.scale_offset.shape == (2,)
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(fitted), strict=True):
            np.testing.assert_allclose(a[number], b, atol=1e-6)
