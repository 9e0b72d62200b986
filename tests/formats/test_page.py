"""docs/numerics.md is what its script writes."""

import importlib.util
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_page_is_what_the_script_writes():
    place = ROOT / "experiments" / "numerics_page.py"
    spec = importlib.util.spec_from_file_location("numerics_page", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.page() == (ROOT / "docs" / "numerics.md").read_text()
