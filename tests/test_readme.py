"""The Python of the README runs as it stands there, block after block."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_python_of_the_readme_runs():
    names = {}
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(compile(block, "README.md", "exec"), names)
    assert names["q"].shape == (2, 32)
    assert 0 < names["kl"].max() < 1
    assert len(names["CELLS"]) == 10
