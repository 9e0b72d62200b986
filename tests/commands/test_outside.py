"""A transform, a rounding and a format from outside, in every command as a user types it.

What a file names is imported by the user alone, with --import.
"""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from duquantpp_jax import cli
from duquantpp_jax.checkpoints import Quantized, fits, sha256
from duquantpp_jax.checkpoints.compressed_tensors import pack_layer
from duquantpp_jax.commands import ablate, compare
from duquantpp_jax.core import Fitted
from duquantpp_jax.lab import Cell
from duquantpp_jax.models import SITES
from tests import outside_parts
from tests.conftest import TEXT
from tests.transforms.test_adding import NAME, PAGE, example

IMPORT = ("--import", "my_parts")
PARTS = ("--recipe", "my_parts:MIRROR", "--rounding", "my_parts:SHRUNK")


def run(command, *words):
    return cli.main([command, *map(str, words)])


def forget():
    """As in a new process."""
    sys.modules.pop("my_parts", None)


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """A directory of the user's, in PYTHONPATH, with `my_parts` and the page's `my_reflection`."""
    directory = tmp_path_factory.mktemp("elsewhere")
    shutil.copy(Path(outside_parts.__file__), directory / "my_parts.py")
    (directory / "my_reflection.py").write_text(example())
    sys.path.insert(0, str(directory))
    yield directory
    sys.path.remove(str(directory))
    forget()
    sys.modules.pop("my_reflection", None)


@pytest.fixture(scope="module")
def quantized(elsewhere, tiny_directory):
    """The tiny model, quantized by all three."""
    out = elsewhere / "quantized"
    more = ("--formats", "my_parts:GRID", "--rows", 2, "--calibration-text", TEXT)
    assert run("quantize", "--model", tiny_directory, *PARTS, *more, "--out", out) == 0
    forget()
    return out


def commands(quantized, text, out):
    """What reads a quantized directory, as a user types it."""
    few = ("--window", 30, "--tokens", 60)
    return {
        "evaluate": ("--model", quantized, "--text", text, *few, "--out", out / "e.json"),
        "generate": ("--model", quantized, "--prompt", "ab", "--max-new-tokens", 2),
        "inspect": ("--model", quantized, "--text", text, "--tokens", 511, "--out", out / "i"),
        "export": ("--model", quantized, "--format", "dequantized", "--out", out / "d"),
    }


@pytest.mark.parametrize(
    "command",
    [
        "evaluate",
        *(pytest.param(c, marks=pytest.mark.slow) for c in ("generate", "inspect")),
        "export",
    ],
)
def test_a_directory_is_read_once_its_module_is_given_and_imports_nothing_itself(
    command, quantized, tiny_text, tmp_path, capsys
):
    words = commands(quantized, tiny_text, tmp_path)[command]
    forget()
    assert run(command, *words) == 2
    error = capsys.readouterr().err
    assert "my_parts:GRID is not known here: give --import my_parts" in error
    assert error.count("\n") == 1
    assert "my_parts" not in sys.modules
    assert run(command, *words, *IMPORT) == 0
    assert capsys.readouterr().out


def test_a_format_that_a_file_names_imports_nothing_either(quantized):
    forget()
    with pytest.raises(ValueError, match="my_parts:GRID is not known here: give --import my_parts"):
        Quantized(quantized).plan.check()
    assert "my_parts" not in sys.modules


def test_what_is_written_is_what_the_parts_say(quantized, elsewhere):
    import my_parts  # type: ignore[import-not-found]

    model = Quantized(quantized)
    _, sites = model.layer(1)
    job = model.job
    assert (job.recipe, job.rounding) == ("my_parts:MIRROR", "my_parts:SHRUNK")
    assert set(job.weight_formats.values()) == {"my_parts:GRID"}
    assert dict(model.plan.formats)["mlp_in"] == my_parts.GRID
    for site in SITES:
        assert type(sites[site].transform) is my_parts.Mirror
        for weight in sites[site].weights:
            assert weight.element == my_parts.GRID.element
            w = weight.dequantize()
            again = my_parts.SHRUNK(w / my_parts.SHRUNK.by, my_parts.GRID, None)
            np.testing.assert_array_equal(again.dequantize(), w)


@pytest.mark.slow
def test_compare_and_ablate_measure_them(elsewhere, tiny_directory, tiny_text, monkeypatch):
    monkeypatch.setattr(compare, "CALIBRATION_ROWS", 2)
    (command,) = re.findall(r"PYTHONPATH=. duquantpp compare (.*)", PAGE)
    parts = (*command.split(), "--rounding", "my_parts:SHRUNK")
    given = ("--model", tiny_directory, "--text", tiny_text, "--calibration-text", tiny_text)
    out = elsewhere / "compared"
    more = ("--tokens", 511, "--formats", "my_parts:GRID", "--out", out)
    assert run("compare", *parts, *given, *more) == 0
    entries = json.loads((out / "results.json").read_text())["entries"]
    assert [(e["row"], e["column"]) for e in entries] == [
        ("block_hadamard", "my_parts:GRID"),
        (NAME, "my_parts:GRID"),
    ]
    assert entries[0]["kl"]["value"] != entries[1]["kl"]["value"]
    import my_parts  # type: ignore[import-not-found]

    cell = Cell("my_parts:MIRROR", rounding="my_parts:SHRUNK")
    (cell,) = ablate.grid([cell], ablate.AblateOptions(formats=("my_parts:GRID",)))
    method = cell.method()
    assert (method.fit, method.rounding) == (my_parts.MIRROR, my_parts.SHRUNK)
    assert method.weight_format == method.activation_format == my_parts.GRID


def test_fits_of_a_module_are_read_once_it_is_given(
    elsewhere, quantized, tiny_directory, tmp_path, capsys
):
    import my_parts  # type: ignore[import-not-found]

    widths = {"attention_in": 64, "attention_out": 64, "mlp_in": 64, "mlp_out": 96}
    mirrors = {
        site: Fitted(my_parts.Mirror(np.full((2, width), width**-0.5, np.float32)))
        for site, width in widths.items()
    }
    about = {"model": {"name": "tiny", "sha256": sha256(tiny_directory)}}
    about |= {"formats": {"weight": "mxfp4:floor", "activation": "mxfp4:floor"}}
    fits.save_fits(tmp_path / "fits", mirrors, about)
    words = ("--model", tiny_directory, "--fits", tmp_path / "fits", "--rows", 2)
    words = (*words, "--calibration-text", TEXT, "--out", tmp_path / "q")
    del my_parts
    forget()
    assert run("quantize", *words) == 2
    assert "give --import my_parts" in capsys.readouterr().err
    assert run("quantize", *words, *IMPORT) == 0
    sites = Quantized(tmp_path / "q").layer(0)[1]
    np.testing.assert_allclose(sites["mlp_in"].transform.v, 0.125)
    with pytest.raises(ValueError, match=r"attention_in: .*by Mirror, whose as_blocks gives no"):
        pack_layer(Quantized(quantized).config, 0, {}, sites)


def test_a_module_that_cannot_be_imported_is_one_line(capsys):
    assert run("export", "--model", "nowhere", "--import", "nowhere.at_all") == 2
    error = capsys.readouterr().err
    assert "--import nowhere.at_all: cannot import nowhere.at_all (ModuleNotFoundError" in error
    assert error.count("\n") == 1
