"""The rooms import one way only, and no file is a drawer of odds and ends."""

import ast
from pathlib import Path

import pytest

import duquantpp_jax

PACKAGE = Path(duquantpp_jax.__file__).parent

FLOORS = (
    "core files commands.options",
    "formats",
    "transforms models",
    "rounding kernels",
    "learning.straight_through learning.moves learning.training learning.state learning.site "
    "learning.callbacks learning.sharing",
    "recipes",
    "ptq",
    "checkpoints",
    "evaluation",
    "interop",
    "learning",
    "analysis",
    "lab",
    "commands",
    "cli",
    "__main__",
)
"""From the ground up: an arrow points to the same room or to a lower floor. A file that is named
alone stands on that floor, and not on its room's."""


def _imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are written out in full"
            yield from (f"{node.module}.{name.name}" for name in node.names)


def _modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        yield path, name.removesuffix(".__init__")


def _place(module):
    """Floor and room of a module, by the longest name that says where it stands."""
    names = {name: floor for floor, line in enumerate(FLOORS) for name in line.split()}
    parts = module.split(".")
    for length in (2, 1):
        if (name := ".".join(parts[:length])) in names:
            return names[name], parts[0]
    raise AssertionError(f"{module} stands on no floor: give it one in FLOORS")


@pytest.mark.parametrize(("path", "module"), [*_modules()], ids=lambda p: str(p)[-40:])
def test_arrows_point_down(path, module):
    if module == "__init__":
        return
    floor, room = _place(module)
    if path.name == "__init__.py":  # which whatever imports a file of the room imports first
        floor = min(
            _place(other)[0] for _, other in _modules() if f"{other}.".startswith(f"{module}.")
        )
    for name in _imports(path):
        inside = name.removeprefix("duquantpp_jax.")
        first = PACKAGE / inside.split(".")[0]
        if inside == name or not (first.is_dir() or first.with_suffix(".py").is_file()):
            continue  # another package, or a name that the package itself exports
        other_floor, other_room = _place(inside)
        fine = other_floor < floor or (other_floor == floor and other_room == room)
        assert fine, f"{module} on floor {floor} imports {inside}, on floor {other_floor}"


def test_the_house_has_few_rooms_and_no_two_of_one_name():
    entries = {path.stem for path in PACKAGE.iterdir() if path.is_dir() or path.suffix == ".py"}
    entries -= {"__init__", "__main__", "__pycache__"}
    assert len(entries) <= 17
    endings = ("ion", "ions", "ing", "ed", "e", "s", "es", "or", "er")
    stems = {entry: min((entry.removesuffix(end) for end in endings), key=len) for entry in entries}
    assert len(set(stems.values())) == len(stems), sorted(stems)


ENDINGS = (
    "able",
    "e",
    "ed",
    "er",
    "ers",
    "es",
    "ing",
    "ings",
    "ion",
    "ions",
    "ment",
    "or",
    "ors",
    "s",
)


def _stem(name):
    cut = (name.removesuffix(end) for end in ENDINGS if len(name) - len(end) >= 3)
    return min((name, *cut), key=len)


def _names():
    """Names that must be told apart: files and rooms beside one another, functions, classes."""
    for path, module in _modules():
        parent, _, name = module.rpartition(".")
        yield f"beside each other in {parent or 'the package'}", name
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                yield type(node).__name__, node.name


def test_no_two_public_names_differ_only_by_an_ending():
    stems = {}
    for kind, name in _names():
        stems.setdefault((kind, _stem(name)), set()).add(name)
    assert [names for names in stems.values() if len(names) > 1] == []


def test_nothing_is_called_by_a_word_that_says_nothing():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = getattr(node, "name", getattr(node, "arg", getattr(node, "id", None)))
            assert name not in {"one", "held", "it", "that"}, f"{path}: {name}"


def test_files_are_short_enough_to_be_read():
    paths = [*(path for path, _ in _modules()), *Path(__file__).parent.rglob("*.py")]
    lengths = {str(path): len(path.read_text("utf-8").splitlines()) for path in paths}
    assert {name: length for name, length in lengths.items() if length > 350} == {}


def test_there_is_no_drawer_of_odds_and_ends():
    assert not list(PACKAGE.rglob("util*.py")) + list(PACKAGE.rglob("helper*.py"))


def test_nothing_is_unpickled_or_evaluated():
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert not {"pickle", "marshal", "dill"} & {n.split(".")[0] for n in _imports(path)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in {"eval", "exec"}, path
