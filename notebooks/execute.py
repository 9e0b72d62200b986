"""Writes NAME.ipynb from NAME.py, its cells run and their outputs kept.

Command: python notebooks/execute.py [START ...]

All notebooks of this directory, or those whose names start so (01, 02, ...). What changes from run
to run is left out: times, the version of Python, random names of cells and of treescope's
containers. A notebook with a cell that raises, or that writes to stderr, is not written.
"""

import os
import re
import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}


def execute(source: Path) -> nbformat.NotebookNode:
    """The notebook of a percent file, executed in its directory.

    Raises:
      nbclient.exceptions.CellExecutionError: A cell raised.
      ValueError: A cell wrote to stderr.
    """
    notebook = jupytext.read(source)
    notebook.metadata = {"kernelspec": KERNEL}
    for number, cell in enumerate(notebook.cells):
        cell.id = f"{source.stem[:2]}-{number:02d}"
    where = {"metadata": {"path": str(source.parent)}}
    client = NotebookClient(
        notebook, timeout=600, record_timing=False, coalesce_streams=True, resources=where
    )
    client.execute()
    names: dict[str, str] = {}
    for output in (one for cell in notebook.cells for one in cell.get("outputs", [])):
        if output.get("name") == "stderr":
            raise ValueError(f"{source.name}: a cell wrote to stderr: {output['text']}")
        if html := output.get("data", {}).get("text/html"):
            output["data"]["text/html"] = re.sub(
                "treescope_out_[0-9a-f]{32}",
                lambda found: names.setdefault(
                    found[0], f"treescope_out_{source.stem[:2]}_{len(names)}"
                ),
                html,
            )
    notebook.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    return notebook


def main() -> None:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    starts = tuple(sys.argv[1:]) or ("",)
    for source in sorted(HERE.glob("[0-9]*.py")):
        if not source.name.startswith(starts):
            continue
        target = source.with_suffix(".ipynb")
        partial = target.with_suffix(".partial")
        nbformat.write(execute(source), partial)
        partial.replace(target)
        print(f"{target.name}: {target.stat().st_size // 1024} KiB")


if __name__ == "__main__":
    main()
