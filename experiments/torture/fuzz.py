"""Can a spoilt file do more than be refused? Every reader, on mutated files.

Question: does a reader ever end in anything but a value or a ValueError of one line: another
    exception, a hang, hundreds of MiB of memory, a dead process?
Hypothesis: no.
Command: python -m experiments.torture.fuzz [--inputs N] [--seconds S] [--only READER ..]
    --repeat READER:NUMBER makes one input again, and shows what comes of it.
Cost: CPU time of --seconds, divided evenly over the readers; as much as a tenth more to set out.
Last result: docs/reliability.md.

An input is a directory of valid files, one of them spoilt (mutations.py): in six of ten inputs it
stays JSON, or a file of its kind. Where files are sealed or hold a hash of their contents, half of
the inputs are sealed again, or the hash is believed, as whoever means harm would have it: what lies
behind the hash is tried, too. An input follows from the seed, the reader and a number.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from experiments.torture import mutations, subjects

HANG_SECONDS = 20
BURST = 300 << 20
"""Bytes by which the most memory that was ever used may grow in one input."""


@dataclasses.dataclass(frozen=True)
class Reader:
    """What reads a directory.

    Attributes:
      files: Valid contents by name.
      read: Reads all of them; may raise ValueError.
      spoils: Files that are spoilt; empty for all.
      seal: Called before half of the reads, to give changed files their seal again.
      believe: Modules whose `_hash_of` is believed in half of the reads.
    """

    files: dict[str, bytes]
    read: Callable[[Path], Any]
    spoils: tuple[str, ...] = ()
    seal: Callable[[Path], None] | None = None
    believe: tuple[Any, ...] = ()


class Hang(BaseException):
    """An input has taken longer than HANG_SECONDS."""


class Believed(str):
    """A hash that equals every other."""

    __hash__ = str.__hash__

    def __eq__(self, _: object) -> bool:
        return True

    def __ne__(self, _: object) -> bool:
        return False


def readers(place: Path, only: list[str] | None = None) -> dict[str, Reader]:
    """The readers, with valid files that are made in `place`, by name."""
    from experiments.torture.readers import MAKERS

    for name in only or ():
        if name not in MAKERS:
            raise ValueError(f"no reader {name!r}: choose of {', '.join(MAKERS)}")
    place.mkdir(parents=True, exist_ok=True)
    return {name: MAKERS[name](place / name) for name in only or MAKERS}


def contents(place: Path) -> dict[str, bytes]:
    """The files of a directory."""
    return {path.name: path.read_bytes() for path in sorted(place.iterdir()) if path.is_file()}


@contextlib.contextmanager
def hashes_believed(modules: tuple[Any, ...]) -> Iterator[None]:
    """Within the block whatever hash a file says is that of its contents."""
    kept = [(module, module._hash_of) for module in modules]
    for module, _ in kept:
        module._hash_of = lambda *_: Believed("believed")
    try:
        yield
    finally:
        for module, own in kept:
            module._hash_of = own


@contextlib.contextmanager
def in_time(seconds: int) -> Iterator[None]:
    """Raises Hang in the block when the time is over: of the CPU, or ten times that of the clock.

    It is raised every second from then on: a callback of another library may have swallowed it.
    """
    began = time.process_time(), time.monotonic()

    def over(*_: Any) -> None:
        if time.process_time() > began[0] + seconds or time.monotonic() > began[1] + 10 * seconds:
            raise Hang(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def spoil(reader: Reader, chance: random.Random) -> tuple[str, bytes, bool]:
    """A file of a reader, its spoilt contents, and whether it is to be sealed again."""
    names = [n for n in reader.files if not reader.spoils or n.endswith(reader.spoils)]
    name = chance.choice(names)
    return name, mutations.spoilt(name, reader.files[name], chance), chance.random() < 0.5


def attempt(reader: Reader, place: Path, chance: random.Random) -> tuple[str, str]:
    """Spoils a file, reads, and puts the file back; the verdict, and what was said.

    Verdicts: "read", "refused", and the findings: the type of any other exception, "Hang", "lines"
    (a message of several lines, or with control characters), "memory".
    """
    from duquantpp_jax import files
    from duquantpp_jax.checkpoints import llama_cpp

    name, content, again = spoil(reader, chance)
    files.contents._sha256.cache_clear()  # inputs come faster than a file system's clock ticks
    llama_cpp._contents.cache_clear()
    (place / name).write_bytes(content)
    sealed = reader.seal is not None and again
    if sealed:
        reader.seal(place)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    said = ""
    try:
        with in_time(HANG_SECONDS), hashes_believed(reader.believe if again else ()):
            reader.read(place)
        verdict = "read"
    except ValueError as error:
        verdict, said = "refused", str(error)
        if "\n" in files.printable(said).strip() or type(error).__name__ == "UnicodeEncodeError":
            verdict = "lines"
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        verdict = type(error).__name__
        said = "".join(traceback.format_exception(error)[-4:])
    finally:
        (place / name).write_bytes(reader.files[name])
        if sealed:
            for each in place.iterdir():  # the seal, and what the reader may have left
                if each.name in reader.files:
                    each.write_bytes(reader.files[each.name])
    if (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most) << 10 > BURST:
        verdict = "memory"
    return verdict, f"{name}: {said}"


FINE = ("read", "refused")


def fuzz(
    chosen: dict[str, Reader], inputs: int, seconds: float, seed: int = 0, log: int | None = None
) -> tuple[dict[str, collections.Counter], list[str]]:
    """Tries inputs until there are so many, or the CPU time is over; verdicts and findings.

    The reader that has taken the least time is next, so that cheap ones see more inputs.

    Args:
      log: File descriptor to which the name of each input is written before it is tried.
    """
    shared = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None
    counts = {name: collections.Counter() for name in chosen}
    spent, findings = dict.fromkeys(chosen, 0.0), []
    with tempfile.TemporaryDirectory(dir=shared) as place:
        for name, reader in chosen.items():
            (own := Path(place, name)).mkdir()
            for file, content in reader.files.items():
                (own / file).write_bytes(content)
            reader.read(own)  # what is valid is read, and compiled for
        started, done = time.process_time(), 0
        while done < inputs and time.process_time() - started < seconds:
            name = min(spent, key=lambda name: spent[name])
            number = counts[name].total()
            if log is not None:
                os.pwrite(log, f"{name}:{number}".ljust(80).encode(), 0)
            begun = time.process_time()
            chance = random.Random(f"{seed}/{name}/{number}")
            verdict, said = attempt(chosen[name], Path(place, name), chance)
            spent[name] += time.process_time() - begun
            counts[name][verdict] += 1
            done += 1
            if verdict not in FINE:
                findings.append(f"{name}:{number} {verdict}: {said}")
            if done % 10_000 == 0:
                print(f"{done} inputs, {len(findings)} findings", flush=True)
    return counts, findings


@contextlib.contextmanager
def coverage_of(modules: list[str]) -> Iterator[Callable[[], dict[str, Any]]]:
    """Measures the branches of files of the package in the block, if coverage.py is there."""
    try:
        from coverage import Coverage
    except ImportError:
        yield lambda: {}
        return
    import duquantpp_jax

    root = Path(duquantpp_jax.__file__).parent
    files = [str(root / module) for module in modules]
    measured = Coverage(branch=True, include=files, data_file=None, config_file=False)
    measured.start()

    def report() -> dict[str, Any]:
        measured.stop()
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            measured.json_report(outfile=file.name)
            found = json.loads(Path(file.name).read_text())
        inside = {
            str(Path(name).resolve().relative_to(root)): each["summary"]
            for name, each in found["files"].items()
        }
        shares = {"whole": found["totals"], **dict(sorted(inside.items()))}
        # Lines of definitions ran before, when modules were imported: branches alone count.
        return {
            name: f"{each['covered_branches']} of {each['num_branches']}"
            for name, each in shares.items()
        }

    yield report


def _repeat(what: str, seed: int) -> None:
    name, _, number = what.partition(":")
    with tempfile.TemporaryDirectory() as place:
        (reader,) = readers(Path(place, "valid"), [name]).values()
        own = Path(place, name)
        own.mkdir()
        for file, content in reader.files.items():
            (own / file).write_bytes(content)
        file, content, again = spoil(reader, random.Random(f"{seed}/{name}/{number}"))
        print(f"{file}, {len(content)} bytes{', sealed again' if again else ''}:")
        print(content[:2000] if len(content) < 10**5 else content[:200])
        print(*attempt(reader, own, random.Random(f"{seed}/{name}/{number}")), sep="\n")


def _child(options: argparse.Namespace, log: int) -> None:
    from experiments.torture.readers import FILES

    began = time.process_time()
    with tempfile.TemporaryDirectory() as place:
        chosen = readers(Path(place), options.only)
        print(f"{len(chosen)} readers set out in {time.process_time() - began:.0f} s", flush=True)
        # A burst of memory is an error in this process, and not the end of the machine.
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + (6 << 30), resource.RLIM_INFINITY))
        began = time.process_time()
        share = options.seconds / 4
        with coverage_of(FILES) as report:  # it slows readers down: a quarter of the time
            counts, findings = fuzz(chosen, options.inputs, share, options.seed + 1, log)
            covered = report()
        done = sum(each.total() for each in counts.values())
        more, others = fuzz(
            chosen, options.inputs - done, options.seconds - share, options.seed, log
        )
    for name, count in more.items():
        counts[name] += count
    findings = [f"seed {options.seed + 1} {each}" for each in findings] + [
        f"seed {options.seed} {each}" for each in others
    ]
    for name, count in counts.items():
        print(f"{name:24}{count.total():8}  {dict(count)}")
    for each in findings[:200]:
        print("FINDING", each)
    total = sum(count.total() for count in counts.values())
    print(f"{total} inputs, {len(findings)} findings; branches covered: {covered}")
    if not options.only:
        result = {
            "inputs": total,
            "seed": options.seed,
            "cpu_seconds": round(time.process_time() - began),
            "findings": [each.partition("\n")[0][:300] for each in findings],
            "readers": {name: dict(sorted(count.items())) for name, count in counts.items()},
            "coverage": covered,
        }
        subjects.write_result("fuzz", result)
    sys.stdout.flush()
    os._exit(bool(findings))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=600, help="of CPU time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", help="readers")
    parser.add_argument("--repeat", help="READER:NUMBER")
    options = parser.parse_args()
    if options.repeat:
        return _repeat(options.repeat, options.seed)
    with tempfile.TemporaryFile() as log:
        if not (child := os.fork()):
            try:
                _child(options, log.fileno())
            except BaseException:
                traceback.print_exc()
                os._exit(3)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            name = os.pread(log.fileno(), 80, 0).decode().strip()
            sys.exit(f"FINDING the process died of {signal.Signals(os.WTERMSIG(status)).name} "
                     f"at {name} (or its repetition under coverage)")  # fmt: skip
        sys.exit(os.WEXITSTATUS(status))


if __name__ == "__main__":
    main()
