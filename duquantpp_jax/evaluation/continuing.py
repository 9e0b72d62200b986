"""Texts that a model continues together, until each meets a stop string, its end or its length.

New tokens are drawn a few steps at a time (models/sampling.py), and the text of each row is looked
at in between. Rows do not see one another: each has a key, a sampling and a limit of its own.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from duquantpp_jax.evaluation.predict import Predictor
from duquantpp_jax.models import Store
from duquantpp_jax.models.sampling import Draws, Sampling, begin, bucket, padded, proceed

UNFINISHED = "�"
"""What the bytes of a character that is not yet whole are decoded to."""
TAIL = 8
"""Last tokens of a prompt that are decoded with new ones, for spaces between them."""


GREEDY = Sampling()


@dataclasses.dataclass(frozen=True)
class Wish:
    """A text to continue.

    Attributes:
      prompt: Token ids, at least one.
      new: Most new tokens, at least 1.
      stop: The text ends before the first of these strings.
      joined: Whether the text follows the prompt's, so that a space between them is a part of it.
    """

    prompt: Sequence[int]
    new: int
    sampling: Sampling = GREEDY
    seed: int = 0
    stop: tuple[str, ...] = ()
    joined: bool = False


@dataclasses.dataclass
class Written:
    """What has been written for a wish.

    Attributes:
      ids: The new tokens.
      text: Their text, cut at a stop string and without an end-of-sequence token.
      settled: How many of its letters no further token changes.
      finish: stop (a stop string or an end-of-sequence token), length, or None before the end.
      log_q: Of each of `ids`, where the likeliest were asked for.
      likeliest: With their log q, for each of `ids`.
    """

    ids: list[int] = dataclasses.field(default_factory=list)
    text: str = ""
    settled: int = 0
    finish: str | None = None
    log_q: list[float] = dataclasses.field(default_factory=list)
    likeliest: list[list[tuple[int, float]]] = dataclasses.field(default_factory=list)


class Continuing:
    """Wishes that are fulfilled together.

    Attributes:
      rows: One for each wish.
    """

    def __init__(
        self,
        predictor: Predictor,
        tokenizer: Tokenizer,
        store: Store,
        wishes: Sequence[Wish],
        *,
        count: int | None = None,
        top: int | None = None,
        sharding: Any = None,
    ):
        """Reads the prompts and draws the first new tokens.

        Args:
          count: Rows of the batch; copies of the first prompt that end at once fill it up.
          top: How many of the likeliest tokens to report, with log q; None for neither.
          sharding: Of rows, for a model that is on several devices.

        Raises:
          ValueError: The model gave NaN.
        """
        self.rows = [Written() for _ in wishes]
        self._wishes, self._tokenizer, self._top = wishes, tokenizer, top
        ends = predictor.model.config.eos_token_id
        self._ends = {ends} if isinstance(ends, int) else set(ends or ())
        self._before = [tokenizer.decode(list(wish.prompt[-TAIL:])) for wish in wishes]
        self._call: Any = {"linear": predictor.linear, "state": predictor.state}
        first = dataclasses.replace(wishes[0], new=1)
        every = [*wishes, *[first] * ((count or len(wishes)) - len(wishes))]
        longest = max(len(wish.prompt) for wish in every)
        tokens, lengths = padded([wish.prompt for wish in every], bucket(longest))
        limits = lengths + np.asarray([wish.new for wish in every], np.int32)
        seeds = np.asarray([wish.seed & 0xFFFFFFFF for wish in every], np.uint32)
        self._model, self._keys = predictor.model, jax.vmap(jax.random.key)(seeds)
        self._draws = Draws.of([wish.sampling for wish in every])
        placed = tokens if sharding is None else jax.device_put(tokens, sharding)
        room: Any = {"store": store, "capacity": bucket(int(limits.max())), "top": top}
        given = placed, lengths, limits, self._keys, self._draws
        self._text = begin(self._model, *given, **room, **self._call)
        self._first = lengths
        self._read()

    @property
    def done(self) -> bool:
        """Whether all rows have ended."""
        return all(row.finish for row in self.rows)

    def proceed(self, steps: int, abandoned: Sequence[int] = ()) -> None:
        """Draws up to `steps` further tokens of each row, and looks for stop strings.

        Args:
          abandoned: Numbers of rows that nobody waits for any more; they end.

        Raises:
          ValueError: The model gave NaN.
        """
        for number in abandoned:
            self.rows[number].finish = self.rows[number].finish or "stop"
        over = np.zeros(len(self._first), bool)
        over[: len(self.rows)] = [bool(row.finish) for row in self.rows]
        text = dataclasses.replace(self._text, ended=self._text.ended | jnp.asarray(over))
        given = self._model, text, self._keys, self._draws, np.int32(steps)
        self._text = proceed(*given, **self._call)
        self._read()

    def _read(self) -> None:
        """Brings `rows` up to date."""
        text = self._text
        tokens, lengths, ended = map(np.asarray, (text.tokens, text.lengths, text.ended))
        scores = None
        if self._top is not None and text.log_q is not None and text.likeliest is not None:
            scores = tuple(map(np.asarray, (text.log_q, *text.likeliest)))
        for number, (row, wish) in enumerate(zip(self.rows, self._wishes, strict=True)):
            if row.finish:
                continue
            first, last = int(self._first[number]), int(lengths[number])
            ids = tokens[number, first:last].tolist()
            if ids[-1] < 0:
                raise ValueError(f"the model gave NaN for token {len(ids)} after the prompt")
            if ids[-1] in self._ends:
                row.finish = "stop"
            elif ended[number]:
                row.finish = "length"
            row.ids = ids
            row.text = self._decoded(number, ids[:-1] if row.finish == "stop" else ids)
            found = [at for stop in wish.stop if (at := row.text.find(stop)) >= 0]
            if found:
                row.finish, row.text = "stop", row.text[: min(found)]
            row.settled = len(row.text) if row.finish else _settled(row.text, wish.stop)
            if scores is not None:
                log_q, likeliest, largest = (s[number, first : first + len(ids)] for s in scores)
                row.log_q = log_q.tolist()
                pairs = zip(likeliest.tolist(), largest.tolist(), strict=True)
                row.likeliest = [list(zip(*pair, strict=True)) for pair in pairs]

    def _decoded(self, number: int, ids: list[int]) -> str:
        """The text of new tokens."""
        wish, before = self._wishes[number], self._before[number]
        if wish.joined:
            whole = self._tokenizer.decode([*wish.prompt[-TAIL:], *ids])
            if whole.startswith(before):
                return whole[len(before) :]
        return self._tokenizer.decode(ids)


def _settled(text: str, stops: Sequence[str]) -> int:
    """Letters of an unfinished text that stay, whatever follows."""
    sure = len(text.rstrip(UNFINISHED))
    for stop in stops:
        for length in range(min(len(stop) - 1, len(text)), 0, -1):
            if text.endswith(stop[:length]):
                sure = min(sure, len(text) - length)
                break
    return sure
