"""Is a fault of the disk, or of another process, said in one line, and nothing wrong kept?

Question: what comes of a full disk, of a directory that cannot be written, and of files that are
    replaced or removed while a command reads or writes them?
Hypothesis: one line and exit code 2 (1 of `ablate`, where cells failed), and the next run ends as
    an undisturbed one; or the command did not need the file any more, and its result is an
    undisturbed one's; or had not read it yet, and its result is that of the new file. Never another
    result, and never a part of one.
Command: python -m experiments.torture.faults [--seconds S] [--only NAME ..]
Cost: --seconds of the clock, and what two undisturbed runs of each command take before.
Last result: docs/reliability.md.

A disk is a tmpfs of a size that is drawn, where this process may mount one; else RLIMIT_FSIZE
bounds the size of each file. A directory is made read-only by a mount, too: root writes to any
other. What is tried of it is in the result as `how`. A file is replaced by a rename; one that is
cut short in place takes its reader with it (SIGBUS), as a kill would.
"""

import argparse
import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.torture import subjects
from experiments.torture.kills import _listing

FAULTS = ("full disk", "read-only", "replaced", "removed", "output removed")


def _mount(place: Path, *options: str) -> bool:
    arguments = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(place)]
    return subprocess.run(arguments, capture_output=True).returncode == 0


def may_mount(place: Path) -> bool:
    """Whether this process may mount a disk of its own."""
    place.mkdir(parents=True)
    if not (found := shutil.which("mount") is not None and _mount(place, "size=1m")):
        return False
    subprocess.run(["umount", str(place)], check=True)
    return found


def said_well(text: str) -> bool:
    """Whether a command that failed said why in one line, and in no traceback."""
    errors = [line for line in text.splitlines() if line.startswith("duquantpp: ")]
    return len(errors) == 1 and "Traceback" not in text


class Trial:
    """Faults of one command.

    Attributes:
      counts: How many faults were tried, and how many of them the command felt.
    """

    def __init__(self, command: Any, place: Path, mounts: bool, seed: int):
        from experiments.torture.commands import left, run

        self.command, self.place, self.mounts = command, place, mounts
        self.chance = random.Random(f"{seed}/{command.name}")
        self.log = place / f"{command.name}.log"
        run(command, place / f"{command.name} compiled", self.log)
        undisturbed = place / f"{command.name} undisturbed"
        self.seconds = run(command, undisturbed, self.log)
        self.wanted = left(undisturbed)
        self.sizes = [path.stat().st_size for path in undisturbed.rglob("*") if path.is_file()]
        self.counts = {fault: {"tried": 0, "felt": 0} for fault in FAULTS}
        self.findings: list[str] = []
        self.own = place / f"{command.name} faults"
        self.own.mkdir()

    def judge(
        self, fault: str, code: int, out: Path, *, again: bool = True, also: Any = None
    ) -> None:
        """Notes what came of a fault; then runs the command without it and compares.

        Args:
          also: What else may be left: what a run leaves of the files that are new, or nothing,
            where the whole result was taken away.
        """
        from experiments.torture.commands import differences, left, run

        self.counts[fault]["tried"] += 1
        self.counts[fault]["felt"] += code != 0
        text = self.log.read_text(errors="replace")
        # `ablate` says which cells have failed, and goes on.
        failed = code == 1 and self.command.name == "ablate" and "Traceback" not in text
        if not failed and code != 0 and (code != 2 or not said_well(text)):
            said = " ".join(text.split())[-400:]
            self.findings.append(f"{fault}: ended with {code}: {said}")
        found = differences(left(out), self.wanted) if code == 0 else []
        if found and (also is None or differences(left(out), also)):
            self.findings.append(f"{fault}: ended well, and differs in {found}")
        if code != 0 and again:
            if not self.command.goes_on:
                shutil.rmtree(out, ignore_errors=True)
            try:
                run(self.command, out, self.log)
            except (RuntimeError, TimeoutError) as error:
                self.findings.append(f"{fault}, then: {' '.join(str(error).split())[-400:]}")
            else:
                if found := differences(left(out), self.wanted):
                    self.findings.append(f"{fault}, then a run that differs in {found}")

    def full_disk(self) -> None:
        """The disk has less room than the results take."""
        from duquantpp_jax import cli
        from experiments.torture.commands import fork, start, wait

        self.log.unlink(missing_ok=True)
        disk = self.own / "disk"
        disk.mkdir()
        share = self.chance.uniform(0.02, 0.98)
        try:
            if self.mounts:
                size = max(4096, int(share * sum(self.sizes)))
                if not _mount(disk, f"size={size}"):
                    raise RuntimeError("mount is not allowed any more")
                code = wait(start(self.command, disk / "out", self.log))
                room = ["mount", "-o", "remount,size=64m", str(disk)]
                subprocess.run(room, check=True)
            else:
                most = int(share * max(self.sizes))

                def bounded() -> int:
                    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
                    return cli.main([*self.command.arguments, "--out", str(disk / "out")])

                code = wait(fork(bounded, self.log))
            self.judge("full disk", code, disk / "out")
        finally:
            if self.mounts:
                subprocess.run(["umount", str(disk)], check=True)
            shutil.rmtree(disk)

    def read_only(self) -> None:
        """--out is in a directory that cannot be written."""
        from experiments.torture.commands import start, wait

        if not self.mounts and os.geteuid() == 0:
            return  # root may write anywhere
        self.log.unlink(missing_ok=True)
        disk = self.own / "disk"
        disk.mkdir()
        try:
            if self.mounts:
                _mount(disk, "size=64m", "ro")
            else:
                disk.chmod(0o500)
            code = wait(start(self.command, disk / "out", self.log))
            if code == 0:
                self.findings.append("read-only: ended well, and can have written nothing")
            self.judge("read-only", code, disk / "out", again=False)
        finally:
            if self.mounts:
                subprocess.run(["umount", str(disk)], check=True)
            disk.chmod(0o700)
            shutil.rmtree(disk)

    def _meanwhile(self, out: Path, change: Any) -> int:
        """Runs the command, and `change` at a random moment of it; its exit code."""
        from experiments.torture.commands import start, wait

        self.log.unlink(missing_ok=True)
        pid = start(self.command, out, self.log)
        deadline = time.monotonic() + self.chance.uniform(0, self.seconds)
        if self.chance.random() < 0.5:  # or when a file comes
            deadline = time.monotonic() + self.seconds
            before = _listing(self.own)
            while _listing(self.own) == before and time.monotonic() < deadline:
                time.sleep(0.001)
        else:
            time.sleep(max(0, deadline - time.monotonic()))
        change()
        return wait(pid)

    def changed(self, fault: str) -> None:
        """A file that the command reads is replaced by another of its kind, or removed."""
        from experiments.torture.commands import differences, left

        source = self.place / ("quantized" if self.command.name == "export" else "model")
        names = [path.name for path in source.iterdir() if path.suffix == ".safetensors"]
        name = self.chance.choice([*names, "config.json", "tokenizer.json"])
        kept, out = self.place / "kept", self.own / "out"
        shutil.copytree(source, kept)
        other = self.place / "other" / name
        try:

            def change() -> None:
                if fault == "removed" or not other.exists():
                    (source / name).unlink()
                else:
                    shutil.copy(other, source / ".new")
                    (source / ".new").rename(source / name)

            code, also = self._meanwhile(out, change), None
            if fault == "replaced" and code == 0 and differences(left(out), self.wanted):
                also = self._left_anew()  # it was replaced before it was read
        finally:
            shutil.rmtree(source)
            kept.rename(source)
        self.judge(fault, code, out, also=also)
        shutil.rmtree(out, ignore_errors=True)

    def _left_anew(self) -> Any:
        """What a run leaves from the files that are there now; None if it fails."""
        from experiments.torture.commands import left, run

        out = self.own / "anew"
        with contextlib.suppress(RuntimeError):
            run(self.command, out, self.log)
        found = left(out)
        shutil.rmtree(out, ignore_errors=True)
        return found

    def output_removed(self) -> None:
        """--out is taken away by a rename, at once, while the command writes there."""
        from experiments.torture.commands import differences, left

        out, taken = self.own / "out", self.own / "taken"

        def change() -> None:
            with contextlib.suppress(FileNotFoundError):
                out.rename(taken)

        code = self._meanwhile(out, change)
        whole = not differences(left(taken), self.wanted)  # its work was done: nothing is wrong
        self.judge("output removed", code, out, also={} if whole else None)
        for place in (out, taken):
            shutil.rmtree(place, ignore_errors=True)

    def rounds(self) -> Iterator[None]:
        """Tries each fault once, again and again."""
        while True:
            for tried in (
                self.full_disk, lambda: self.changed("replaced"), lambda: self.changed("removed"),
                self.output_removed, self.read_only,
            ):  # fmt: skip
                tried()
                yield


def faults(place: Path, seconds: float, only: list[str] | None, seed: int = 0) -> dict[str, Any]:
    """Tries the faults of each command in turn until the time is over; counts and findings."""
    from experiments.torture.commands import commands

    made, mounts = commands(place), may_mount(place / "mount")
    subjects.write_model(place / "other", num_hidden_layers=2, seed=5, rms_norm_eps=1e-3)
    trials = {name: Trial(made[name], place, mounts, seed) for name in only or made}
    end = time.monotonic() + seconds
    rounds = {name: trial.rounds() for name, trial in trials.items()}
    while time.monotonic() < end:
        for name, each in rounds.items():
            if time.monotonic() < end:
                next(each)
                print(name, trials[name].counts, flush=True)
    findings = [f"{name}, {line}" for name, trial in trials.items() for line in trial.findings]
    return {
        "how": "tmpfs" if mounts else "RLIMIT_FSIZE",
        "tried": sum(c["tried"] for t in trials.values() for c in t.counts.values()),
        "felt": sum(c["felt"] for t in trials.values() for c in t.counts.values()),
        "findings": findings,
        "commands": {name: trial.counts for name, trial in trials.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=300, help="of the clock")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", help="commands")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        os.environ["DUQUANTPP_CACHE"] = str(Path(name) / "cache")
        found = faults(Path(name), options.seconds, options.only, options.seed)
    for line in found["findings"]:
        print("FINDING", line)
    print(f"{found['tried']} faults, {found['felt']} felt, {len(found['findings'])} findings")
    if not options.only:
        subjects.write_result("faults", found)
    sys.exit(bool(found["findings"]))


if __name__ == "__main__":
    main()
