"""Which files does an activation pass on its way to a code, a weight to a byte, a name to a matrix?

Question: can a newcomer follow each of the three through the package?
Method: runs `compare` and `quantize` on the embedded model, and where the code, the byte or the
matrix is made reads from the call stack which functions of the package are under way. Left out are
cli.py and progress.py, which start every command, and core/, which defines what is passed on.
Command: `python -m experiments.architecture` prints the walks and draws docs/architecture.png.
Cost: half a minute on 2 CPU cores.
Last result: docs/architecture.md, which a test holds against a run.
"""

import contextlib
import inspect
import io
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import jax
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

import duquantpp_jax
from duquantpp_jax import files, recipes
from duquantpp_jax.cli import main as command
from duquantpp_jax.commands import compare as comparing
from duquantpp_jax.formats import mx, tensors
from duquantpp_jax.transforms import wush

PACKAGE = Path(duquantpp_jax.__file__).parent
PICTURE = PACKAGE.parent / "docs" / "architecture.png"
LEFT_OUT = ("cli.py", "commands/progress.py", "core")

Step = tuple[str, str]
"""A file of the package, and the function of it that is under way."""


def under_way(last: Callable[..., Any]) -> list[Step]:
    """The files on the call stack, outermost first, with their innermost functions; then `last`."""
    steps: dict[str, str] = {}
    frame, code = sys._getframe(2), inspect.unwrap(last).__code__
    while code is not None:
        path = Path(code.co_filename)
        if path.is_relative_to(PACKAGE):
            file = path.relative_to(PACKAGE)
            if not {file.parts[0], file.as_posix()} & {*LEFT_OUT}:
                steps.setdefault(file.as_posix(), code.co_qualname.split(".<")[0])
        code, frame = (frame.f_code, frame.f_back) if frame else (None, None)
    return list(steps.items())[::-1]


def traced(arguments: str, **ends: ModuleType) -> dict[str, list[list[Step]]]:
    """Runs a command; the walks that lead to each end, in the order in which they are taken.

    Args:
      arguments: Of the command, without --out.
      ends: By its name the function at which walks end, as the module knows it.
    """
    walks: dict[str, list[list[Step]]] = {name: [] for name in ends}

    def noted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def note(*args: Any, **kwargs: Any) -> Any:
            walks[name].append(under_way(function))
            return function(*args, **kwargs)

        return note

    jax.clear_caches()  # what has been compiled is not walked through
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(mock.patch.object(comparing, "CALIBRATION_ROWS", 1))
        for name, module in ends.items():
            function = noted(name, getattr(module, name))
            stack.enter_context(mock.patch.object(module, name, function))
        if code := command([*arguments.split(), "--out", f"{out}/out"]):
            raise ValueError(f"duquantpp {arguments} ended with exit code {code}")
    return walks


def walks() -> dict[str, list[Step]]:
    """The three walks, by what is followed."""
    compare = traced("compare --recipes wush --formats even --tokens 511", encode=mx)
    activation = next(walk for walk in compare["encode"] if "evaluation/predict.py" in dict(walk))
    found = traced(
        "quantize --recipe wush --rows 1",
        encode=mx,
        _packed=tensors,
        wush=wush,
        find_fit=recipes,
    )
    code = next(walk for walk in found["encode"] if "ptq/walk.py" in dict(walk))
    return {
        "an activation, from compare to its code": activation,
        "a weight, from quantize to its packed byte": _joined(code, found["_packed"][0]),
        "a recipe's name, from quantize to its matrix": _joined(
            found["find_fit"][0], found["wush"][0]
        ),
    }


def _joined(*parts: list[Step]) -> list[Step]:
    """Walks of one command as one; a file that several of them pass stands where it is first."""
    steps: dict[str, str] = {}
    for part in parts:
        for file, name in part:
            steps.setdefault(file, name)
    return list(steps.items())


def page(found: dict[str, list[Step]]) -> str:
    """The walks as Markdown: where each begins, and the files that it passes."""
    lines = []
    for what, ((file, name), *passed) in found.items():
        lines.append(f"{what[0].upper()}{what[1:]}: from `{name}` in `{file}` through\n")
        lines += [f"{n}. `{file}`: `{name}`" for n, (file, name) in enumerate(passed, 1)]
        lines.append("")
    return "\n".join(lines).rstrip()


def picture(found: dict[str, list[Step]]) -> Figure:
    """A row for each walk: a box for each file, the room above its name, the function below."""
    columns = max(map(len, found.values()))
    figure = Figure(figsize=(1.75 * columns, 1.5 * len(found)), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(-0.6, columns - 0.4), ylim=(len(found) - 0.3, -0.75))
    axes.axis("off")
    rooms = list(dict.fromkeys(file.split("/")[0] for steps in found.values() for file, _ in steps))
    for row, (what, steps) in enumerate(found.items()):
        axes.text(-0.5, row - 0.52, what, fontsize=10, fontweight="bold", va="center")
        for column, (file, name) in enumerate(steps):
            room, _, rest = file.rpartition("/")
            axes.text(
                column,
                row,
                f"{room or 'duquantpp_jax'}/\n{rest}\n{name}",
                ha="center",
                va="center",
                fontsize=7.5,
                linespacing=1.5,
                bbox={
                    "boxstyle": "round,pad=0.5",
                    "facecolor": to_rgba(f"C{rooms.index(file.split('/')[0])}", 0.15),
                    "edgecolor": "0.5",
                },
            )
            if column:
                axes.annotate(
                    "",
                    (column - 0.42, row),
                    (column - 0.58, row),
                    arrowprops={"arrowstyle": "->", "color": "0.3"},
                )
    return figure


def main() -> None:
    found = walks()
    print(page(found))
    with files.whole(PICTURE) as temporary:
        picture(found).savefig(temporary, format="png", dpi=110)


if __name__ == "__main__":
    main()
