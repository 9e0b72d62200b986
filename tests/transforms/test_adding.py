"""A transform from outside the package, as docs/adding_a_transform.md has it, works as it says."""

import importlib
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duquantpp_jax import cli
from duquantpp_jax.commands.options import LearnSettings
from duquantpp_jax.core import Fitted
from duquantpp_jax.learning.named import check_settings
from duquantpp_jax.learning.site import start_of
from duquantpp_jax.recipes import FITS, find_fit, recipe
from duquantpp_jax.transforms import storage
from experiments.health import health
from tests.conftest import stats_of

PAGE = (Path(__file__).parents[2] / "docs/adding_a_transform.md").read_text(encoding="utf-8")
NAME = "my_reflection:REFLECTION"


def example():
    """The page's module."""
    (text,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    return text


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """The directory with the page's module in it, importable until the test is over."""
    (tmp_path / "my_reflection.py").write_text(example())
    (tmp_path / "broken_module.py").write_text("raise RuntimeError('two\\nlines')\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("my_reflection", None)


def _fitted():
    x = jax.random.normal(jax.random.key(0), (2, 16, 64)).at[..., 5].multiply(40.0)
    weights = (jax.random.normal(jax.random.key(1), (8, 64)),)
    method = recipe(NAME, "floor")
    return x, method.fit(weights, stats_of(x), method, jax.random.key(2)).transform


def test_the_pages_transform_keeps_the_law_and_spreads_the_outlier(outside):
    x, transform = _fitted()
    found = health(transform, 64)
    assert found.orthogonality_error < 1e-6
    assert found.law_error < 1e-6
    assert transform.cost(64).multiply_adds == 2
    peak = lambda x: float(jnp.max(jnp.abs(x)))  # noqa: E731
    assert peak(transform.activations(x)) < 0.3 * peak(x)


def test_the_pages_transform_is_stored_and_found_again_once_imported(outside):
    _, transform = _fitted()
    storage.save(outside / "t.safetensors", {"site": transform})
    loaded = storage.load(outside / "t.safetensors")["site"]
    np.testing.assert_array_equal(loaded.v, transform.v)
    assert type(loaded) is type(transform)
    assert '"my_reflection:Reflection"' in storage.to_arrays(transform)[1]


def test_learning_starts_from_the_pages_transform(outside):
    x, transform = _fitted()
    check_settings(LearnSettings(start=NAME))
    start = start_of(Fitted(transform), 64, 32)
    np.testing.assert_allclose(start.activations(x), transform.activations(x), atol=1e-4)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nowhere.at_all:FIT", "cannot import nowhere.at_all (ModuleNotFoundError"),
        ("my_reflection:OTHER", "module my_reflection has no fit OTHER"),
        ("my_reflection:PI", "module my_reflection has no fit PI"),
        ("broken_module:FIT", "cannot import broken_module (RuntimeError: two lines)"),
        ("my_reflection:FitReflection", "'my_reflection:FitReflection' does not say what it needs"),
        ("my_reflection:needless", "give it an attribute needs = Needs.NOTHING"),
        (":FIT", "cannot import"),
        ("my_reflection:", "module my_reflection has no fit"),
    ],
)
def test_a_name_that_leads_nowhere_is_one_line(outside, capsys, name, says):
    module = importlib.import_module("my_reflection")
    module.PI, module.needless = 3.14, lambda *arguments: None
    assert cli.main(["compare", "--recipes", name, "--out", str(outside / "out")]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_the_page_names_files_that_exist():
    root = Path(__file__).parents[2]
    for name in re.findall(r"`((?:duquantpp_jax|tests|experiments)/[\w./]+)`", PAGE):
        assert (root / name).exists(), name


def test_a_fit_inside_is_found_by_its_name_or_alias():
    assert find_fit("wush") is FITS["wush"]
    assert find_fit("identity") is FITS["rtn"]
