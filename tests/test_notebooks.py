"""Each notebook is a pair in step, was run, and has the numbers of the command line."""

import json
import re
from pathlib import Path

import pytest

from duquantpp_jax import cli

PLACE = Path(__file__).parent.parent / "notebooks"
SOURCES = sorted(PLACE.glob("[0-9]*.py"))
CLOSE = 1e-3
"""How far KL at 4,088 targets may be from that of another machine or library, under floor."""


def cells_of(source: Path) -> list[tuple[str, str]]:
    """Kind and text of the cells of a percent file."""
    cells = []
    for part in re.split(r"^# %%", source.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        head, _, body = part.partition("\n")
        kind = "markdown" if "[markdown]" in head else "code"
        lines = body.strip("\n").split("\n")
        if kind == "markdown":
            lines = [line.removeprefix("#").removeprefix(" ") for line in lines]
        # Magics are commented out in the percent file.
        text = "\n".join(re.sub(r"^# (%\w)", r"\1", line) for line in lines)
        cells.append((kind, text.strip("\n")))
    return cells


def notebook_of(source: Path) -> dict:
    return json.loads(source.with_suffix(".ipynb").read_text(encoding="utf-8"))


def printed(source: Path) -> str:
    cells = notebook_of(source)["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    return "".join("".join(output.get("text", "")) for output in outputs)


def test_there_are_eight():
    assert [source.name[:2] for source in SOURCES] == [f"0{n}" for n in range(1, 9)]


@pytest.mark.parametrize("source", SOURCES, ids=lambda s: s.stem)
def test_a_pair_has_the_same_cells(source):
    notebook = [
        (cell["cell_type"], "".join(cell["source"])) for cell in notebook_of(source)["cells"]
    ]
    assert notebook == cells_of(source)


@pytest.mark.parametrize("source", SOURCES, ids=lambda s: s.stem)
def test_every_cell_was_run_in_order_and_raised_nothing(source):
    code = [cell for cell in notebook_of(source)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    kinds = {output["output_type"] for output in outputs}
    assert kinds <= {"stream", "display_data", "execute_result"}
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert source.with_suffix(".ipynb").stat().st_size < 300_000
    text = source.with_suffix(".ipynb").read_text(encoding="utf-8")
    assert not re.search(r"/(home|tmp|work|Users)/", text)


@pytest.mark.slow
def test_the_comparison_has_the_numbers_of_the_command_line(tmp_path, monkeypatch):
    # This recipe looks at no calibration rows; the notebook's others are measured as it is.
    monkeypatch.setattr("duquantpp_jax.commands.compare.CALIBRATION_ROWS", 1)
    arguments = ("--recipes", "block_hadamard", "--scale-rules", "floor")
    out = ("--tokens", "4088", "--out", str(tmp_path))
    assert cli.main(["compare", *arguments, *out]) == 0
    source = PLACE / "04_comparison.py"
    options = 'CompareOptions(tokens=4088, scale_rules=("floor", "log256"))'
    assert f"options = {options}\ncomparison = compare(options)" in source.read_text("utf-8")
    said = printed(source)
    (entry,) = json.loads((tmp_path / "results.json").read_text())["entries"]
    # Not log256: one ulp of the least block of a batch moves its whole grid of scales.
    (kl,) = re.findall(r"^block_hadamard +([0-9.]+) +[0-9.]+$", said, re.M)
    assert float(kl) == pytest.approx(entry["kl"]["value"], abs=CLOSE)
