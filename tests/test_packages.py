"""What the package and its rooms export is there, is documented, and weighs nothing until asked."""

import importlib
import pathlib
import pkgutil
import re
import tomllib

import pytest

import duquantpp_jax

ROOT = pathlib.Path(__file__).parents[1]
ROOMS = ("core", "formats", "transforms", "rounding", "learning", "models", "checkpoints", "ptq")
ROOMS += ("evaluation", "lab", "kernels")


@pytest.mark.parametrize("room", ["", *ROOMS])
def test_every_exported_name_imports_and_has_a_docstring(room):
    package = importlib.import_module(f"duquantpp_jax.{room}".rstrip("."))
    assert package.__doc__
    assert sorted(set(package.__all__)) == sorted(package.__all__)
    files = {module.name for module in pkgutil.iter_modules(package.__path__)}
    for name in package.__all__:
        value = getattr(package, name)
        if getattr(value, "__module__", "").startswith("duquantpp_jax"):  # a class or a function
            assert value.__doc__, name
        # A kernel is a folder, or a file, of its function's name.
        assert name not in files or room == "kernels", f"{name} hides the file of that name"


def test_what_is_no_export_is_no_attribute():
    for package in (duquantpp_jax, importlib.import_module("duquantpp_jax.learning")):
        with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
            _ = package.nothing
    assert set(duquantpp_jax.__all__) <= set(dir(duquantpp_jax))


def test_ci_tests_the_lowest_versions_that_are_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    lines = (ROOT / ".ci/constraints-3.11.txt").read_text().splitlines()
    locked = dict(line.split("==") for line in lines)
    for needed in declared:
        name, least = re.match(r"([\w.-]+)(?:\[\w+\])?>=([\w.]+)", needed).groups()
        assert re.fullmatch(rf"{re.escape(least)}(\.0)*", locked[name.lower()]), needed
