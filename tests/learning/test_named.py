"""Optimisers of optax by name and as objects, and callbacks."""

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from duquantpp_jax.cli import main
from duquantpp_jax.commands.options.learn import LearnSettings
from duquantpp_jax.learning import callbacks
from duquantpp_jax.learning.model import at_rates
from duquantpp_jax.learning.moves import Learned
from duquantpp_jax.learning.named import FACTORS, OPTIMIZERS, Optimizer, fingerprint, optimizer_of
from duquantpp_jax.learning.training import warmed_cosine

HOW = LearnSettings()
MATRIX = jnp.full((1, 2, 2), 0.5, jnp.float32)
GRADIENT = Learned({"w": MATRIX}, (MATRIX[0],), None, MATRIX[0, 0, :1], None)
START = jax.tree.map(jnp.zeros_like, GRADIENT)
NUMBERS = {"loss": 1.5, "held_out_loss": 2.5}


def updates(optimizer, steps):
    found, state = [], optimizer.init(START)
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(steps):
            update, state = optimizer.update(GRADIENT, state, START)
            found.append(jax.tree.leaves(update))
    return found


def test_any_optimizer_of_optax_can_be_named():
    assert {"adam", "adamw", "lamb", "lion", "rmsprop", "sgd", "yogi"} <= set(OPTIMIZERS)
    hashes = [fingerprint(Optimizer(name), HOW) for name in OPTIMIZERS]  # which traces an update
    assert len(set(hashes)) > len(OPTIMIZERS) - 3  # some are others without their decay


def test_parts_learn_at_their_factors_of_the_rate_as_they_did():
    schedule = optax.constant_schedule(0.1)
    rates = {part: lambda n, f=factor: f * schedule(n) for part, factor in FACTORS.items()}
    named = updates(Optimizer("adam")(schedule), 1)
    for found, wanted in zip(named, updates(at_rates(rates), 1), strict=True):
        for a, b in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(a, b)
    transform, weights, clip = (float(jnp.max(-leaf)) for leaf in named[-1])
    assert (weights / transform, clip / transform) == pytest.approx((0.1, 10), rel=1e-4)


def test_an_object_or_a_function_of_the_schedule_is_taken_as_it_is():
    ours = optax.adafactor(1e-3)
    assert optimizer_of(HOW, ours)(warmed_cosine(1.0, 3)) is ours
    assert optimizer_of(HOW, optax.lion) is optax.lion
    kinds = (optax.sgd(0.1), optax.sgd(0.2))
    assert len({fingerprint(optimizer_of(HOW, kind), HOW) for kind in kinds}) == 2
    with pytest.raises(ValueError, match="unknown optimizer 'rms': did you mean rmsprop"):
        optimizer_of(LearnSettings(optimizer="rms"), None)


def test_tensorboard_and_wandb_get_what_is_logged(monkeypatch, tmp_path):
    seen = []

    class Context:
        def __init__(self, *given, **named):
            seen.append((given, named))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            seen.append("closed")

        def add_scalar(self, *said):
            seen.append(said)

        def log(self, *said, step):
            seen.append((*said, step))

    monkeypatch.setitem(sys.modules, "tensorboardX", types.SimpleNamespace(SummaryWriter=Context))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=Context))
    with callbacks.tensorboard(tmp_path) as first, callbacks.wandb("p", mode="offline") as second:
        callbacks.each(first, second)(3, NUMBERS)
    assert seen == [
        ((str(tmp_path),), {}),
        ((), {"project": "p", "mode": "offline"}),
        *(("loss", 1.5, 3), ("held_out_loss", 2.5, 3), (NUMBERS, 3)),
        *("closed", "closed"),
    ]


LIBRARIES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


@pytest.mark.parametrize("option", LIBRARIES)
def test_without_the_library_one_line_names_the_extra(option, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, LIBRARIES[option], None)
    assert main(["learn", f"--{option}", "x"]) == 2
    printed = capsys.readouterr().err
    assert f"duquantpp_jax[{option}]" in printed
    assert printed.count("\n") == 1
    assert main(["learn", f"--{option}", "x", "--through", "site"]) == 2
    assert "site by site does not give" in capsys.readouterr().err
