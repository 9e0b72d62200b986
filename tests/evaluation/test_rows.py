"""The protocol: documents, rows of 511 targets, round robin."""

import time

import numpy as np
import pytest

from duquantpp_jax.evaluation.rows import (
    TARGETS,
    Protocol,
    Rows,
    read_text,
    rows_for_targets,
    rows_of_text,
)
from tests.conftest import byte_tokenizer

BOS = 256


def _rows(text):
    return rows_of_text(text, byte_tokenizer(), BOS)


def test_rows_are_cut_from_each_document_and_taken_round_robin():
    lengths = {"a": 3 * TARGETS + 5, "b": TARGETS, "c": TARGETS - 1, "d": 2 * TARGETS}
    rows = _rows("<|endoftext|>".join(letter * n for letter, n in lengths.items()))
    assert rows.documents.tolist() == [0, 1, 3, 0, 3, 0]
    assert rows.tokens.shape == (6, TARGETS + 1)
    assert (rows.tokens[:, 0] == BOS).all()
    first = byte_tokenizer().encode("a").ids[0]
    assert (rows.tokens[0, 1:] == first).all()


def test_a_long_document_among_many_short_ones_takes_no_longer_for_them():
    text = "<|endoftext|>".join(["ab"] * 4000 + ["a" * (8 * 4000)])
    start = time.process_time()
    rows = rows_of_text(text, byte_tokenizer(), BOS, Protocol(stream=False, window=8, bos=True))
    assert len(rows.documents) == 4000
    assert time.process_time() - start < 1.5  # 5 s where every document is asked for every row


def test_targets_of_a_document_are_its_ids_in_order_and_nothing_is_stripped():
    text = " \n" + "".join(chr(33 + i % 90) for i in range(2 * TARGETS - 2))
    rows = _rows(text)
    ids = byte_tokenizer().encode(text).ids
    np.testing.assert_array_equal(rows.tokens[:, 1:].ravel(), ids)


def test_a_text_without_separator_is_one_document():
    assert set(_rows("x" * 3 * TARGETS).documents.tolist()) == {0}


def test_a_text_shorter_than_a_row_gives_none():
    assert len(_rows("short").documents) == 0


@pytest.mark.parametrize(("targets", "rows"), [(TARGETS, 1), (2 * TARGETS + 500, 2)])
def test_targets_are_cut_down_to_whole_rows(targets, rows):
    have = Rows(np.zeros((5, TARGETS + 1), np.int32), np.arange(5))
    assert len(rows_for_targets(have, targets, "text").documents) == rows


@pytest.mark.parametrize(
    ("there", "targets", "message"),
    [
        (5, 510, "at least 511"),
        (5, 9999, "5 whole rows .* 19 rows are wanted: give a longer text, .* at most 5 rows$"),
        (0, 9999, "give a longer text$"),
    ],
)
def test_too_few_or_too_many_targets_are_refused(there, targets, message):
    have = Rows(np.zeros((there, TARGETS + 1), np.int32), np.arange(there))
    with pytest.raises(ValueError, match=message):
        rows_for_targets(have, targets, "text")


def test_text_that_is_not_utf8_or_not_there_is_refused(tmp_path):
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"good \xff bad")
    with pytest.raises(ValueError, match=r"not UTF-8 \(byte 5 is 0xff\)"):
        read_text(bad)
    with pytest.raises(ValueError, match="No such file"):
        read_text(tmp_path / "none.txt")


def test_the_protocol_gives_the_rows_of_the_test_bed(data):
    from duquantpp_jax.checkpoints import load_tokenizer

    tokenizer = load_tokenizer(data / "models/gutenberg-27m")
    rows = rows_of_text(read_text(data / "text/gutenberg_valid.txt"), tokenizer, 0)
    counts = np.bincount(rows.documents[:128])
    assert counts.tolist() == [8] * 16  # 128 rows are 8 rows of each of 16 books
    assert len(rows.documents) >= 512
