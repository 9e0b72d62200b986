"""Short forms of experiments/torture, and what they have found: spoilt files are refused."""

import itertools
import json
import re
import socket
import tomllib
from pathlib import Path

import numpy as np
import pytest

from duquantpp_jax import files
from duquantpp_jax.checkpoints import fits
from duquantpp_jax.checkpoints.shards import shard_files
from duquantpp_jax.learning import state
from experiments.torture import fuzz, page

ROOT = Path(__file__).parents[1]

CHEAP = ["config.json", "config.json of families", "safetensors", "tokenizer.json", "records"]
CHEAP += ["texts", "requests", "claims", "rows of a model"]


def test_readers_only_return_or_refuse_spoilt_files_in_one_line(tmp_path):
    counts, findings = fuzz.fuzz(fuzz.readers(tmp_path, CHEAP), 500, seconds=2, seed=7)
    assert findings == []
    assert all(count["read"] + count["refused"] >= 5 for count in counts.values())
    assert sum(count["refused"] for count in counts.values()) > 100


@pytest.mark.parametrize("name", ["x" * 300, "\ud800", "\x1b[2J", "\0"])
def test_an_index_that_names_what_no_file_can_be_called_is_refused(name, tmp_path):
    index = {"weight_map": {"a": name}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index\.json names"):
        shard_files(tmp_path)


FITS = {"schema": 1, "model": {"name": "m", "sha256": "0"}, "sha256": "1"}
FITS["formats"] = {"weight": "mxfp4:floor", "activation": "mxfp4:floor"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": 3}, r"has no model\.name"),
        ({"formats": {"weight": 1, "activation": ""}}, r"has formats\.weight 1, of another kind"),
        ({"formats": {"weight": "mxfp4"}}, r"has no formats\.activation"),
    ],
)
def test_fits_json_with_other_fields_is_refused(change, says, tmp_path):
    (tmp_path / fits.ABOUT).write_text(json.dumps(FITS | change))
    with pytest.raises(ValueError, match=rf"fits\.json .*{says}.*learn the fits again") as caught:
        fits.read_about(tmp_path, "0")
    assert "\n" not in str(caught.value)


def test_a_hash_of_control_characters_is_said_and_not_obeyed(tmp_path):
    path = tmp_path / "a.safetensors"
    files.write_tensors(path, {"a": np.zeros(2)}, {})
    tensors, about = files.read_tensors(path, "make it again")
    files.save(path, tensors, {files.ABOUT: json.dumps(about | {"sha256": "\x1b[2J\n"})})
    with pytest.raises(ValueError, match=r"says '\\x1b\[2J\\n': make it again"):
        files.read_tensors(path, "make it again")


def test_a_network_is_refused_to_tests_and_so_to_every_command_they_run():
    with socket.socket() as own:
        for ask in (
            lambda: socket.create_connection(("127.0.0.1", 9)),
            lambda: socket.getaddrinfo("localhost", 80),
            lambda: own.bind(("127.0.0.1", 0)),
            lambda: own.connect(("127.0.0.1", 9)),
        ):
            with pytest.raises(AssertionError, match="a network is asked for"):
                ask()


def test_the_licence_of_every_dependency_is_named():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lists = project["dependencies"], *project["optional-dependencies"].values()
    wanted = {re.split(r"[^\w-]", line)[0] for line in itertools.chain(*lists)}
    section = (ROOT / "SECURITY.md").read_text(encoding="utf-8").split("## Dependencies")[1]
    rows = re.findall(r"^\| ([\w, -]+) \|", section, re.MULTILINE)[1:]
    assert {name for row in rows for name in row.split(", ") if name.strip("- ")} == wanted


def test_the_page_of_reliability_is_that_of_the_last_results():
    assert page.PAGE.read_text(encoding="utf-8") == page.page()


def test_the_tests_that_the_security_page_names_are_there():
    pages = [(ROOT / name).read_text(encoding="utf-8") for name in ("SECURITY.md",)]
    named = re.findall(r"`((?:tests|experiments)/[\w./]+)`", "".join(pages))
    assert len(named) > 10
    assert [name for name in (*named, *page.TESTS.values()) if not (ROOT / name).exists()] == []


def test_a_state_of_another_objective_is_said_in_one_line(tmp_path):
    state.save(tmp_path / "s", {"a": np.zeros(2)}, 1.0, [], {"objective": "\x1b[2J\n"})
    with pytest.raises(ValueError, match=r"another objective \(\\x1b\[2J, not x\)"):
        state.load(tmp_path / "s", {"a": np.zeros(2)}, {"objective": "x"})
