"""The evaluation protocol: from a text file to rows of tokens.

A file is documents separated by <|endoftext|> (or one document), split exactly there, nothing
stripped, no special tokens added. Each document is encoded whole and its ids are cut into rows of
511; an incomplete last row is dropped. Before each row stands the beginning-of-sequence token, so
that 511 inputs predict 511 targets. Rows are taken round robin (the first of every document, then
the second of every document, ...): any prefix covers all documents evenly.
"""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Integer
from tokenizers import Tokenizer

SEPARATOR = "<|endoftext|>"
TARGETS = 511
"""Targets of a row."""


class Rows(NamedTuple):
    """Rows of 512 tokens and the document that each comes from.

    Attributes:
      tokens: The first 511 are inputs, the last 511 their targets.
      documents: Number of each row's document.
    """

    tokens: Integer[np.ndarray, "rows 512"]
    documents: Integer[np.ndarray, " rows"]

    def take(self, rows: int) -> "Rows":
        """The first rows."""
        return Rows(self.tokens[:rows], self.documents[:rows])


def read_text(path: str | os.PathLike[str]) -> str:
    """The text in a UTF-8 file.

    Raises:
      ValueError: There is no such file, it cannot be read, or it is not UTF-8.
    """
    try:
        return Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 (byte {error.start} is {error.object[error.start]:#04x}): "
            "convert the text to UTF-8"
        ) from None
    except OSError as error:
        raise ValueError(f"cannot read {path} ({error.strerror}): give a text file") from None


def rows_of_text(text: str, tokenizer: Tokenizer, bos: int) -> Rows:
    """All whole rows of a text, round robin over its documents.

    Args:
      bos: The token that stands before each row.
    """
    documents = [
        np.asarray(encoding.ids, np.int32)
        for encoding in tokenizer.encode_batch(text.split(SEPARATOR), add_special_tokens=False)
    ]
    tokens, numbers = [], []
    for turn in range(max(len(ids) // TARGETS for ids in documents)):
        for number, ids in enumerate(documents):
            row = ids[turn * TARGETS : (turn + 1) * TARGETS]
            if len(row) == TARGETS:
                tokens.append(np.concatenate([np.array([bos], np.int32), row]))
                numbers.append(number)
    return Rows(np.array(tokens, np.int32).reshape(-1, TARGETS + 1), np.array(numbers, np.int32))


def rows_for_targets(rows: Rows, targets: int, source: str) -> Rows:
    """The first rows that hold `targets` targets, cut down to whole rows.

    Raises:
      ValueError: Fewer targets than one row, or more than there are.
    """
    wanted, have = targets // TARGETS, len(rows.documents)
    if wanted < 1:
        raise ValueError(f"{targets} targets are less than one row: give at least {TARGETS}")
    if wanted > have:
        raise ValueError(
            f"{source} has {have} whole rows of {TARGETS} targets ({have * TARGETS}), but "
            f"{wanted} rows are wanted: give a longer text, or fewer than {targets} tokens"
        )
    return rows.take(wanted)
