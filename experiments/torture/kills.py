"""Is anything lost, done twice or left behind by a kill? SIGKILL at random moments.

Question: does a command that was killed, at any moment, end in the next run as one that was never
    disturbed, and is nothing left beside what it writes?
Hypothesis: yes: files have their names when they are whole, and what dead processes left is
    removed by the next.
Command: python -m experiments.torture.kills [--kills N] [--few N] [--seconds S] [--only NAME ..]
Cost: --seconds of the clock at most, divided over the commands.
Last result: docs/reliability.md.

Half of the kills come at a random moment of a run, half up to 20 ms after a file has come or gone,
when little time is spent and most could go wrong. After one to eight kills in a row the command is
run to its end, and what it has left is compared with an undisturbed run's, byte by byte but for
times. `serve` is killed while it starts and while it answers; the next one must answer the same.
"""

import argparse
import http.client
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from experiments.torture import subjects

MANY = ("quantize", "export", "compare", "ablate")
FEW = ("learn", "serve")


def _listing(place: Path) -> set[str]:
    found = set()
    for root, directories, names in os.walk(place):
        found.update(os.path.join(root, name) for name in (*directories, *names))
    return found


def kill_once(pid: int, place: Path, seconds: float, chance: random.Random) -> bool:
    """Kills a process at a random moment; whether it still ran."""
    moment = chance.uniform(0, seconds)
    deadline = time.monotonic() + (moment if chance.random() < 0.5 else 0.8 * moment)
    while time.monotonic() < deadline:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return False
        time.sleep(0.002)
    if chance.random() < 0.5:  # at the next file that comes or goes
        before, deadline = _listing(place), time.monotonic() + seconds
        while _listing(place) == before and time.monotonic() < deadline:
            if os.waitpid(pid, os.WNOHANG)[0]:
                return False
            time.sleep(0.0005)
        time.sleep(chance.uniform(0, 0.02))
    if os.waitpid(pid, os.WNOHANG)[0]:
        return False
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return True


def torture(command: Any, place: Path, kills: int, seconds: float, seed: int = 0) -> dict[str, Any]:
    """Kills a command again and again; counts, and what was found."""
    from experiments.torture.commands import differences, left, run, start

    chance, log = random.Random(f"{seed}/{command.name}"), place / f"{command.name}.log"
    own = place / command.name
    own.mkdir()
    end = time.monotonic() + seconds
    run(command, place / f"{command.name} compiled", log)
    each = run(command, place / f"{command.name} undisturbed", log)
    wanted = left(place / f"{command.name} undisturbed")
    out = own / "out"
    counts: dict[str, Any] = {"kills": 0, "ends": 0, "begun": 0, "seconds": round(each, 2)}
    counts["findings"] = []
    while counts["kills"] < kills and time.monotonic() < end:
        for _ in range(chance.choice((1, 1, 2, 4, 8))):
            log.unlink(missing_ok=True)
            if kill_once(start(command, out, log), own, each, chance):
                counts["kills"] += 1
                counts["begun"] += bool(_listing(own))
            elif found := differences(left(out), wanted):
                counts["findings"].append(f"not killed: differs in {found}")
        if command.goes_on or not out.exists():
            try:
                # On a machine that others use, too, runs take now more and now less time.
                each = max(run(command, out, log), 0.8 * each)
            except (RuntimeError, TimeoutError) as error:
                counts["findings"].append(" ".join(str(error).split())[:300])
        counts["ends"] += 1
        if found := differences(left(out), wanted):
            counts["findings"].append(f"after a kill {command.name} differs in {found}")
        if beside := sorted(path.name for path in own.iterdir() if path.name != "out"):
            counts["findings"].append(f"beside --out {beside} is left")
        shutil.rmtree(own)
        own.mkdir()
    return counts


def _ask(port: int) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    body = {"model": "m", "prompt": "It was a dark", "max_tokens": 8, "temperature": 0}
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    return json.loads(connection.getresponse().read())["choices"][0]["text"]


def serve(place: Path, kills: int, seconds: float, seed: int = 0) -> dict[str, Any]:
    """Kills a server while it starts and while it answers; the next one must answer the same."""
    from duquantpp_jax import cli
    from experiments.torture.commands import fork, left, wait

    model, log = place / "model", place / "serve.log"
    given = ["serve", str(model), "--port", "0", "--name", "m", "--cache", "float32"]

    def port_of(pid: int) -> int:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            for line in log.read_text().splitlines() if log.exists() else ():
                if line.startswith("serving"):
                    return int(line.rsplit(":", 1)[1].split("/")[0])
            if os.waitpid(pid, os.WNOHANG)[0]:
                break
            time.sleep(0.01)
        raise RuntimeError(f"serve does not start: {log.read_text()[-1000:]}")

    def started() -> int:
        log.unlink(missing_ok=True)
        return fork(lambda: cli.main(given), log)

    chance, end = random.Random(f"{seed}/serve"), time.monotonic() + seconds
    before, wanted, each = left(model), None, 1.0
    counts: dict[str, Any] = {"kills": 0, "ends": 0, "findings": []}
    while counts["kills"] < kills and time.monotonic() < end:
        began, pid = time.monotonic(), started()
        text = _ask(port_of(pid))
        each = time.monotonic() - began
        wanted = wanted or text
        counts["ends"] += 1
        if text != wanted:
            counts["findings"].append(f"after a kill serve answers {text!r}, not {wanted!r}")
        if child := os.fork():  # a client that waits when the server is killed
            time.sleep(chance.uniform(0, 0.05))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(child, 0)
            wait(pid)
        else:
            try:
                _ask(port_of(pid))
            finally:
                os._exit(0)
        pid = started()
        time.sleep(chance.uniform(0, each))
        os.kill(pid, signal.SIGKILL)
        wait(pid)
        counts["kills"] += 2
    if left(model) != before:
        counts["findings"].append("the model's directory has changed")
    return counts | {"seconds": round(each, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help=f"of {', '.join(MANY)} each")
    parser.add_argument("--few", type=int, default=20, help=f"of {', '.join(FEW)} each")
    parser.add_argument("--seconds", type=float, default=600, help="of the clock")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", choices=(*MANY, *FEW), default=(*MANY, *FEW))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        os.environ["DUQUANTPP_CACHE"] = str(place / "cache")
        from experiments.torture.commands import commands

        found, made = {}, commands(place)
        end = time.monotonic() + options.seconds
        for number, which in enumerate(options.only):
            share = (end - time.monotonic()) / (len(options.only) - number)
            kills = options.kills
            if which == "serve":
                found[which] = serve(place, options.few, share, options.seed)
            else:
                kills = options.few if which in FEW else kills
                found[which] = torture(made[which], place, kills, share, options.seed)
            print(which, found[which], flush=True)
        kept = [path for path in (place / "cache").rglob("*") if path.name.startswith(".")]
        print(f"{len(kept)} directories of dead commands in the cache, for the next to remove")
    total, findings = (sum(each["kills"] for each in found.values()), [])
    for which, each in found.items():
        findings += [f"{which}: {line}" for line in each.pop("findings")]
    for line in findings:
        print("FINDING", line)
    print(f"{total} kills, {len(findings)} findings")
    if set(options.only) == {*MANY, *FEW}:
        subjects.write_result("kills", {"kills": total, "findings": findings, "commands": found})
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
