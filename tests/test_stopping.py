"""What ends a command: Ctrl-C, signals, want of memory; each in one line, nothing half done."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from duquantpp_jax import cli, files
from duquantpp_jax.commands.progress import progress_bar


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        files.write_whole(tmp_path / "results.json", b"{}")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_is_one_line_and_130(tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("duquantpp_jax.commands.compare.compare", interrupted)
    assert cli.main(["compare", "--out", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err == "duquantpp: interrupted\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("when", ["next step", "end"])
def test_an_interrupt_that_a_library_swallows_is_raised_later(when, tmp_path, monkeypatch, capsys):
    def swallowed(*_):
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with progress_bar() as progress:
            if when == "next step":
                progress("on", 1, 2)
                pytest.fail("it goes on")
        return 0

    monkeypatch.setattr("duquantpp_jax.commands.compare.run", swallowed)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs may ignore it
    assert cli.main(["compare", "--out", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err == "duquantpp: interrupted\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    try:
        with progress_bar() as progress:
            progress("on", 1, 2)
    except KeyboardInterrupt:
        pytest.fail("it stops what is called after the command")


@pytest.mark.parametrize("lost", ["of another kind", "where nobody calls"])
def test_a_signal_of_which_a_library_makes_something_else_is_one_line(
    lost, tmp_path, monkeypatch, capsys
):
    class Collected:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    def stopped(*_):
        if lost == "where nobody calls":
            Collected()
            return 0
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            raise RuntimeError("Exception raised in callback") from None

    said = []
    monkeypatch.setattr(sys, "unraisablehook", said.append)
    monkeypatch.setattr("duquantpp_jax.commands.compare.run", stopped)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert cli.main(["compare", "--out", str(tmp_path / "out")]) == 143
    assert capsys.readouterr().err.startswith("duquantpp: stopped by SIGTERM at ")
    assert said == []


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_to_stop_is_one_line_that_names_the_step_and_exit_code_143(
    name, tmp_path, monkeypatch, capsys
):
    number = getattr(signal, name)
    signal.signal(number, signal.SIG_DFL)

    def stopped(_, progress):
        progress("layer 2 of 3", 1, 3)
        signal.raise_signal(number)

    monkeypatch.setattr("duquantpp_jax.commands.compare.compare", stopped)
    assert cli.main(["compare", "--out", str(tmp_path / "out")]) == 143
    said = capsys.readouterr().err
    assert said.startswith(f"duquantpp: stopped by {name} at layer 2 of 3 (1 of 3); ")
    assert said.count("\n") == 1
    assert signal.getsignal(number) is signal.SIG_DFL


@pytest.mark.parametrize(
    "error", [RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"), MemoryError()]
)
def test_want_of_memory_names_the_step_and_what_to_lower(error, tmp_path, monkeypatch, capsys):
    def full(_, progress):
        progress("layer 2 of 3", 1, 3)
        raise error

    monkeypatch.setattr("duquantpp_jax.commands.compare.compare", full)
    assert cli.main(["compare", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("duquantpp: out of memory at layer 2 of 3 (1 of 3): give a smaller")
    assert said.count("\n") == 1


LISTENING = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
import runpy
runpy.run_module("duquantpp_jax.cli", run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [1.0, 5.0])
def test_ctrl_c_leaves_no_half_written_file(seconds, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", LISTENING, "compare", "--out", tmp_path / "out"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    if process.returncode == 0:  # lost in a callback of jax before the command could listen
        assert seconds == 1.0, err
        assert "Exception ignored" in err
        assert json.loads((tmp_path / "out" / "results.json").read_text())
        return
    assert not list(tmp_path.rglob("*"))
    # While Python is still importing, it reports the interrupt itself.
    # What another library said of an interrupt that it swallowed may stand before.
    assert err.endswith("duquantpp: interrupted\n") or "in <module>" in err
