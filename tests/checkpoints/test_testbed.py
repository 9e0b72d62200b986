"""The embedded model is what its record says, and the experiment that made it still runs."""

import json
import lzma
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duquantpp_jax.checkpoints import load_tokenizer, testbed
from experiments import pretrain_testbed
from experiments.pretrain_testbed import END, Pretrain, batches, outliers, round_robin, row_losses

RECORD = Path(pretrain_testbed.__file__).parent / "results" / "pretrain_testbed.json"


@pytest.fixture(scope="module")
def record() -> dict:
    return json.loads(RECORD.read_text())


@pytest.fixture(scope="module")
def model():
    return testbed.load()


def test_the_rows_begin_with_token_0_and_fit_the_vocabulary(model):
    for rows, count in ((testbed.evaluation_rows(), 128), (testbed.calibration_rows(), 64)):
        assert rows.shape == (count, 512)
        assert rows.dtype == np.uint16
        assert (rows[:, 0] == 0).all()
        assert rows.max() < model.config.vocab_size
        assert len(np.unique(rows)) > 2000


def test_no_row_occurs_twice():
    rows = np.concatenate([testbed.evaluation_rows(), testbed.calibration_rows()])
    assert len(np.unique(rows[:, 1:17], axis=0)) == len(rows)


def test_the_package_holds_at_most_12_mb():
    assert sum(f.stat().st_size for f in testbed.directory().rglob("*") if f.is_file()) <= 12e6


def test_the_tokenizer_gives_every_text_back():
    tokenizer = load_tokenizer(testbed.directory())
    text = "Call me Ishmael.  \n\n\tDéjà vu — 5 × 10⁻³ 🙂"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.token_to_id(END) == 0
    assert tokenizer.get_vocab_size() == 4096


@pytest.mark.slow
def test_sampled_rows_are_as_surprising_as_the_model_expects(model):
    nll, entropy = jax.jit(row_losses)(model, jnp.asarray(testbed.evaluation_rows()[:16]))
    difference = np.asarray(nll - entropy, np.float64)
    assert abs(difference.mean()) < 4 * difference.std() / difference.size**0.5


@pytest.mark.slow
def test_the_loss_on_the_shipped_rows_is_the_recorded_one(model, record):
    check = pretrain_testbed.entropy_check(model, testbed.evaluation_rows())
    recorded = record["sampled"]["evaluation"]
    assert check["nll"] == pytest.approx(recorded["nll"], abs=1e-4)
    assert check["entropy"] == pytest.approx(recorded["entropy"], abs=1e-4)


def test_the_recorded_loss_on_both_sets_is_the_entropy_within_its_error(record):
    for check in record["sampled"].values():
        assert abs(check["nll"] - check["entropy"]) < 3 * check["standard_error"]


def test_outliers_are_the_recorded_ones(model, record):
    """The maxima of 8 rows are close to those of 64: outliers are a property of channels."""
    ratios = outliers(model, jnp.asarray(testbed.calibration_rows()[:8]), 0)
    for site, recorded in record["max_over_median"].items():
        assert ratios[site] == pytest.approx(recorded, rel=0.4)


def test_the_unseen_loss_fell_and_had_not_turned_up_by_the_end(record):
    """Records of the flat end differ by up to .004 from one to the next."""
    unseen = [point["unseen_loss"] for point in record["curve"]]
    assert record["curve"][-1]["step"] == record["steps"]
    assert unseen[-1] < unseen[len(unseen) // 2] < unseen[0]
    assert unseen[-1] - min(unseen) < 0.004


def test_an_epoch_cuts_every_book_into_rows_that_never_cross_books():
    books = [np.full(511 * 4 + 100, 1), np.full(300, 2), np.full(511 * 3, 3)]
    ids, feed = np.concatenate(books), batches(books, 2, seed=0)
    for _ in range(20):
        for start in next(feed):
            row = ids[start : start + 511]
            assert len(row) == 511
            assert len(set(row)) == 1


def test_round_robin_takes_the_first_row_of_every_book_first():
    books = [np.full(1100, 1, np.uint16), np.full(500, 2, np.uint16), np.full(600, 3, np.uint16)]
    rows = round_robin(books, 3)
    assert rows[:, 1].tolist() == [1, 3, 1]
    assert (rows[:, 0] == 0).all()


@pytest.mark.slow
def test_the_experiment_runs_at_toy_size(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain_testbed, "ROW", 64)
    monkeypatch.setattr(pretrain_testbed, "STRIDE", 32)  # two programs, not four
    (tmp_path / "text").mkdir()
    rng = np.random.default_rng(0)
    words = ["".join(map(chr, rng.integers(97, 123, 4))) for _ in range(200)]
    books = [" ".join(rng.choice(words, 1500)) for _ in range(6)]
    (tmp_path / "text" / "gutenberg_train.txt.xz").write_bytes(
        lzma.compress(END.join(books).encode())
    )
    toy = Pretrain(
        hidden_size=32,
        intermediate_size=64,
        layers=2,
        heads=2,
        kv_heads=1,
        vocab_size=300,
        unseen_books=2,
        unseen_rows=2,
        batch_rows=2,
        steps=4,
        evaluation_rows=2,
        calibration_rows=2,
    )
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam raises a float to an int32 power
        result = pretrain_testbed.main(toy, tmp_path, tmp_path / "out")
    assert result["steps"] == result["curve"][-1]["step"] == 4
    assert sorted(f.name for f in (tmp_path / "out" / "testbed").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokens.npz",
    ]
    assert json.loads((tmp_path / "out" / "pretrain_testbed.json").read_text()) == result
