"""hf:ORG/NAME asks the hub once, and whatever goes wrong is one line."""

import sys
import types
from pathlib import Path

import pytest

from duquantpp_jax import cli
from duquantpp_jax.checkpoints import hub, load_config
from duquantpp_jax.evaluation.subject import model_and_hash
from tests.conftest import TEXT


@pytest.fixture
def asked(monkeypatch, tiny_directory):
    """What a hub was asked that has one model, and no network."""
    calls = []

    def snapshot_download(repo, revision=None, allow_patterns=None, ignore_patterns=None):
        assert ignore_patterns == ["*/*"]  # of its directories nothing is read
        calls.append((repo, revision))
        assert "*.bin" not in allow_patterns
        if repo != "org/tiny":
            raise OSError(f"no such model:\n{repo}")
        return str(tiny_directory)

    fake = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    hub.snapshot.cache_clear()
    yield calls
    hub.snapshot.cache_clear()


def test_a_name_of_the_hub_is_a_model_downloaded_once(asked, tiny_directory):
    assert load_config("hf:org/tiny") == load_config(tiny_directory)
    about = model_and_hash(Path("hf:org/tiny"))
    assert about == model_and_hash(tiny_directory) | {"name": "tiny"}
    load_config("hf:org/tiny@v1.0")
    assert asked == [("org/tiny", None), ("org/tiny", "v1.0")]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("hf:tiny", "names no model of the hub: give hf:ORG/NAME"),
        ("hf:org/other", "cannot get hf:org/other (OSError: no such model: org/other)"),
    ],
)
def test_what_the_hub_does_not_have_is_one_line(asked, name, says, capsys):
    assert cli.main(["evaluate", "--model", name, "--text", str(TEXT)]) == 2
    printed = capsys.readouterr()
    assert says in printed.err
    assert (printed.out, printed.err.count("\n")) == ("", 1)


def test_without_the_library_one_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    hub.snapshot.cache_clear()
    assert cli.main(["evaluate", "--model", "hf:org/tiny", "--text", str(TEXT)]) == 2
    assert "pip install 'duquantpp_jax[hub]'" in capsys.readouterr().err
