"""Every call of the reference has an example, and every example gives what it says.

The rooms are those of the site's reference (.mkdocs.yml). A function's example is in its own
docstring; a class or format may stand in that of its room instead.
"""

import doctest
import importlib
import inspect
import re
from pathlib import Path

import jaxtyping
import pytest

import duquantpp_jax
from duquantpp_jax import cli
from duquantpp_jax.core import Format, Rounding
from tests.conftest import TEXT

SITE = (Path(__file__).parents[1] / ".mkdocs.yml").read_text(encoding="utf-8")
ROOMS = re.findall(r"^ +- reference/(\w+)\.md$", SITE, re.MULTILINE)
WITHOUT = {
    *("Blocks", "Channels", "Cost", "Exact", "QuantizedSite", "ModuleReport", "Estimate"),
    *("Trained", "Cache", "Outcome", "Rows"),  # what calls return, in whose examples they are
    *("Fit", "Rounding", "Transform", "Format", "Store"),  # to write new ones: CONTRIBUTING.md
    *("Element", "ElementRounding", "Job"),  # the parts of formats, and of a file
    *("RandomKey", "LearningLinear"),  # an annotation, and what `train` calls
}
"""Classes without an example of their own, and why."""


def _exported(room):
    """What the site's reference shows of a room, by name."""
    module = importlib.import_module(f"duquantpp_jax.{room}")
    own = [n for n, v in vars(module).items() if getattr(v, "__module__", "") == module.__name__]
    names = getattr(module, "__all__", None) or [name for name in own if not name.startswith("_")]
    return module, {name: getattr(module, name) for name in names}


def _ours(value):
    return inspect.isfunction(value) and value.__module__.startswith("duquantpp_jax")


def _examples(room):
    """The examples of a room: its own, and those of its functions, classes and their methods."""
    module, names = _exported(room)
    found = [(room, module)]
    for name, value in names.items():
        if inspect.isclass(value) or callable(value):
            found.append((name, value))
        if inspect.isclass(value):
            found += [(f"{name}.{n}", v) for n, v in vars(value).items() if _ours(v)]
    finder = doctest.DocTestFinder(recurse=False)
    for name, value in found:
        globs = dict(vars(inspect.getmodule(value) or module)) | names
        yield from (test for test in finder.find(value, name, False, globs) if test.examples)


EXAMPLES = {f"{room}.{test.name}": test for room in ROOMS for test in _examples(room)}


@pytest.fixture(scope="module")
def quantized(tiny_directory, tiny_text, tmp_path_factory):
    """A directory with a model, a text, and what `duquantpp quantize --out quantized` wrote."""
    place = tmp_path_factory.mktemp("examples")
    (place / "model").symlink_to(tiny_directory)
    (place / "text.txt").symlink_to(tiny_text)
    given = ["--model", str(tiny_directory), "--calibration-text", str(TEXT), "--rows", "4"]
    assert cli.main(["quantize", *given, "--out", str(place / "quantized")]) == 0
    return place


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_gives_what_it_says(name, quantized, monkeypatch, capsys):
    monkeypatch.chdir(quantized)
    # Checks of these tests come before values are made what is declared.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    failed = doctest.DocTestRunner().run(EXAMPLES[name]).failed
    assert not failed, capsys.readouterr().out


@pytest.mark.parametrize("room", ROOMS)
def test_every_call_has_an_example(room):
    examples = list(_examples(room))
    lines = "".join(example.source for test in examples for example in test.examples)
    for name, value in _exported(room)[1].items():
        if inspect.isfunction(value) or hasattr(value, "__wrapped__"):
            assert name in {test.name for test in examples}, f"{name}: give it an example"
        elif inspect.isclass(value) or isinstance(value, Format | Rounding):
            assert name in WITHOUT or re.search(rf"\b{name}\b", lines), f"{name}: in no example"


def test_the_calls_of_the_package_are_in_the_reference():
    shown = {name for room in ROOMS for name in _exported(room)[1]}
    assert set(duquantpp_jax.__all__) - shown == {"FITS", "FORMATS", "ROUNDINGS"}
    assert len(EXAMPLES) > 50
