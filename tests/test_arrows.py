"""The rooms import one way only, and no file is a drawer of odds and ends."""

import ast
from pathlib import Path

import pytest

import duquantpp_jax

PACKAGE = Path(duquantpp_jax.__file__).parent

MAY_IMPORT = {
    "core": set(),
    "files": set(),
    "formats": {"core", "files"},
    "transforms": {"core", "files", "formats"},
    "rounding": {"core", "formats", "transforms"},
    "recipes": {"core", "formats", "transforms", "rounding", "learning"},
    "ptq": {"core", "formats", "transforms", "rounding"},
    "fuse": {"core", "transforms", "models"},
    "kernels": {"core", "files", "formats", "transforms"},
    "models": {"core", "files"},
    "calibration": {"core", "ptq", "models"},
    "layerwise": {"core", "transforms", "ptq", "models", "calibration"},
    "quantized": {
        *("core", "files", "formats", "transforms", "recipes", "ptq", "models", "layerwise"),
    },
    "estimate": {"core", "ptq", "models", "calibration", "layerwise"},
    "report": set(),
    "quantize": {
        *("files", "models", "evaluation", "subject", "recipes", "layerwise", "quantized"),
        "estimate",
    },
    "export": {
        *("core", "files", "formats", "transforms", "ptq", "models", "layerwise", "quantize"),
        "quantized",
    },
    "learning": {"core", "files", "formats", "transforms", "ptq", "models"},
    "asymmetric": {"core", "formats", "rounding", "ptq", "models"},
    "evaluation": {"core", "ptq", "models"},
    "loading": {"models", "quantized"},
    "cache": {"core", "formats", "transforms", "recipes", "models"},
    "subject": {"files", "models", "evaluation"},
    "evaluate": {"files", "cache", "evaluation", "loading", "models", "recipes", "subject"},
    "generation": {"models"},
    "inspection": {
        *("core", "files", "models", "ptq", "layerwise", "quantized", "loading", "evaluation"),
        *("analysis", "subject"),
    },
    "generate": {"cache", "evaluate", "generation", "loading", "models"},
    "analysis": {"core", "formats", "transforms", "ptq", "models", "evaluation"},
    "ablation": {
        *("core", "files", "formats", "transforms", "rounding", "recipes", "ptq", "models"),
        *("calibration", "evaluation", "subject", "analysis"),
    },
}
"""Room -> rooms it may import. `compare`, `cli` and the package itself may import all."""


def _imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are written out in full"
            yield from (f"{node.module}.{name.name}" for name in node.names)


def _room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.name)
def test_arrows_point_one_way(path):
    room = _room(path)
    if room not in MAY_IMPORT:
        assert room in {"__init__", "compare", "cli"}, f"{room} is a new room: give it its arrows"
        return
    for name in _imports(path):
        parts = name.split(".")
        if parts[0] == "duquantpp_jax" and len(parts) > 1:
            other = parts[1]
            # What the package re-exports comes from core and formats.
            other = "core" if not (PACKAGE / other).exists() and other[0].isupper() else other
            allowed = MAY_IMPORT[room] | {room}
            assert other in allowed, f"{path.name} in {room} imports {name}"


def test_there_is_no_drawer_of_odds_and_ends():
    assert not list(PACKAGE.rglob("util*.py")) + list(PACKAGE.rglob("helper*.py"))


def test_nothing_is_unpickled_or_evaluated():
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert not {"pickle", "marshal", "dill"} & {n.split(".")[0] for n in _imports(path)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in {"eval", "exec"}, path
