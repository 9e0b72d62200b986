"""What the site has beside the pages of docs/: pages of other folders, notebooks, the reference.

A hook of mkdocs (.mkdocs.yml). README.md becomes index.md; a notebook its cells and what they
printed and drew; a room of the package what it exports. Links to files that are not on the site
become the file's name.
"""

import ast
import json
import os
import re
from pathlib import Path
from typing import Any

from markdown import Markdown
from markdown.extensions import Extension
from markdown.preprocessors import Preprocessor
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "index.md"} | {
    name: name
    for name in (
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "SECURITY.md",
        "notebooks/README.md",
        "experiments/README.md",
        *(f"experiments/results/{p.name}" for p in (ROOT / "experiments/results").glob("*.md")),
    )
}
"""Pages outside of docs/, and where they are on the site."""
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")


class _Fences(Preprocessor):
    """Examples of docstrings, from >>> to the next empty line, as code."""

    def run(self, lines: list[str]) -> list[str]:
        found, inside = list[str](), False
        for line in [*lines, ""]:
            if line.startswith(">>>") and not inside:
                found.append("```pycon")
                inside = True
            elif inside and not line.strip():
                found.append("```")
                inside = False
            found.append(line)
        return found


class Examples(Extension):
    """Fences the examples of docstrings before anything else reads them as text."""

    def extendMarkdown(self, md: Markdown) -> None:
        md.preprocessors.register(_Fences(md), "examples", 100)


def on_config(config: Any) -> Any:
    """Adds `Examples` to what Markdown is read with."""
    config["markdown_extensions"].append(Examples())
    return config


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that are made of other files."""
    made = {place: (ROOT / path).read_text(encoding="utf-8") for path, place in PAGES.items()}
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        made[f"notebooks/{path.stem}.md"] = notebook(path)
    for room in config["nav"][-1]["Reference"]:
        if isinstance(room, str):
            made[room] = reference(Path(room).stem)
    for place, text in made.items():
        files.append(File.generated(config, place, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turns links between files of the project into links between pages."""
    place = page.file.src_uri
    was = {new: old for old, new in PAGES.items()}.get(place, f"docs/{place}")
    own = place if place.startswith(("notebooks/", "reference/")) else was

    def turned(found: re.Match[str]) -> str:
        image, text, target = found.groups()
        if re.match(r"[a-z]+:|#", target):
            return found[0]
        path, _, anchor = target.partition("#")
        real = os.path.normpath(os.path.join(os.path.dirname(own), path))
        to = PAGES.get(real) or real.removeprefix("docs/")
        if real.startswith("notebooks/") and real.endswith((".py", ".ipynb")):
            to = str(Path(real).with_suffix(".md"))
        if files.get_file_from_path(to) is None:
            return text if image else f"{text} (`{real}`)"
        to = os.path.relpath(to, os.path.dirname(place) or ".")
        return f"{image}[{text}]({to}{'#' + anchor if anchor else ''})"

    return LINK.sub(turned, markdown)


def notebook(path: Path) -> str:
    """The cells of a notebook, and what they printed and drew, as markdown."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                image = "".join(data["image/png"].split())
                parts.append(f"![drawn by the cell above](data:image/png;base64,{image})")
            elif text := "".join(output.get("text", data.get("text/plain", ""))):
                parts.append(f"```text\n{text.rstrip()}\n```")
    return "\n\n".join(parts)


def reference(room: str) -> str:
    """A page of a room of the package: its docstring, and all that it exports."""
    path = ROOT / "duquantpp_jax" / room / "__init__.py"
    path = path if path.is_file() else ROOT / "duquantpp_jax" / f"{room}.py"
    names = sorted(exported(ast.parse(path.read_text(encoding="utf-8"))))
    found = [f"::: duquantpp_jax.{room}.{name}" for name in names]
    about = f"::: duquantpp_jax.{room}\n    options: {{members: false, show_root_heading: false}}"
    return "\n\n".join([f"# {room}", about, *found])


def exported(module: ast.Module) -> set[str]:
    """The names in the lists of `__all__`, or, without it, of all public functions and classes."""
    found, defined = set(), set()
    for node in module.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            defined.add(node.name)
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        if any(getattr(target, "id", None) == "__all__" for target in targets):
            found |= set(ast.literal_eval(node.value))  # type: ignore[attr-defined]
    return found or defined
