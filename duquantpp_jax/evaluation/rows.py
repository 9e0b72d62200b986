"""The evaluation protocols: from a text file to rows of tokens.

A row is `window` ids of text, after a beginning-of-sequence token (BOS) if the protocol has one.
All tokens of a row but the last are inputs, all but the first are targets. The protocols are:

    documents   The file is split exactly at <|endoftext|>; of a .jsonl file each line is a
                document. Each document is encoded as a whole and cut into rows. Rows are taken
                round robin (the first of every document, then the second of every document, ...),
                so any prefix covers all documents evenly. As in `compare`: 511 ids after a BOS, so
                511 inputs predict 511 targets.
    stream      The file, or the lines of a .jsonl file joined by blank lines, is encoded as a whole
                and cut into rows. As in papers: 2048 ids without a BOS, so 2047 inputs predict 2047
                targets.

Nothing is stripped, no special tokens are added, and an incomplete last row is dropped.

Source: for `stream` the WikiText-2 evaluation of Frantar et al., GPTQ (arXiv:2210.17323). Its
tokenizer call may put a BOS before the whole text; here there is none.
"""

import dataclasses
import gzip
import itertools
import json
import lzma
import math
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Integer
from tokenizers import Tokenizer

from duquantpp_jax.commands.options.common import TARGETS

SEPARATOR = "<|endoftext|>"
DOCUMENTS = 64
"""Documents that are encoded at a time."""
_PACKED = {b"\x1f\x8b": gzip.decompress, b"\xfd7zXZ\x00": lzma.decompress}
"""By the first bytes of a file, with which no UTF-8 text begins."""


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How a text becomes rows: as a stream or as documents, ids of text in a row, and a BOS."""

    stream: bool
    window: int
    bos: bool


PROTOCOLS: Mapping[str, Protocol] = {
    "documents": Protocol(stream=False, window=TARGETS, bos=True),
    "stream": Protocol(stream=True, window=2048, bos=False),
}


class Rows(NamedTuple):
    """Rows of tokens, and the number of each row's document."""

    tokens: Integer[np.ndarray, "rows length"]
    documents: Integer[np.ndarray, " rows"]

    @property
    def targets(self) -> int:
        """Targets of a row."""
        return self.tokens.shape[1] - 1


def read_text(path: str | os.PathLike[str], text_key: str = "text") -> str | list[str]:
    """The text of a file, or the documents of a .jsonl file: of each line the string of the key.

    Files that gzip or xz packed are unpacked, and a byte-order mark is skipped.

    >>> from pathlib import Path
    >>> _ = Path("two.txt").write_text("One document.<|endoftext|>Another.")
    >>> read_text("two.txt")
    'One document.<|endoftext|>Another.'

    Raises:
      ValueError: It cannot be read or unpacked, is not UTF-8, or a line has no such string.
    """
    try:
        content = Path(path).read_bytes()
        unpack = next((u for magic, u in _PACKED.items() if content.startswith(magic)), bytes)
        text = unpack(content).decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 (byte {error.start} is {error.object[error.start]:#04x}): "
            "convert the text to UTF-8"
        ) from None
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} cannot be unpacked ({error}): fetch it again") from None
    except OSError as error:
        raise ValueError(f"cannot read {path} ({error.strerror}): give a text file") from None
    return _documents(text, path, text_key) if is_lines(path) else text


def is_lines(path: str | os.PathLike[str]) -> bool:
    """Whether each line of the file is a document, by its name: .jsonl, packed or not."""
    return [s for s in Path(path).suffixes if s not in (".gz", ".xz")][-1:] == [".jsonl"]


def _documents(text: str, path: str | os.PathLike[str], text_key: str) -> list[str]:
    documents = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            if not isinstance(fields := json.loads(line), dict):
                raise TypeError(f"it is a {type(fields).__name__}")
            strings = {n: v for n, v in fields.items() if isinstance(v, str)}
            strings.get(text_key, "").encode()  # half of a surrogate pair is no text
        except (ValueError, RecursionError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number} is no JSON object of UTF-8 strings "
                f'({getattr(error, "msg", error)}): give a document a line, {{"text": "..."}}'
            ) from None
        if text_key not in strings:
            raise ValueError(
                f"{path}, line {number}: no string under {text_key!r}, but under "
                f"{', '.join(strings) or 'no other key':.200}: name the text's by --text-key"
            )
        documents.append(strings[text_key])
    return documents


def rows_of_text(
    text: str | list[str],
    tokenizer: Tokenizer,
    bos: int | None,
    protocol: Protocol = PROTOCOLS["documents"],
    *,
    targets: int | None = None,
) -> Rows:
    """The whole rows of what `read_text` gives; `bos` is the beginning-of-sequence token.

    With `targets`, a row of them at least, only as many documents are encoded as rows of so many
    targets begin in, each as a whole, and no more rows are made than `rows_for_targets` takes.

    >>> from duquantpp_jax.checkpoints import load_tokenizer, testbed
    >>> tokenizer, text = load_tokenizer(testbed.directory()), "once upon a time " * 60
    >>> rows_of_text(text, tokenizer, bos=0, protocol=Protocol(False, 31, True)).tokens.shape[1]
    32
    """
    window, texts = protocol.window, text.split(SEPARATOR) if isinstance(text, str) else text
    if protocol.stream:
        texts = [text if isinstance(text, str) else "\n\n".join(text)]
    each = max(1, window - 1 + protocol.bos)
    wanted = None if targets is None else _whole_rows(targets, each)
    enough, found = math.inf if wanted is None else wanted, 0
    documents: list[np.ndarray] = []
    for first in range(0, len(texts), DOCUMENTS):
        some = texts[first : first + DOCUMENTS]
        encoded = tokenizer.encode_batch_fast(some, add_special_tokens=False)
        documents += [np.asarray(encoding.ids, np.int32) for encoding in encoded]
        found += sum(len(encoding.ids) >= window for encoding in encoded)
        if found >= enough:  # first rows of documents are enough: no second one is taken
            break
    before = np.asarray([bos] if protocol.bos else [], np.int32)
    turns = _turns([len(ids) // window for ids in documents])
    order = list(itertools.islice(turns, wanted))
    tokens = np.empty((len(order), len(before) + window), np.int32)
    tokens[:, : len(before)] = before
    for row, (turn, number) in zip(tokens, order, strict=True):
        row[len(before) :] = documents[number][turn * window : (turn + 1) * window]
    return Rows(tokens, np.array([number for _, number in order], np.int32))


def _turns(counts: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(turn, number) of every row of documents with so many rows, turn after turn."""
    left, turn = list(range(len(counts))), 0
    while left := [number for number in left if counts[number] > turn]:
        yield from ((turn, number) for number in left)
        turn += 1


def _whole_rows(targets: int, each: int) -> int:
    """Rows of `each` targets that `targets` fill; ValueError if they fill none."""
    if targets < each:
        raise ValueError(f"{targets} targets are less than one row: give at least {each}")
    return targets // each


def rows_for_targets(rows: Rows, targets: int, source: str) -> Rows:
    """The first rows that hold `targets` targets, cut down to whole rows.

    Raises:
      ValueError: Fewer targets than a row has, or more than there are.
    """
    each, have = rows.targets, len(rows.documents)
    wanted = _whole_rows(targets, each)
    if wanted > have:
        fewer = f", or ask for at most {have} rows" if have else ""
        raise ValueError(
            f"{source} has {have} whole rows of {each} targets, but "
            f"{wanted} {'row is' if wanted == 1 else 'rows are'} wanted: give a longer text{fewer}"
        )
    return Rows(rows.tokens[:wanted], rows.documents[:wanted])
