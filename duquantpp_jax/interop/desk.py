"""The queue of texts: one thread runs the model, for whoever asks.

Tickets are served in the order in which they come, up to `rows` of them together; later ones wait
until all of a batch have ended. A ticket's text depends on its prompt, sampling and seed, not on
the others of its batch (formats whose scale spans a tensor excepted; sums of a matrix product may
differ in the last bit between a batch of one and a full one).
"""

import dataclasses
import queue
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

import jax
from tokenizers import Tokenizer

from duquantpp_jax.evaluation.continuing import Continuing, Wish, Written
from duquantpp_jax.evaluation.predict import Predictor
from duquantpp_jax.evaluation.scoring import RowScores, Scorer
from duquantpp_jax.interop.asked import Refused
from duquantpp_jax.models import Store

STEPS = 8
"""Tokens that are drawn at once where nobody waits for each of them."""
TOP = 20
"""How many of the likeliest tokens are found where log-probabilities are asked for."""


@dataclasses.dataclass
class Ticket:
    """A text that somebody waits for.

    Attributes:
      prompt: Its token ids.
      wish: What to write; None where only the prompt is scored.
      score: Whether to score the prompt.
      top: Whether log-probabilities are wanted.
      stream: Whether every token is told at once.
      tell: Called in the queue's thread with what there is so far, a `Written`; with the scores of
        the prompt, None where it has no targets; or with what went wrong.
      abandoned: Set when nobody waits any more.
    """

    prompt: list[int]
    wish: Wish | None
    score: bool
    top: bool
    stream: bool
    tell: Callable[[Written | RowScores | Exception | None], None]
    abandoned: threading.Event = dataclasses.field(default_factory=threading.Event)


class Desk:
    """Takes tickets and serves them in a thread of its own."""

    def __init__(
        self,
        predictor: Predictor,
        tokenizer: Tokenizer,
        store: Store,
        *,
        rows: int = 8,
        waiting: int = 256,
    ):
        """Args:
        rows: Most texts that are written together.
        waiting: Most tickets that wait.
        """
        self._scorer = Scorer(predictor, batch_rows=1, devices=jax.local_devices()[:1])
        self.predictor, self.tokenizer = self._scorer.predictor, tokenizer
        self._store, self._rows, self._most = store, rows, waiting
        self._tickets: queue.Queue[Ticket | None] = queue.Queue()
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._serve, name="model", daemon=True)
        self._thread.start()

    def submit(self, tickets: list[Ticket]) -> None:
        """Puts tickets into the queue; raises Refused where it is full or closed."""
        if len(tickets) > self._most:
            raise Refused(f"a request of {len(tickets)} texts: ask for at most {self._most}")
        with self._lock:
            if self._closed.is_set() or self._tickets.qsize() + len(tickets) > self._most:
                message = "too many requests wait: try again later"
                raise Refused(message, status=503, code="server_busy")
            for ticket in tickets:
                self._tickets.put(ticket)

    def close(self) -> None:
        """Ends the thread, after a few tokens at most; those who wait are told."""
        self._closed.set()
        self._tickets.put(None)
        self._thread.join()

    def _serve(self) -> None:
        while not self._closed.is_set():
            batch = [ticket for ticket in self._next() if not ticket.abandoned.is_set()]
            try:
                self._write([ticket for ticket in batch if self._scored(ticket)])
            except Exception as error:  # whatever it is, the next batch is served
                self._fail(batch, error)
        while not self._tickets.empty():
            if (ticket := self._tickets.get()) is not None:
                ticket.tell(Refused("the server is shutting down", status=503))

    def _next(self) -> list[Ticket]:
        """The tickets at the head of the queue; waits for the first."""
        tickets = [self._tickets.get()]
        while len(tickets) < self._rows and not self._tickets.empty():
            tickets.append(self._tickets.get())
        return [ticket for ticket in tickets if ticket is not None]

    def _fail(self, batch: list[Ticket], error: Exception) -> None:
        if not isinstance(error, ValueError):
            traceback.print_exception(error, file=sys.stderr)
        told = error if isinstance(error, Refused) else Refused(
            str(error) if isinstance(error, ValueError) else "the model failed", status=500
        )  # fmt: skip
        for ticket in batch:
            ticket.tell(told)

    def _scored(self, ticket: Ticket) -> bool:
        """Scores the prompt of a ticket that asks for it; whether a text is still to be written."""
        if ticket.score:
            try:
                long = len(ticket.prompt) > 1
                ticket.tell(self._scorer([ticket.prompt])[0] if long else None)
            except Exception as error:
                self._fail([ticket], error)
                return False
        return ticket.wish is not None

    def _write(self, batch: list[Ticket]) -> None:
        wishes = [ticket.wish for ticket in batch if ticket.wish is not None]
        if not wishes:
            return
        top = TOP if any(ticket.top for ticket in batch) else None
        top = top and min(top, self.predictor.model.config.vocab_size)
        count = 1 if len(wishes) == 1 else self._rows
        given: Any = self.predictor, self.tokenizer, self._store, wishes
        writing, told = Continuing(*given, count=count, top=top), [False] * len(batch)
        while True:
            for number, (ticket, row) in enumerate(zip(batch, writing.rows, strict=True)):
                if not told[number] and (row.finish or ticket.stream):
                    ticket.tell(dataclasses.replace(row))
                    told[number] = bool(row.finish)
            if writing.done:
                return
            if self._closed.is_set():
                raise Refused("the server is shutting down", status=503)
            gone = [n for n, ticket in enumerate(batch) if ticket.abandoned.is_set()]
            streams = any(t.stream and not done for t, done in zip(batch, told, strict=True))
            writing.proceed(1 if streams else STEPS, gone)
