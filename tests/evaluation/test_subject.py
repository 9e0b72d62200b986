"""What a comparison is of: models and texts by name and hash, rows, and the environment."""

import dataclasses
import pathlib

import numpy as np
import pytest

from duquantpp_jax import files
from duquantpp_jax.checkpoints import testbed
from duquantpp_jax.commands.options.common import MODEL, TARGETS
from duquantpp_jax.evaluation import subject
from tests.conftest import TINY, byte_tokenizer


def test_names_and_hashes_are_those_of_what_is_read(tiny_directory, tiny_text):
    embedded = subject.model_and_hash(None)
    assert embedded["name"] == "testbed"
    assert embedded != subject.model_and_hash(tiny_directory)
    assert subject.model_name(tiny_directory / "." / ".." / "tiny") == "tiny"
    wanted = {"name": "text.txt", "sha256": files.sha256(tiny_text)}
    assert subject.name_and_hash(tiny_text) == wanted
    assert subject.name_and_hash(MODEL) == {"name": "model"}
    assert subject.name_and_hash(None)["name"] == "tokens.npz"


@pytest.mark.parametrize(
    ("texts", "missing"),
    [
        ((None, None), "--text and --calibration-text:"),
        ((None, MODEL), "--text:"),
        ((MODEL, None), "--calibration-text:"),
    ],
)
def test_a_model_without_its_texts_is_refused_with_what_is_missing(texts, missing):
    with pytest.raises(ValueError, match=f"--model needs {missing}"):
        subject.check_texts(pathlib.Path("m"), *texts)
    subject.check_texts(None, *texts)
    subject.check_texts(pathlib.Path("m"), MODEL, MODEL)


def test_rows_are_the_first_of_the_embedded_ones_or_of_the_text(tiny_directory, tiny_text):
    for use, every in (
        ("evaluation", testbed.evaluation_rows()),
        ("calibration", testbed.calibration_rows()),
    ):
        found = subject.load_rows(None, None, 2 * TARGETS, use)
        np.testing.assert_array_equal(found.tokens, every[:2])
        assert found.documents.tolist() == [0, 1]
    found = subject.load_rows(tiny_directory, tiny_text, 2 * TARGETS, "evaluation")
    first = tiny_text.read_text().split("<|endoftext|>")[0]
    np.testing.assert_array_equal(found.tokens[0], [256, *byte_tokenizer().encode(first).ids[:511]])
    assert found.documents.tolist() == [0, 1]
    with pytest.raises(ValueError, match="the embedded text has"):
        subject.load_rows(None, None, 10**9, "evaluation")


def test_what_the_model_writes_is_for_calibration_alone(tiny_directory, monkeypatch):
    written = np.arange(3 * 512, dtype=np.int32).reshape(3, 512)
    asked = []

    def own_rows(*arguments):
        asked.append(arguments)
        return written[: arguments[1]]

    monkeypatch.setattr(subject, "own_rows", own_rows)
    found = subject.load_rows(tiny_directory, MODEL, 2 * TARGETS, "calibration", seed=4)
    np.testing.assert_array_equal(found.tokens, written[:2])
    assert asked == [(tiny_directory, 2, 4)]
    with pytest.raises(ValueError, match="cannot read model"):
        subject.load_rows(tiny_directory, MODEL, 2 * TARGETS, "evaluation")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"bos_token_id": None}, "names no bos_token_id"),
        ({"max_position_embeddings": 510}, "has 510 positions, and rows here have 511"),
    ],
)
def test_a_model_that_takes_no_such_rows_is_refused(changes, says, tiny_text, tiny_directory):
    config = dataclasses.replace(TINY, **changes)
    with pytest.raises(ValueError, match=says):
        subject.load_rows(tiny_directory, tiny_text, TARGETS, "evaluation", config=config)


def test_a_model_that_changes_under_way_is_refused(directory):
    before = subject.model_and_hash(directory)
    subject.check_unchanged(directory, before)
    (path,) = directory.glob("*.safetensors")
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(ValueError, match="was changed while it was read"):
        subject.check_unchanged(directory, before)


@pytest.mark.parametrize("name", ["jax", "threads", "platform", "xla_flags"])
def test_environments_differ_where_numbers_depend_on_it(name):
    own = subject.environment()
    assert subject.difference(own, own | {"python": "2.7", "cores": 999}) is None
    for other in (own | {name: "another"}, {n: v for n, v in own.items() if n != name}):
        assert subject.difference(own, other).startswith(f"{name} ")
        assert subject.difference(other, own).startswith(f"{name} ")


def test_threads_are_those_of_the_variables_and_no_more_of_lapack_than_cores(monkeypatch):
    cores = subject.environment()["cores"]
    for name in ("PJRT_NPROC", "NPROC", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    assert subject.environment()["threads"] == {"xla": cores, "lapack": cores}
    monkeypatch.setenv("NPROC", "77")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert subject.environment()["threads"] == {"xla": 77, "lapack": 1}
    monkeypatch.setenv("PJRT_NPROC", "3")
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "88")
    assert subject.environment()["threads"] == {"xla": 3, "lapack": cores}
    monkeypatch.setenv("XLA_FLAGS", "--b=1 --xla_dump_to=/tmp/x --a=2")
    assert subject.environment()["xla_flags"] == "--a=2 --b=1"
