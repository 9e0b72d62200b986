"""The progress of commands, and what ends them: bad input, signals, want of memory."""

import contextlib
import datetime
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from duquantpp_jax.commands.options.common import Terminal

Step = Callable[[str, int, int], None]
"""Called with a description of the work, the steps done and the number of all steps."""


_stopped: list[int] = []
"""The signal that asked to stop. Another library can lose an exception that is raised inside one of
its callbacks, or raise another instead; the next step of the progress bar, or the end, then raises
it again."""
_doing = ["the start"]
"""The last step that was reported."""


class Stopped(KeyboardInterrupt):
    """A signal asked to stop; its number is the argument."""


def _stop(number: int, _: Any) -> None:
    _stopped[:] = [number]
    raise Stopped(number)


@contextlib.contextmanager
def stopping_on_signals() -> Iterator[None]:
    """Within the block Ctrl-C, SIGTERM and SIGHUP raise `Stopped`, so that what is being written is
    dropped. Signals that the process ignores or handles already are left alone."""
    usual = {"SIGINT": signal.default_int_handler, "SIGTERM": signal.SIG_DFL}
    usual |= {"SIGHUP": signal.SIG_DFL} if hasattr(signal, "SIGHUP") else {}
    numbers = {getattr(signal, name): handler for name, handler in usual.items()}
    ours = [number for number, handler in numbers.items() if signal.getsignal(number) is handler]
    if threading.current_thread() is not threading.main_thread():
        ours = []
    _stopped.clear()
    usual_hook = sys.unraisablehook

    def unraisable(about: Any) -> None:
        """Says nothing of a signal that a callback without a caller has lost."""
        if not isinstance(about.exc_value, Stopped):
            usual_hook(about)

    sys.unraisablehook = unraisable
    for number in ours:
        signal.signal(number, _stop)
    try:
        yield
    except Exception as error:  # what another library has made of a signal in its callback
        if _stopped:
            raise Stopped(_stopped[-1]) from error
        raise
    finally:
        sys.unraisablehook = usual_hook
        _stopped.clear()
        for number in ours:
            signal.signal(number, numbers[number])


def guarded(name: str, run: Callable[[], int], verbose: bool = False) -> int:
    """Runs a command; what it raises for bad input, a signal or want of memory is one line.

    Args:
      verbose: Print before that line where it was raised.

    Returns:
      The exit code: that of `run`; 2 for bad input, a full disk or want of memory; 130 for Ctrl-C;
      143 for SIGTERM, and for SIGHUP too: to who starts it again both mean that it was stopped; 1
      and no line, as rich does, if who reads the output has ended (`| head`).
    """
    code = 2
    try:
        with stopping_on_signals(), _traced() if verbose else contextlib.nullcontext():
            code = run()
            print(end="", flush=True)
            if _stopped:  # and the exception was lost
                raise Stopped(_stopped[-1])
            return code
    except BrokenPipeError:
        # What Python still has to print at its end goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, OverflowError) as error:
        said = str(error)
    except KeyboardInterrupt as stop:
        number = stop.args[0] if isinstance(stop, Stopped) else signal.SIGINT
        code, said = 130, "interrupted"
        if number != signal.SIGINT:
            code = 143
            said = f"stopped by {signal.Signals(number).name} at {_doing[-1]}; what was being "
            said += "written is dropped (quantize, learn and ablate go on from what is finished)"
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        said = f"out of memory at {_doing[-1]}: give a smaller --batch-rows, --window or --rows "
        said += f"where the command has it, or a device with more memory ({str(error)[:200]})"
    print(f"{name}: {_plain(' '.join(said.split()))}", file=sys.stderr)
    return code


@contextlib.contextmanager
def _traced() -> Iterator[None]:
    """Prints where an exception was raised."""
    try:
        yield
    except Exception:
        print(_plain(traceback.format_exc()), file=sys.stderr)
        raise


def _plain(text: str) -> str:
    """As `files.printable` does, which needs NumPy."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


SECONDS = 30.0
"""Least time between two lines of progress."""


@contextlib.contextmanager
def progress_bar(terminal: Terminal = Terminal()) -> Iterator[Step]:
    """Progress on stderr; call it with a description, steps done, all steps.

    A bar if stderr is a terminal; else a line with the time left, after at least SECONDS each. With
    --verbose a line for every step.
    """
    lines = contextlib.nullcontext(_lines(0.0 if terminal.verbose else SECONDS))
    with lines if terminal.verbose or not sys.stderr.isatty() else _bar() as show:

        def step(what: str, done: int, total: int) -> None:
            if _stopped:
                raise Stopped(_stopped[-1])
            _doing[-1] = f"{what} ({done} of {total})"
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


def _lines(seconds: float) -> Step:
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
        if now - printed < seconds:
            return
        printed, (start, first) = now, begun
        line = f"{what}: {done} of {total}"
        if done > first:
            left = (now - start) / (done - first) * (total - done)
            line += f", about {datetime.timedelta(seconds=round(left))} left"
        print(line, file=sys.stderr, flush=True)

    return show
