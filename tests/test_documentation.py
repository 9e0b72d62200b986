"""The parser takes every command in a block of code of README and of docs/."""

import re
import shlex
from pathlib import Path

import pytest

from duquantpp_jax import cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"(?:^|[\s/])duquantpp ([a-z].*)")


def commands(page):
    """What follows `duquantpp` in the lines of blocks of code, optional parts as if given."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
    found = [m[1] for block in blocks for line in block.splitlines() if (m := COMMAND.search(line))]
    return [re.split(r" +(?:#|&&|\||>|\.\.\.)", command)[0] for command in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_parser_takes_every_command(page):
    for command in commands(page):
        cli._parse(shlex.split(re.sub(r"[][]", " ", command)))


def test_commands_are_found():
    assert sum(map(len, map(commands, PAGES))) > 25


FIRST_HOUR = (ROOT / "docs/first_hour.md").read_text(encoding="utf-8")
TURNS = re.findall(r"^\| `duquantpp (.*)` \| (.*) \|$", FIRST_HOUR, re.MULTILINE)


@pytest.mark.parametrize(("typed", "answer"), TURNS)
def test_a_wrong_turn_of_the_first_hour_is_answered_as_its_page_says(
    typed, answer, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert cli.main(shlex.split(typed)) == 2
    assert capsys.readouterr().err == f"duquantpp: {answer}\n"


@pytest.mark.slow
def test_the_code_of_the_first_hour_runs(capsys):
    (block,) = re.findall(r"```python\n(.*?)```", FIRST_HOUR, re.DOTALL)
    names = {}
    exec(block, names)
    assert len(names["report"].linears) == 12
    assert not names["report"].left
    assert 0 < names["error"] < 0.5
    assert "layers.1.attention.out" in capsys.readouterr().out
