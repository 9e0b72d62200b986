"""The progress bar of commands, and Ctrl-C, which no library may swallow."""

import contextlib
import signal
import sys
import threading
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


@contextlib.contextmanager
def progress_bar() -> Iterator[Step]:
    """A bar on stderr if that is a terminal; call it with a description, steps done, all steps."""
    what, count = TextColumn("{task.description}"), TextColumn("{task.completed}/{task.total}")
    columns = (what, BarColumn(), count, TimeElapsedColumn(), TimeRemainingColumn())
    hidden = not sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=hidden) as bar:
        task = bar.add_task("loading", total=None)

        def step(what: str, done: int, total: int) -> None:
            if _interrupted.is_set():
                raise KeyboardInterrupt
            bar.update(task, description=what, completed=done, total=total)

        yield step
