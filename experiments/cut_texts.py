"""Writes the texts of docs/protocol.md from the files that they are parts of.

    python -m experiments.cut_texts --data TEXTS --out DIR

TEXTS holds gutenberg_valid.txt, wikitext2_valid_articles.txt and gutenberg_train.txt, or the same
packed as .xz; documents are separated by <|endoftext|>. What is not there is left out and said.
"""

import argparse
import sys
from pathlib import Path

from duquantpp_jax import files
from duquantpp_jax.evaluation.rows import read_text

SEPARATOR = "<|endoftext|>"
CHARACTERS = 200_000
"""Taken of each book to learn from."""
PARTS = {
    "dev.txt": ("gutenberg_valid.txt", slice(8), None),
    "books.txt": ("gutenberg_valid.txt", slice(-8, None), None),
    "dev_articles.txt": ("wikitext2_valid_articles.txt", slice(30), None),
    "articles.txt": ("wikitext2_valid_articles.txt", slice(-30, None), None),
    "train.txt": ("gutenberg_train.txt", slice(None), CHARACTERS),
}
"""Of each text: the file, which of its documents, and how many characters of each."""


def cut(text: str, documents: slice, characters: int | None) -> str:
    """Some documents of a text, or their beginnings."""
    return SEPARATOR.join(each[:characters] for each in text.split(SEPARATOR)[documents])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    for name, (source, documents, characters) in PARTS.items():
        places = (options.data / source, options.data / f"{source}.xz")
        found = next((place for place in places if place.exists()), None)
        if found is None:
            print(f"{name}: left out, {options.data} has no {source}", file=sys.stderr)
            continue
        part = cut(str(read_text(found)), documents, characters)
        files.write_whole(options.out / name, part.encode())
        print(f"{name}: {len(part):,} characters, SHA-256 {files.sha256(options.out / name)[:16]}")


if __name__ == "__main__":
    main()
