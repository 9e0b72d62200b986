"""--json, --verbose, completion, and plain values in place of paths and tuples."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jaxtyping
import pytest

from duquantpp_jax import cli
from duquantpp_jax.commands.options import CompareOptions, EvaluateOptions
from duquantpp_jax.commands.options.common import Terminal
from duquantpp_jax.lab import Cell
from tests.conftest import TEXT

BASH = """
source /dev/stdin
COMP_WORDS=(duquantpp comp) COMP_CWORD=1; _tyro_duquantpp; echo "${COMPREPLY[@]}"
COMP_WORDS=(duquantpp quantize --re) COMP_CWORD=2; _tyro_duquantpp; echo "${COMPREPLY[@]}"
COMP_WORDS=(duquantpp learn --through "") COMP_CWORD=3; _tyro_duquantpp; echo "${COMPREPLY[@]}"
"""


def test_every_command_can_print_json_and_say_more():
    for kind in cli.COMMANDS.values():
        (field,) = (f for f in dataclasses.fields(kind) if f.name == "terminal")
        assert field.default == Terminal()
    assert cli._parse(["recipes", "--json", "--verbose"]).terminal == Terminal(True, True)


def test_a_reader_that_ends_early_is_no_error(monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert cli.main(["completion", "bash"]) == 1
        assert cli.main(["completion", "bash"]) == 0  # to nowhere
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_names_all_commands_and_options(shell, capsys):
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for name, kind in cli.COMMANDS.items():
        assert repr(name) in script
        flags = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(kind)}
        flags -= {"--terminal", "--imports", "--file", "--shell", "--model"}  # some are positional
        assert [flag for flag in flags if repr(flag) not in script] == []


def test_bash_completes_commands_options_and_choices(capsys):
    assert cli.main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    done = subprocess.run(["bash", "-c", BASH], input=script, capture_output=True, text=True)
    assert [line.split() for line in done.stdout.splitlines()] == [
        ["compare", "completion"],
        ["--recipe", "--refine", "--requantize"],
        ["site", "block", "model"],
    ]


def test_json_of_a_short_command_is_one_object(capsys):
    assert cli.main(["completion", "fish", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["shell"] == "fish"
    assert "complete" in found["script"]


TEXTS = ("--text", str(TEXT))
CALIBRATED = (*TEXTS, "--calibration-text", str(TEXT))
WRONG = {
    "compare": ("--model", "nowhere", *CALIBRATED),
    "ablate": ("nowhere.py",),
    "evaluate": ("--model", "nowhere", *TEXTS),
    "generate": ("--model", "nowhere", "--prompt", "once"),
    "serve": ("nowhere",),
    "learn": ("--model", "nowhere", *TEXTS, "--out", "new"),
    "quantize": ("--model", "nowhere", *CALIBRATED[2:], "--out", "new"),
    "export": ("--model", "nowhere", "--out", "new"),
    "inspect": ("--model", "nowhere", *TEXTS),
    "recipes": ("nowhere",),
    "kernels": ("--target", "nowhere"),
    "completion": ("nowhere",),
}


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_with_json_an_error_is_one_line_on_stderr_alone(command, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli.main([command, *WRONG[command], "--json"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("duquantpp: ")
    assert printed.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("more", [(), ("--verbose",)])
def test_verbose_says_versions_and_where_an_error_was_raised(more, capsys):
    assert cli.main(["evaluate", "--model", "a\x07", "--text", str(TEXT), *more]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert ("Traceback" in printed.err) == bool(more)
    assert printed.err.startswith("duquantpp_jax " if more else "duquantpp: ")
    assert "\x07" not in printed.err


def test_options_take_plain_strings_and_lists(monkeypatch):
    # Checks of these tests come before values are made what is declared.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    plain = CompareOptions("m", recipes="rtn", fits=["a", "b"], seeds=3, out="o")
    paths = {"fits": (Path("a"), Path("b")), "seeds": (3,), "out": Path("o")}
    assert plain == CompareOptions(Path("m"), recipes=("rtn",), **paths)
    assert EvaluateOptions("m", tasks="gutenberg") == EvaluateOptions(
        Path("m"), tasks=("gutenberg",)
    )
    assert Cell("rtn", model="m", include="*.mlp.*") == Cell(
        "rtn", model=Path("m"), include=("*.mlp.*",)
    )
