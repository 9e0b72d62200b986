"""Commands of two processes, with two devices each, give what one process gives."""

import os
import re
import signal
import socket
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest

from duquantpp_jax import files
from duquantpp_jax.checkpoints.fits import read_about
from duquantpp_jax.cli import main
from duquantpp_jax.commands import hosts
from duquantpp_jax.commands.evaluate import evaluate
from duquantpp_jax.commands.learn import learn_fits
from duquantpp_jax.commands.learn import run as learn
from duquantpp_jax.commands.options.evaluate import EvaluateOptions
from duquantpp_jax.commands.options.learn import LearnOptions
from tests.conftest import TEXT

GLOO = re.compile(
    r"\[Gloo\] Rank | is connected to | peer ranks\. |Expected number of connected peer ranks is : "
    r"|[0-9\n]"
)
"""Sums over processes on a CPU are Gloo's, whose threads say with whom they are connected, piece by
piece and between one another's pieces. Numbers go with them."""


def two_running(*arguments, places=(None, None)):
    """Two processes that run a command together, in these directories."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    shared = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "JAX_NUM_PROCESSES": "2"}
    shared |= {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}"}
    command = [sys.executable, "-m", "duquantpp_jax", *map(str, arguments), "--distributed"]
    return [
        subprocess.Popen(
            command, env=os.environ | shared | {"JAX_PROCESS_ID": str(number)}, cwd=place,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number, place in enumerate(places)
    ]  # fmt: skip


def by_two(*arguments):
    """What two processes print that run a command together."""
    started = two_running(*arguments)
    said = [process.communicate(timeout=300) for process in started]
    for process, (_, errors) in zip(started, said, strict=True):
        assert process.returncode == 0, errors
    return [GLOO.sub("", out) for out, _ in said]


@pytest.mark.slow
@pytest.mark.sockets
def test_two_processes_evaluate_what_one_evaluates_and_the_first_alone_says_so(
    tiny_directory, tmp_path
):
    alone = evaluate(EvaluateOptions(tiny_directory, TEXT, window=64))
    out = tmp_path / "2.json"
    asked = ("--model", tiny_directory, "--text", TEXT, "--window", 64, "--out", out)
    first, other = by_two("evaluate", *asked)
    assert "NLL" in first
    assert not other
    found = files.read_json(out)
    np.testing.assert_allclose(found["nll"]["value"], alone["nll"]["value"], rtol=1e-6)
    assert found["targets"] == alone["targets"]


@pytest.mark.slow
@pytest.mark.sockets
def test_a_process_that_cannot_go_on_says_so_and_ends_and_the_other_misses_it(
    tiny_directory, tmp_path
):
    there = tmp_path / "there"
    there.mkdir()
    (tmp_path / "a.txt").write_text("abc " * 200)
    asked = ("evaluate", "--model", tiny_directory, "--text", "a.txt", "--window", 64)
    running = two_running(*asked, places=(tmp_path, there))
    try:
        said = [process.communicate(timeout=100)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [2, 2]
    assert "cannot read a.txt" in said[1]
    assert "another process has ended" in said[0]


@pytest.mark.slow
@pytest.mark.sockets
def test_two_processes_learn_what_one_learns(tiny_directory, tmp_path):
    how: dict[str, Any] = {"rows": 12, "held_out": 4.0, "steps": 2, "batch_rows": 8, "start": "rtn"}
    how |= {"accumulate": 2, "measure": False}
    alone = learn_fits(LearnOptions(model=tiny_directory, text=(TEXT,), out=tmp_path / "1", **how))
    asked = [f"--{name.replace('_', '-')}={value}" for name, value in how.items() if value]
    out = tmp_path / "2"
    first, other = by_two("learn", "--model", tiny_directory, "--text", TEXT, "--out", out, *asked,
                          "--no-measure")  # fmt: skip
    assert "Written" in first
    assert not other
    assert not (out / "progress").exists()
    found = read_about(out)
    np.testing.assert_allclose(found["history"], alone["history"], rtol=1e-3)
    assert alone["history"][-1][2] < alone["start_loss"]


def test_what_cannot_be_shared_or_joined_is_refused(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="those of a site are small"):
        learn(LearnOptions(distributed=True, through="site", out=tmp_path))
    monkeypatch.setenv("JAX_PROCESS_ID", "0")
    with pytest.raises(ValueError, match="needs JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES"):
        hosts.meet_others()


def test_a_process_says_whom_it_waits_for_and_can_be_ended_meanwhile(monkeypatch, caplog):
    def waits(*_):
        assert "joining 2 processes at here:1 as number 0" in caplog.text
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN

    monkeypatch.setattr(hosts.jax.distributed, "initialize", waits)
    for name, value in zip(hosts.VARIABLES, ("here:1", "2", "0"), strict=True):
        monkeypatch.setenv(name, value)
    own = {signal.SIGTERM: lambda *_: None, signal.SIGHUP: signal.SIG_IGN}
    before = {each: signal.signal(each, handler) for each, handler in own.items()}
    try:
        hosts.meet_others()
        assert {each: signal.getsignal(each) for each in own} == own
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@pytest.mark.parametrize("joined", [False, True])
def test_only_a_process_that_a_command_has_joined_to_others_is_ended(joined, monkeypatch, capsys):
    ended: list[int] = []
    monkeypatch.setattr(hosts.os, "_exit", ended.append)
    monkeypatch.setattr(hosts.jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(hosts, "_joined", [True] * joined)
    assert main(["evaluate", "--model", "nowhere", "--text", "nowhere"]) == 2
    assert ended == [2] * joined
    monkeypatch.setattr(hosts, "_joined", [True] * joined)
    monkeypatch.setattr("duquantpp_jax.cli.guarded", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["evaluate"])
    assert ended == [2, 1][: 2 * joined]
    assert ("Traceback" in capsys.readouterr().err) == joined


def test_others_than_the_first_write_nowhere(tmp_path):
    options = LearnOptions(out=tmp_path / "fits")
    assert hosts._writing_to(tmp_path / "nowhere", options).out == tmp_path / "nowhere" / "out"


def test_processes_that_were_asked_for_different_things_all_say_so(monkeypatch):
    asked = LearnOptions(steps=2)
    seen: list[Any] = []
    monkeypatch.setattr(hosts, "in_every_process", lambda mine: seen.append(mine) or mine)
    hosts.check_alike(asked)
    hosts.check_alike(LearnOptions(steps=4))
    monkeypatch.setattr(hosts, "in_every_process", lambda mine: np.stack(seen))
    with pytest.raises(ValueError, match="process 1 was asked for something else than process 0"):
        hosts.check_alike(asked)


def test_a_process_that_is_missed_is_one_line_and_signals_stay_the_commands(monkeypatch):
    def joined(*_):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    monkeypatch.setattr(hosts.jax.distributed, "initialize", joined)
    monkeypatch.setattr(hosts.jax.distributed, "shutdown", lambda: None)
    monkeypatch.setattr(hosts, "check_alike", lambda _: None)
    before = signal.getsignal(signal.SIGTERM)
    lost = jax.errors.JaxRuntimeError("UNKNOWN: Gloo context initialization failed")
    options = LearnOptions(distributed=True)

    def ended(error):
        with hosts.as_one_of_several(options):
            assert signal.getsignal(signal.SIGTERM) is before
            raise error

    with pytest.raises(ValueError, match="another process has ended, or did not come so far"):
        ended(lost)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        ended(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"))
