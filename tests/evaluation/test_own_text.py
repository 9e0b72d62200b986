"""Rows that a model writes itself: its distribution, and what they depend on."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save

from duquantpp_jax.checkpoints import load, sha256
from duquantpp_jax.evaluation import own_text
from duquantpp_jax.evaluation.own_text import batch_rows, own_rows
from duquantpp_jax.evaluation.rows import TARGETS
from tests.conftest import tiny_decoder

BOS = 256
BATCH = 16


@pytest.fixture
def short(tmp_path, monkeypatch):
    """Rows of 32 tokens, kept where there are none yet."""
    monkeypatch.setattr(own_text, "TARGETS", 31)
    monkeypatch.setenv("DUQUANTPP_CACHE", str(tmp_path / "kept"))


def test_a_batch_is_as_large_as_its_cache_allows(monkeypatch):
    config = tiny_decoder().config
    assert batch_rows(config) == BATCH
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    large = dataclasses.replace(
        config, num_hidden_layers=32, num_key_value_heads=8, head_dim=128, num_attention_heads=32
    )
    assert [batch_rows(c) for c in (config, large)] == [256, 64]


@pytest.mark.slow
def test_rows_have_the_entropy_that_the_model_says(tiny_directory):
    """E[-log p(x_t)] is the mean entropy of p; their difference over 2,044 draws has a standard
    error of about .03. Greedy tokens would be off by all of the entropy."""
    rows = own_rows(tiny_directory, 4, 1)
    assert rows.shape == (4, TARGETS + 1)
    assert (rows[:, 0] == BOS).all()
    logits = jax.jit(lambda model, tokens: model(tokens)[0])(load(tiny_directory), rows[:, :-1])
    log = np.asarray(jax.nn.log_softmax(logits), np.float64)
    nll = -np.take_along_axis(log, rows[:, 1:, None], axis=-1)[..., 0]
    difference = nll + np.sum(np.exp(log) * log, axis=-1)
    assert np.abs(difference.mean()) < 4 * difference.std() / np.sqrt(difference.size) < 0.15


def test_a_row_depends_on_the_model_the_seed_and_its_number_alone(
    short, tiny_directory, tmp_path, monkeypatch
):
    many = own_rows(tiny_directory, BATCH + 1, 1)
    assert len({row.tobytes() for row in many}) == BATCH + 1
    assert (own_rows(tiny_directory, 1, 2) != many[:1])[:, 1:].mean() > 0.5
    monkeypatch.setenv("DUQUANTPP_CACHE", str(tmp_path / "other"))  # where none is kept
    np.testing.assert_array_equal(own_rows(tiny_directory, 3, 1), many[:3])


def test_rows_that_are_kept_need_no_model(tiny_directory, monkeypatch):
    wanted = own_rows(tiny_directory, 4, 1)
    monkeypatch.setattr(own_text, "load", lambda _: 1 / 0)
    np.testing.assert_array_equal(own_rows(tiny_directory, 3, 1), wanted[:3])


def test_kept_rows_that_are_none_are_written_again(tiny_directory, tmp_path, monkeypatch):
    wanted = own_rows(tiny_directory, BATCH, 1)
    monkeypatch.setenv("DUQUANTPP_CACHE", str(tmp_path))
    monkeypatch.setattr(own_text, "_written", lambda model, key: wanted)
    kept = tmp_path / f"{sha256(tiny_directory)}-1-{BATCH}-0.safetensors"
    for spoiled in (wanted[:, ::-1], wanted[:2], wanted - wanted - 1, wanted * 2.0, None):
        kept.write_bytes(b"" if spoiled is None else save({"tokens": spoiled.copy()}))
        np.testing.assert_array_equal(own_rows(tiny_directory, BATCH, 1), wanted)
        np.testing.assert_array_equal(load_file(kept)["tokens"], wanted)


def test_an_end_of_sequence_ends_no_row_and_what_cannot_be_kept_is_written(
    short, tiny_directory, directory, monkeypatch
):
    wanted = own_rows(tiny_directory, 2, 1)
    monkeypatch.setenv("DUQUANTPP_CACHE", "/dev/null/nowhere")
    fields = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(fields | {"eos_token_id": [*range(200)]}))
    np.testing.assert_array_equal(own_rows(directory, 2, 1), wanted)


def test_a_model_that_gives_nan_writes_no_rows(short):
    model = tiny_decoder()
    model.norm[...] = model.norm[...] * np.float32(np.inf)
    with pytest.raises(ValueError, match="gave NaN where it wrote rows"):
        own_text._written(model, jax.random.key(0))
