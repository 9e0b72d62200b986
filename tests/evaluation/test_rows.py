"""The protocol: documents, rows of 511 targets, round robin."""

import gzip
import json
import lzma
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


class Counted(list):
    """Documents, and how many of them were taken in slices."""

    count = 0

    def __getitem__(self, place):
        found = super().__getitem__(place)
        if isinstance(place, slice):
            self.count += len(found)
        return found


def test_of_a_long_text_only_as_many_documents_are_encoded_as_rows_are_asked_for():
    texts = ["short", *["x" * TARGETS] * 5, "y" * 2 * TARGETS] * 40
    every = rows_of_text(texts, byte_tokenizer(), BOS)
    for rows, encoded in ((5, 64), (100, 128), (240, 280), (280, 280)):
        counted, targets = Counted(texts), rows * TARGETS
        some = rows_of_text(counted, byte_tokenizer(), BOS, targets=targets)
        assert counted.count == encoded
        assert len(some.documents) == rows
        wanted, found = (rows_for_targets(have, targets, "text") for have in (every, some))
        np.testing.assert_array_equal(found.tokens, wanted.tokens)
        np.testing.assert_array_equal(found.documents, wanted.documents)


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


PLAIN = "\ufeffone\u2028<|endoftext|>ü\n"
BODIES = [n * "ü<|endoftext|>\n" for n in (1, 2)]
LINES = "\ufeff" + "\n".join(json.dumps({"id": 3, "body": body}) for body in BODIES) + "\n"


@pytest.mark.parametrize(
    ("end", "pack"), [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress)]
)
def test_a_text_is_the_same_packed_and_with_a_byte_order_mark(end, pack, tmp_path):
    for name, text in (("a.txt", PLAIN), ("a.jsonl", LINES)):
        (tmp_path / (name + end)).write_bytes(pack(text.encode()))
    assert read_text(tmp_path / f"a.txt{end}") == PLAIN[1:]
    assert read_text(tmp_path / f"a.jsonl{end}", "body") == BODIES


def test_a_line_is_a_document_and_a_stream_has_blank_lines_between_them():
    lines = ["a<|endoftext|>b", "c"]
    tokenizer, short = byte_tokenizer(), Protocol(stream=False, window=1, bos=False)
    assert rows_of_text(lines, tokenizer, None, short).documents.tolist() == [0, 1, *[0] * 14]
    stream = Protocol(stream=True, window=6, bos=False)
    ids = tokenizer.encode("\n\n".join(lines)).ids
    assert rows_of_text(lines, tokenizer, None, stream).tokens[-1].tolist() == ids[12:18]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"text": "a"}\n\n{"text": "b"', r"t.jsonl, line 3 is no JSON object .*\(Expecting"),
        (b'["a"]', r"line 1 is no JSON object .* \(it is a list\): give a document a line"),
        (b'{"text": "\\ud800"}', "line 1 is no JSON object .*surrogates"),
        (b"[" * 100_000, "line 1 is no JSON object .*recursion"),
        (b'{"body": "a", "id": 7, "url": "b"}', "no string under 'text', but under body, url: "),
        (b'{"text": ["a"]}', "no string under 'text', but under no other key"),
        (gzip.compress(b"text")[:-9], "t.jsonl cannot be unpacked .*: fetch it again"),
        (lzma.compress(b"text")[:-9], "t.jsonl cannot be unpacked .*: fetch it again"),
    ],
    ids=range(8),
)  # fmt: skip
def test_what_is_no_text_is_refused_with_its_file_and_line(content, says, tmp_path):
    (tmp_path / "t.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=says):
        read_text(tmp_path / "t.jsonl")


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
