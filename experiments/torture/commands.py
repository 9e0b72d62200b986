"""Commands in processes that begin at once: forked from one that has imported all, and no device.

A tortured command is what a user types, with --out at the end of its arguments; what it leaves is
compared, byte by byte but for times, with what it leaves undisturbed.
"""

import dataclasses
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from duquantpp_jax import cli
from duquantpp_jax.commands import ablate, compare, export, learn, quantize  # noqa: F401
from experiments.torture import subjects

GRID = """
from duquantpp_jax.lab import Cell

CELLS = [Cell(recipe, seed=seed, tokens=511, calibration_tokens=511)
         for recipe in ("rtn", "random_hadamard") for seed in range(2 if recipe != "rtn" else 1)]
"""
TIMES = ("seconds", "sha256", "timings.json")
"""Of records, what differs from run to run: seconds, and the hash that holds them."""


@dataclasses.dataclass(frozen=True)
class Command:
    """A command on the tiny model.

    Attributes:
      arguments: But for --out.
      goes_on: Whether a run takes up, or overwrites, what a killed one has left under --out.
    """

    name: str
    arguments: tuple[str, ...]
    goes_on: bool


def commands(place: Path) -> dict[str, Command]:
    """The commands that write, by name; their model and texts are made in `place`."""
    model = subjects.write_model(place / "model", num_hidden_layers=2)
    text = subjects.write_text(place / "text.txt")
    (place / "grid.py").write_text(GRID, encoding="utf-8")
    given = ("--model", str(model), "--text", str(text))
    both = (*given, "--calibration-text", str(text))
    calibrated = ("--model", str(model), "--calibration-text", str(text), "--rows", "2")
    quantized = ("quantize", *calibrated, "--recipe", "smooth_hadamard", "--fuse")
    shared = ("--recipes", "rtn", "block_hadamard", "--formats", "even", "--tokens", "511")
    learning = (
        "--rows",
        "4",
        "--held-out",
        "1",
        "--steps",
        "4",
        "--check-every",
        "1",
        "--batch-rows",
        "1",
    )
    learning += ("--start", "block_hadamard", "--through", "model", "--no-measure")
    made = (
        Command("quantize", quantized, True),
        Command("export", ("export", "--model", str(place / "quantized")), False),
        Command("compare", ("compare", *both, *shared), True),
        Command("ablate", ("ablate", str(place / "grid.py"), *both), True),
        Command("learn", ("learn", *given, *learning), True),
    )
    run(made[0], place / "quantized", place / "log")
    return {command.name: command for command in made}


def fork(work: Callable[[], int | None], log: Path) -> int:
    """Runs `work` in a process of its own, what it prints in a file; gives its pid."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of jax, that threads do not survive: there are none yet
        pid = os.fork()
    if pid:
        return pid
    status = 70  # of a traceback
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        warnings.simplefilter("ignore")
        status = work() or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def start(command: Command, out: Path, log: Path) -> int:
    """Starts a command; gives its pid."""
    return fork(lambda: cli.main([*command.arguments, "--out", str(out)]), log)


def wait(pid: int, seconds: float = 600) -> int:
    """The exit code of a process, negative for a signal; it is killed when its time is over."""
    deadline = time.monotonic() + seconds
    while (found := os.waitpid(pid, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise TimeoutError(f"a process took more than {seconds} s")
        time.sleep(0.002)
    return os.waitstatus_to_exitcode(found[1])


def run(command: Command, out: Path, log: Path) -> float:
    """Runs a command to its end; its seconds. Raises RuntimeError with what it said if it fails."""
    began = time.monotonic()
    log.unlink(missing_ok=True)
    if code := wait(start(command, out, log)):
        said = log.read_text(errors="replace")[-2000:]
        raise RuntimeError(f"{command.name} ended with {code}:\n{said}")
    return time.monotonic() - began


def left(out: Path) -> dict[str, Any]:
    """All that is in a directory, by path, hidden files too: bytes, or JSON without times."""
    found = {}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        if not path.is_file():
            found[name] = "directory"
        elif name not in TIMES:
            content = path.read_bytes()
            if path.suffix == ".json" and b'"seconds"' in content:
                fields = json.loads(content)
                content = {key: fields[key] for key in fields if key not in TIMES}
            found[name] = content
        else:
            found[name] = "times"
    return found


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Names that only one of two directories has, or that hold other things."""
    return sorted(name for name in found | wanted if found.get(name) != wanted.get(name))
