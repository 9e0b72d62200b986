"""Does work without end wear anything out? 1,000 cells, ten processes, fifty clients of `serve`.

Question: does memory grow with the cells that a process measures; is each cell of a grid measured
    once by ten processes; does `serve` still answer, and in its usual memory, under clients that
    are slow, huge, malformed or gone half way?
Hypothesis: memory is flat after the first hundred cells; every cell once; every client that asks
    well is answered, or told 503 where too many wait.
Command: python -m experiments.torture.load [--cells N] [--processes N] [--clients N] [--seconds S]
Cost: --seconds of the clock at most for the cells and again for the clients, and what ten processes
    need to begin; `serve` needs the extra serve.
Last result: docs/reliability.md.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import http.client
import importlib.util
import json
import os
import random
import resource
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from experiments.torture import subjects

STEADY = 100
"""Cells after which memory must be flat."""
GROWTH_MIB = 50
"""By which it may grow from then on: less than the .77 MiB a cell that were once found."""
COMPLETIONS = "/v1/completions"


def resident(pid: int | str = "self") -> float:
    """Resident memory of a process in MiB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def _cells(place: Path, count: int) -> list[Any]:
    from duquantpp_jax.lab import Cell

    given = {"model": place / "model", "text": place / "text.txt", "tokens": 511}
    given |= {"calibration_text": given["text"], "calibration_tokens": 511, "batch_rows": 1}
    return [Cell("random_hadamard", "even", seed=seed, **given) for seed in range(count)]


def many_cells(place: Path, count: int, seconds: float) -> dict[str, Any]:
    """Measures cells in one process; resident memory every 100 cells."""
    from duquantpp_jax.lab import records, running

    cells, out = _cells(place, count), place / "cells"
    end, seen = time.monotonic() + seconds, [resident()]
    measured = [0]

    def tick() -> None:
        measured[0] += 1
        if measured[0] % STEADY == 0:
            seen.append(resident())
            print(f"{measured[0]} cells, {seen[-1]:.0f} MiB", flush=True)

    def wanted() -> bool:
        return time.monotonic() < end

    out.mkdir()
    running.work(cells, out, tick=tick, wanted=wanted)
    done = sum(records.is_recorded(out, cell) for cell in cells)
    seen.append(resident())
    findings = []
    if wrong := list(out.glob("*.failed.json")):
        findings.append(f"{len(wrong)} cells failed: {wrong[0].read_text()[-300:]}")
    if done > STEADY and (grown := seen[-1] - seen[1]) > GROWTH_MIB:
        findings.append(f"memory grew by {grown:.0f} MiB from cell {STEADY} to cell {done}")
    return {"cells": done, "mib": [round(mib) for mib in seen[1:]], "findings": findings}


def many_processes(place: Path, count: int) -> dict[str, Any]:
    """Measures one grid in many processes on one directory; each cell must be measured once."""
    from duquantpp_jax.lab import records, running
    from experiments.torture.commands import fork, wait

    cells, out, log = _cells(place, 4 * count), place / "shared", place / "written"
    write = records.write

    def work() -> int:
        def noted(out: Path, cell: Any, found: Any) -> None:
            write(out, cell, found)
            with log.open("a") as file:
                file.write(f"{cell.digest}\n")

        records.write = noted
        return bool(running.run(cells, out).errors)

    # Programs are compiled once, before many processes ask for them at the same moment.
    wait(fork(lambda: running.run(cells[:1], place / "warm") and 0, place / "warm.log"), 1800)
    pids = [fork(work, place / "processes.log") for _ in range(count)]
    try:
        codes = [wait(pid, 1800) for pid in pids]
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    times = collections.Counter(log.read_text().split())
    findings = []
    if any(codes):
        said = (place / "processes.log").read_text(errors="replace")[-500:]
        findings.append(f"processes ended with {codes}: {said}")
    if set(times) != {cell.digest for cell in cells} or max(times.values()) > 1:
        findings.append(f"{len(times)} of {len(cells)} cells, up to {max(times.values())} times")
    kept = {path.name for path in out.iterdir()} - {".claims"}
    claims = [path.name for path in (out / ".claims").iterdir()]
    if kept != {f"{cell.digest}.json" for cell in cells} or claims:
        findings.append(f"{len(kept)} files, and claims {claims[:3]} are left")
    return {"processes": count, "cells": len(cells), "findings": findings}


def wish(**changes: Any) -> bytes:
    """The body of a request."""
    asked = {"model": "m", "prompt": "It was a dark", "max_tokens": 4, "temperature": 0}
    return json.dumps(asked | changes).encode()


class Client:
    """A client of `serve`, good or hostile."""

    def __init__(self, port: int, chance: random.Random):
        self.port, self.chance = port, chance

    def _head(self, length: int, kind: str = "application/json") -> bytes:
        return (
            f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\n"
            f"Content-Length: {length}\r\n\r\n"
        ).encode()

    def _raw(self, *parts: bytes, pause: float = 0.0, read: bool = True) -> int | None:
        with socket.create_connection(("127.0.0.1", self.port), timeout=120) as connection:
            for part in parts:
                connection.sendall(part)
                time.sleep(pause)
            if not read:
                return None
            line = connection.makefile("rb").readline()
            return int(line.split()[1]) if line.startswith(b"HTTP/") else None

    def ask(self, body: bytes) -> tuple[int, bytes]:
        """Status and body of the answer to a whole request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        headers = {"Content-Type": "application/json"}
        connection.request("POST", COMPLETIONS, body, headers)
        answer = connection.getresponse()
        found = answer.status, answer.read()
        connection.close()
        return found

    def good(self) -> int | None:
        """Asks well; status, and 0 where the text is not the only right one."""
        status, body = self.ask(wish())
        return status if status != 200 or json.loads(body)["choices"][0]["text"] else 0

    def slow(self) -> int | None:
        """Sends a body in eight parts."""
        body = wish()
        size = len(body) // 8 + 1
        parts = [body[at : at + size] for at in range(0, len(body), size)]
        return self._raw(self._head(len(body)), *parts, pause=0.2)

    def huge(self) -> int | None:
        """Sends 8 MiB, twice what is taken."""
        try:
            return self._raw(self._head(8 << 20), *[b" " * (1 << 20)] * 8)
        except (BrokenPipeError, ConnectionResetError):
            return 413  # refused before all was sent

    def malformed(self) -> int | None:
        """Sends what is no request, or no JSON."""
        body = wish()
        spoilt = self.chance.randbytes(len(body))
        requests = (
            b"GET\r\n\r\n", self.chance.randbytes(300) + b"\r\n\r\n",
            self._head(len(spoilt)) + spoilt, self._head(len(body), "text/plain") + body,
            self._head(40) + b"[" * 40, self._head(-1) + body, b"A" * 100_000 + b"\r\n\r\n",
        )  # fmt: skip
        try:
            return self._raw(self.chance.choice(requests))
        except (BrokenPipeError, ConnectionResetError):
            return None

    def gone(self) -> int | None:
        """Goes after half a body, or after a request for a long text."""
        body = wish(max_tokens=200, stream=True)
        half = self._head(len(body)) + body[: len(body) // 2]
        return self._raw(self.chance.choice((half, self._head(len(body)) + body)), read=False)

    def silent(self) -> int | None:
        """Closes its own half of the connection after the request, and reads on."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=120) as connection:
            connection.sendall(self._head(len(wish())) + wish())
            connection.shutdown(socket.SHUT_WR)
            connection.makefile("rb").readline()
        return None


WANTED = {
    "good": {200, 503},
    "slow": {200, 503},
    "huge": {413, None},
    "malformed": {400, 411, 413, 415, 431, None},
    "gone": {None},
    "silent": {None},
}
"""Statuses that each kind of client may see; None where the connection is closed."""


def many_clients(place: Path, count: int, seconds: float) -> dict[str, Any]:
    """Serves hostile clients for a while; a good one is answered the same before and after."""
    from duquantpp_jax import cli
    from experiments.torture.commands import fork, wait

    log, waiting = place / "serve.log", 8
    given = ["serve", str(place / "model"), "--port", "0", "--name", "m", "--rows", "4"]
    given += ["--waiting", str(waiting), "--cache", "float32"]
    pid = fork(lambda: cli.main(given), log)
    deadline, port = time.monotonic() + 300, 0
    while not port and time.monotonic() < deadline:
        for line in log.read_text().splitlines() if log.exists() else ():
            if line.startswith("serving"):
                port = int(line.rsplit(":", 1)[1].split("/")[0])
        time.sleep(0.05)
    first = Client(port, random.Random(0))
    before = first.ask(wish())
    first.ask(wish(n=4, temperature=0.5))  # a full batch is compiled, too
    start, end = resident(pid), time.monotonic() + seconds
    seen: dict[str, collections.Counter] = {kind: collections.Counter() for kind in WANTED}
    kinds = [*WANTED, "good", "good"]

    def client(number: int) -> None:
        chance = random.Random(number)
        own = Client(port, chance)
        while time.monotonic() < end:
            kind = chance.choice(kinds)
            try:
                status = getattr(own, kind)()
            except (OSError, http.client.HTTPException) as error:
                status = type(error).__name__
            seen[kind][status] += 1

    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        list(pool.map(client, range(count)))
    findings = []
    for kind, statuses in seen.items():
        if wrong := {status: n for status, n in statuses.items() if status not in WANTED[kind]}:
            findings.append(f"{kind} clients saw {wrong}")
    if (after := Client(port, random.Random(0)).ask(wish()))[0] != 200:
        findings.append(f"after it all a good client sees {after[0]}")
    elif json.loads(after[1])["choices"] != json.loads(before[1])["choices"]:
        findings.append("after it all a good client is answered otherwise")
    grown = resident(pid) - start
    if grown > 100:
        findings.append(f"serve grew by {grown:.0f} MiB")
    os.kill(pid, signal.SIGTERM)
    if (code := wait(pid, 120)) != 0:
        findings.append(f"serve ended with {code}")
    if "Traceback" in log.read_text(errors="replace"):
        findings.append(f"serve printed a traceback: {log.read_text(errors='replace')[-500:]}")
    return {
        "clients": count,
        "requests": sum(statuses.total() for statuses in seen.values()),
        "statuses": {k: {str(s): n for s, n in v.items()} for k, v in seen.items()},
        "refused_503": sum(statuses[503] for statuses in seen.values()),
        "grown_mib": round(grown),
        "findings": findings,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=10)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=300, help="of the clock")
    options = parser.parse_args()
    share, found = options.seconds / 2, {}
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        os.environ["DUQUANTPP_CACHE"] = str(place / "cache")
        jax.config.update("jax_compilation_cache_dir", str(place / "cache"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        import experiments.torture.commands  # noqa: F401  imports all, before any fork

        subjects.write_model(place / "model", num_hidden_layers=2)
        subjects.write_text(place / "text.txt")
        parts = {
            "processes": lambda: many_processes(place, options.processes),
            "clients": lambda: many_clients(place, options.clients, share),
            "cells": lambda: many_cells(place, options.cells, share),  # starts a device: last
        }
        if importlib.util.find_spec("uvicorn") is None:
            print("serve is not tried: pip install 'duquantpp_jax[serve]'")
            del parts["clients"]
        for part, tried in parts.items():
            found[part] = tried()
            print(part, found[part], flush=True)
    findings = [f"{part}: {line}" for part, each in found.items() for line in each.pop("findings")]
    for line in findings:
        print("FINDING", line)
    print(f"{len(findings)} findings")
    if len(found) == 3:
        subjects.write_result("load", {"findings": findings, **found})
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
