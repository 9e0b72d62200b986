"""The loop that learns: batches, the best, any optimiser, killed and resumed, over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct

from duquantpp_jax.learning import training
from duquantpp_jax.learning.sharing import kept_bytes
from duquantpp_jax.learning.training import Objective, batches, held_out_loss, train, warmed_cosine

KEY = jax.random.key(0)
ADAM = optax.adam(1e-2)


@struct.dataclass
class Line(Objective):
    """Least squares: the least loss is reached by a unique w."""

    scale: jax.Array
    power: float = struct.field(pytree_node=False, default=2.0)

    def loss(self, learned, batch):
        x, y = batch
        return jnp.mean(jnp.abs(self.scale * (x @ learned["w"] - y)) ** self.power)


@pytest.mark.parametrize("steps", [1, 2, 19, 40])
def test_every_step_but_that_which_begins_a_warm_up_moves(steps):
    rates = [float(warmed_cosine(1e-3, steps)(step)) for step in range(steps)]
    assert max(rates) == pytest.approx(1e-3)
    assert [step for step, rate in enumerate(rates) if rate == 0] == ([0] if steps >= 20 else [])


class Killed(Exception):
    """Stands for whatever ends a run between two checks."""


@pytest.fixture(scope="module")
def rows():
    x = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    return x, x @ np.float32([1.0, -2.0, 0.5, 3.0])


def run(rows, optimizer=ADAM, key=KEY, objective=None, **options):
    x, y = rows
    options = {"steps": 40, "batch_rows": 8, "check_every": 10} | options
    return train(
        objective or Line(jnp.float32(1.0)),
        {"w": jnp.zeros(4)},
        (x[:40], y[:40]),
        (x[40:], y[40:]),
        key,
        optimizer=optimizer,
        **options,
    )


@pytest.mark.parametrize(
    "optimizer",
    [
        ADAM,
        optax.sgd(1e-2, momentum=0.9),
        optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.scale_by_adam(),
            optax.scale_by_learning_rate(optax.cosine_decay_schedule(0.2, 40)),
        ),
        optax.lbfgs(),
    ],
    ids=["adam", "momentum", "schedule", "lbfgs"],
)
def test_any_optimizer_ends_below_the_start_on_held_out_rows(rows, optimizer):
    found = run(rows, optimizer)
    least = min(loss for _, _, loss in found.history)
    assert least < found.start_loss
    x, y = rows
    kept = held_out_loss(Line(jnp.float32(1.0)), found.learned, (x[40:], y[40:]), 8)
    assert kept == pytest.approx(least, rel=1e-6)
    assert [step for step, _, _ in found.history] == [10, 20, 30, 40]


def test_where_learning_only_harms_the_start_is_kept(rows):
    found = run(rows, optax.sgd(-1e-2))
    assert min(loss for _, _, loss in found.history) > found.start_loss
    np.testing.assert_array_equal(found.learned["w"], np.zeros(4))


def killing(after):
    """A callback that kills the run at its `after`-th check, and the steps that it has seen."""
    seen = []

    def report(step, *_):
        seen.append(step)
        if len(seen) == after:
            raise Killed

    return report, seen


def test_a_killed_run_goes_on_to_the_same_bits(rows, tmp_path):
    whole = run(rows)
    place = tmp_path / "state.safetensors"
    report, _ = killing(2)
    with pytest.raises(Killed):
        run(rows, checkpoint=place, callback=report)
    report, seen = killing(3)
    resumed = run(rows, checkpoint=place, callback=report)
    assert seen == [30, 40]
    np.testing.assert_array_equal(resumed.learned["w"], whole.learned["w"])
    assert (resumed.start_loss, resumed.history) == (whole.start_loss, whole.history)

    report, seen = killing(1)
    finished = run(rows, checkpoint=place, callback=report)
    assert seen == []
    np.testing.assert_array_equal(finished.learned["w"], whole.learned["w"])
    assert list(tmp_path.iterdir()) == [place]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"key": jax.random.key(1)}, "another key"),
        ({"steps": 50}, r"another pace \(40 steps, batches of \d+, checked .*, not 50 steps, bat"),
        ({"check_every": 20}, "another pace"),
        ({"batch_rows": 5}, "another pace"),
        ({"objective": Line(jnp.float32(1.0), power=4.0)}, "another objective"),
        ({"objective": Line(jnp.float32(2.0))}, "another objective"),
        ({"optimizer": optax.sgd(1e-2)}, "another optimizer"),
        ({"optimizer": optax.adam(2e-2)}, "another optimizer"),
        ({"optimizer": optax.adam(optax.linear_schedule(1e-2, 0.0, 40))}, "another optimizer"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(rows, tmp_path, changes, says):
    place = tmp_path / "state.safetensors"
    run(rows, checkpoint=place)
    with pytest.raises(ValueError, match=f"{says}.*remove it to begin anew"):
        run(rows, checkpoint=place, **changes)


@struct.dataclass
class OtherLine(Line):
    """With the same fields and arrays: another objective by its class."""


def test_learning_that_diverges_stops_keeps_the_best_and_says_so_once_resumed_too(
    rows, tmp_path, caplog
):
    place, steep = tmp_path / "state.safetensors", optax.sgd(1e30)
    for _ in range(2):
        found = run(rows, optimizer=steep, checkpoint=place)
        assert [step for step, *_ in found.history] == [10]
        np.testing.assert_array_equal(found.learned["w"], np.zeros(4))
    assert len(caplog.messages) == 2
    assert "diverged by step 10" in caplog.messages[1]
    assert f"of held-out loss {found.start_loss:g}: give a lower rate" in caplog.messages[1]
    with pytest.raises(ValueError, match="another objective"):
        run(rows, optimizer=steep, objective=OtherLine(jnp.float32(1.0)), checkpoint=place)


def test_a_checkpoint_of_other_rows_and_a_file_that_is_none_are_refused(rows, tmp_path):
    place = tmp_path / "state.safetensors"
    run(rows, checkpoint=place)
    x, y = rows
    for number in (3, 45):  # to learn from, and held out
        for part in (0, 1):
            changed = [x.copy(), y.copy()]
            changed[part][number] *= 1 + 2**-20
            with pytest.raises(ValueError, match="another rows"):
                run(tuple(changed), checkpoint=place)
    place.write_bytes(b"not this")
    with pytest.raises(ValueError, match=r"state\.safetensors cannot be read"):
        run(rows, checkpoint=place)


def test_every_pass_takes_every_row_once():
    order = batches(KEY, 10, 5, 6)
    assert order.shape == (6, 5)
    for number in range(3):
        np.testing.assert_array_equal(
            np.sort(order[2 * number : 2 * number + 2].ravel()), range(10)
        )
    assert not np.array_equal(order[:2], order[2:4])


@pytest.mark.parametrize("parts", [2, 8])
def test_a_batch_in_parts_learns_what_the_whole_batch_learns(rows, parts):
    whole, found = run(rows), run(rows, accumulate=parts)
    np.testing.assert_allclose(found.learned["w"], whole.learned["w"], rtol=1e-5)
    np.testing.assert_allclose(found.history, whole.history, rtol=1e-4)


@pytest.mark.parametrize("parts", [0, 3, 16])
def test_a_batch_that_has_no_such_parts_is_refused(rows, parts):
    with pytest.raises(ValueError, match=f"8 rows cannot be taken in {parts} parts of as many"):
        run(rows, accumulate=parts)


@struct.dataclass
class Wide(Line):
    """As much as a device has is kept for its gradient."""

    def sparing(self):
        return OtherLine(self.scale * 2)


def test_where_memory_is_tight_the_loss_that_keeps_less_is_learned(rows, monkeypatch):
    plain = run(rows, objective=Wide(jnp.float32(1.0)))
    kept = kept_bytes(Wide(jnp.float32(1.0)), {"w": jnp.zeros(4)}, tuple(p[:8] for p in rows))
    starts = {}
    for memory in (2 * kept, 2 * kept - 1):
        monkeypatch.setattr(training, "memory_of", lambda _: memory)  # noqa: B023
        starts[memory] = run(rows, objective=Wide(jnp.float32(1.0))).start_loss
    assert starts == {2 * kept: plain.start_loss, 2 * kept - 1: pytest.approx(4 * plain.start_loss)}


@struct.dataclass
class Opposed(Line):
    """What lowers the loss raises that by which it is judged."""

    def judging(self):
        return Falling(self.scale)


@struct.dataclass
class Falling(Line):
    def loss(self, learned, batch):
        return 100 - Line(self.scale).loss(learned, batch)


def test_the_best_step_is_chosen_by_the_loss_that_judges(rows):
    plain, found = run(rows), run(rows, objective=Opposed(jnp.float32(1.0)))
    assert found.start_loss == pytest.approx(100 - plain.start_loss)
    assert [held for *_, held in found.history] == pytest.approx(
        [100 - held for *_, held in plain.history]
    )
    np.testing.assert_array_equal(found.learned["w"], 0)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_held_out_loss_is_the_mean_over_all_rows_however_many_fill_a_batch(rows, count):
    x, y = (part[:count] for part in rows)
    learned = {"w": jnp.ones(4)}
    found = held_out_loss(Line(jnp.float32(1.0)), learned, (x, y), 2)
    assert found == pytest.approx(np.mean((x.sum(axis=1) - y) ** 2), rel=1e-5)


def test_no_held_out_rows_are_refused(rows):
    x, y = rows
    with pytest.raises(ValueError, match="no rows are held out"):
        held_out_loss(Line(jnp.float32(1.0)), {"w": jnp.ones(4)}, (x[:0], y[:0]), 2)


def test_too_few_rows_are_refused():
    with pytest.raises(ValueError, match="less than a batch of 16"):
        batches(KEY, 10, 16, 6)
