"""The progress of commands, and Ctrl-C, which no library may swallow."""

import contextlib
import datetime
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Step = Callable[[str, int, int], None]
"""Called with a description of the work, the steps done and the number of all steps."""


_interrupted = threading.Event()
"""Whether there was a Ctrl-C. Another library can lose a KeyboardInterrupt that is raised inside
one of its callbacks; the next step of the progress bar then raises it again."""


def _interrupt(*_: Any) -> None:
    _interrupted.set()
    raise KeyboardInterrupt


@contextlib.contextmanager
def remembering_interrupts() -> Iterator[None]:
    """Within the block Ctrl-C is remembered, unless the process handles it in another way."""
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not ours or threading.current_thread() is not threading.main_thread():
        yield
        return
    _interrupted.clear()
    signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


SECONDS = 30.0
"""Least time between two lines of progress."""


@contextlib.contextmanager
def progress_bar() -> Iterator[Step]:
    """Progress on stderr; call it with a description, steps done, all steps.

    A bar if stderr is a terminal; else a line with the time left, after at least SECONDS each.
    """
    with _bar() if sys.stderr.isatty() else contextlib.nullcontext(_lines()) as show:

        def step(what: str, done: int, total: int) -> None:
            if _interrupted.is_set():
                raise KeyboardInterrupt
            show(what, done, total)

        yield step


@contextlib.contextmanager
def _bar() -> Iterator[Step]:
    what, count = TextColumn("{task.description}"), TextColumn("{task.completed}/{task.total}")
    columns = (what, BarColumn(), count, TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("loading", total=None)
        yield lambda what, done, total: bar.update(
            task, description=what, completed=done, total=total
        )


def _lines() -> Step:
    """Prints lines; the time left is that of the steps since the count began, or began anew."""
    printed = time.monotonic()
    begun = printed, 0  # when, and the steps done then
    last = 0, 0  # steps done, all steps

    def show(what: str, done: int, total: int) -> None:
        nonlocal printed, begun, last
        now = time.monotonic()
        if done < last[0] or total != last[1]:
            begun = now, done
        last = done, total
        if now - printed < SECONDS:
            return
        printed, (start, first) = now, begun
        line = f"{what}: {done} of {total}"
        if done > first:
            left = (now - start) / (done - first) * (total - done)
            line += f", about {datetime.timedelta(seconds=round(left))} left"
        print(line, file=sys.stderr, flush=True)

    return show
