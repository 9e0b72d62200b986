"""What can a small model be asked without a network? Writes the five tasks of the package.

Question: which tasks of lm-eval's kinds fit into a hundred kilobytes of public-domain text?
Hypothesis: one of each kind of request, with chance levels that a model of 27M parameters is above.
Command: python -m experiments.make_tasks $DUQUANTPP_DATA/text/gutenberg_valid.txt
Cost: a second.
Last result: duquantpp_jax/evaluation/tasks/*.json, 2026-11-29; docs/scoring.md says how they
  are run.

The text is 16 books of Project Gutenberg, which gutenberg-27m has not seen. Choices are drawn from
a fixed seed. A wrong choice is a word of the same book, about as frequent there, that its passage
does not have.
"""

import collections
import pathlib
import random
import re
import sys
from typing import Any

import duquantpp_jax.evaluation.tasks
from duquantpp_jax import files
from duquantpp_jax.evaluation.rows import SEPARATOR, read_text

PLACE = pathlib.Path(duquantpp_jax.evaluation.tasks.__file__).parent
WORD = re.compile(r"[a-z]{5,}")


def passages(book: str, least: int) -> list[list[str]]:
    """Paragraphs of at least so many words, and at most 200."""
    split = (line.split() for line in book.split("\n"))
    return [words for words in split if least <= len(words) <= 200]


def cloze(random: random.Random, book: str, number: int) -> list[dict[str, Any]]:
    """Contexts of 40 words or more, the word that follows, and three that do not."""
    counts = collections.Counter(WORD.findall(book))
    ranked = random.sample(sorted(counts), len(counts))
    ranked.sort(key=lambda word: -counts[word])
    made = []
    for words in random.sample(passages(book, 60), number):
        at = next(n for n in range(40, len(words)) if WORD.fullmatch(words[n]) or n == 59)
        if not WORD.fullmatch(words[at]):
            continue
        rank = ranked.index(words[at])
        near = ranked[max(0, rank - 15) : rank + 15]
        wrong = random.sample([word for word in near if word not in words], 3)
        choices = random.sample([words[at], *wrong], 4)
        context = " ".join(words[:at])
        made.append({"context": context, "choices": choices, "answer": choices.index(words[at])})
    return made


def last_words(random: random.Random, book: str, number: int) -> list[dict[str, Any]]:
    """Passages of whole sentences whose last word stands earlier in them, too."""
    made = []
    for words in random.sample(passages(book, 40), len(passages(book, 40))):
        for at in range(30, len(words)):
            word = words[at].removesuffix(".")
            if words[at].endswith(".") and WORD.fullmatch(word) and word in words[:at]:
                made.append({"context": " ".join(words[:at]), "word": word})
                break
    return made[:number]


def repeated(random: random.Random, book: str, number: int) -> list[dict[str, Any]]:
    """A sentence twice, its beginning, and the rest of it."""
    sentences = re.findall(r"[A-Z][a-z]+(?: [a-z]+){7,11}\.", book)
    made = []
    for sentence in random.sample(sentences, min(number, len(sentences))):
        begin, rest = sentence.rsplit(" ", 3)[0], " ".join(sentence.rsplit(" ", 3)[1:])
        made.append({"context": f"{sentence}\n{sentence}\n{begin}", "rest": rest})
    return made


def main(path: str) -> None:
    text = read_text(path)
    books = text.split(SEPARATOR) if isinstance(text, str) else text
    rng = random.Random(0)
    shots = [each for book in books for each in cloze(rng, book, 3)]
    splits: dict[str, dict[str, list[Any]]] = {
        "cloze": {"test": [each for book in books for each in cloze(rng, book, 4)]},
        "last_word": {"test": [each for book in books for each in last_words(rng, book, 4)]},
        "rolling": {"test": [{"page": book[20_000:21_200].split(" ", 1)[1]} for book in books]},
        "exact": {"test": [each for book in books for each in repeated(rng, book, 4)]},
        "two_shot": {"train": shots[:2], "test": shots[2:]},
    }
    for name, documents in splits.items():
        files.write_whole(PLACE / f"{name}.json", files.to_json(documents))
        print(name, {split: len(each) for split, each in documents.items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
