"""CONTRIBUTING.md names files that exist, and its one line is enough for a format or a rounding."""

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duquantpp_jax import cli, recipes
from duquantpp_jax.core import Element, Format, MXArray, Needs, Transform
from duquantpp_jax.formats import MXFP4
from duquantpp_jax.formats.elements import E2M1
from duquantpp_jax.ptq.site import fit_linear, quantize_linear
from tests import conftest
from tests.conftest import stats_of

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
ADDED = ("A format", "A transform", "A rounding", "A family of models", "A kernel", "An experiment")


def test_each_addition_names_its_files_and_its_test():
    assert (*ADDED, "Tests") == tuple(SECTIONS)
    for name in ADDED:
        files = re.findall(r"`((?:duquantpp_jax|tests|experiments)/[\w./]+)`", SECTIONS[name])
        assert len(files) >= 3
        assert any(file.startswith("tests/") for file in files), name
        assert [file for file in files if not (ROOT / file).is_file()] == []


def test_the_commands_that_it_names_take_modules_and_a_transform_has_the_methods():
    (line,) = re.findall(r"is read by (.*?) with `--import MODULE`", PAGE)
    for name in re.findall(r"`(\w+)`", line):
        options = cli.COMMANDS[name]
        assert "imports" in {field.name for field in dataclasses.fields(options)}, name
    for name in re.findall(
        r"`(\w+)(?:\([\w, ]*\))?`", SECTIONS["A transform"].split("class of")[-1]
    ):
        assert hasattr(Transform, name) or name == "Transform", name


def test_every_link_and_table_leads_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert (ROOT / target).exists(), target
    tables = {"FORMATS": recipes, "FITS": recipes, "ROUNDINGS": recipes}
    for name, module in tables.items():
        assert f"one line in `{name}`" in PAGE
        assert isinstance(getattr(module, name), dict)


@pytest.mark.parametrize("order", [1, -1])
def test_the_parts_have_every_test_once_and_each_file_whole(order):
    files = [Path(f"tests/{letter}.py") for letter in "abcdefghijklmnopq"]
    items = [SimpleNamespace(path=path, name=name) for path in files for name in "xyz"][::order]
    kept, left = [], []
    for part in range(16):
        hook = SimpleNamespace(pytest_deselected=lambda items: left.append(items))
        config = SimpleNamespace(getoption={"sixteenth": part}.__getitem__, hook=hook)
        kept.append(items.copy())
        conftest.pytest_collection_modifyitems(config, kept[-1])
    assert kept == [
        [i for i in items if i.path.stem in part] for part in ("aq", *"bcdefghijklmnop")
    ]
    assert left == [[i for i in items if i not in mine] for mine in kept]


def test_files_with_slow_tests_go_first_and_stay_whole():
    marks = {"a": [0, 0], "b": [0, 1], "c": [0], "d": [1]}
    items = [
        SimpleNamespace(path=path, get_closest_marker=lambda _, mark=mark: mark or None)
        for path, of_path in marks.items()
        for mark in of_path
    ]
    conftest.pytest_collection_modifyitems(SimpleNamespace(getoption=lambda _: None), items)
    assert "".join(item.path for item in items) == "bbdaac"


@dataclasses.dataclass(frozen=True)
class Halved(Format):
    """MXFP4 of half of x."""

    block_size: int = 32
    element: Element = E2M1

    def encode(self, x, **options) -> MXArray:
        return MXFP4().encode(jnp.asarray(x) / 2, **options)


@dataclasses.dataclass(frozen=True)
class Zero:
    """Every weight becomes zero."""

    needs = Needs.NOTHING

    def __call__(self, w, format, stats) -> MXArray:
        return format.quantize(jnp.zeros_like(w))


@pytest.mark.parametrize(("rounding", "halves"), [("rtn", True), ("toy", False)])
def test_a_line_in_the_table_is_enough_for_a_format_and_a_rounding(rounding, halves, monkeypatch):
    monkeypatch.setitem(recipes.FORMATS, "halved", Halved())
    monkeypatch.setitem(recipes.ROUNDINGS, "toy", Zero())
    w = jax.random.normal(jax.random.key(0), (8, 32))
    stats = stats_of(jax.random.normal(jax.random.key(1), (1, 16, 32)))
    method = recipes.recipe("block_hadamard", "halved", rounding)
    fitted = fit_linear(method, (w,), stats, jax.random.key(2))
    (found,) = quantize_linear(method, (w,), stats, fitted).weights
    half = MXFP4().quantize(fitted.transform.weights(w) / 2).dequantize()
    np.testing.assert_array_equal(found.dequantize(), half if halves else np.zeros_like(half))
    assert recipes.format_name(Halved()) == "halved"
