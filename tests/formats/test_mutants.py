"""The errors that experiments/mutants.py plants can still be planted."""

import importlib.util
import pathlib
import sys

PLACE = pathlib.Path(__file__).resolve().parents[2] / "experiments" / "mutants.py"


def test_every_mutant_changes_one_place_of_the_package(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("mutants", PLACE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "mutants", module)
    spec.loader.exec_module(module)
    assert len({m.name for m in module.MUTANTS}) == len(module.MUTANTS) >= 20
    for mutant in module.MUTANTS:
        text = (module.ROOT / module.PACKAGE / mutant.file).read_text()
        assert text.count(mutant.right) == 1, mutant.name
        assert mutant.wrong != mutant.right
        for name in mutant.tests.split():
            assert (module.ROOT / "tests" / "formats" / f"{name}.py").exists()
