"""The short form of experiments/torture/faults.py: each fault once, of `export`."""

import json
import os
import shutil
import subprocess
import sys

import pytest

SHORT = """
import itertools, json, pathlib, sys
from experiments.torture import faults
from experiments.torture.commands import Command

place = pathlib.Path(sys.argv[1])
words = "export", "--model", str(place / "quantized"), "--format", "dequantized"
trial = faults.Trial(Command("export", words, False), place, faults.may_mount(place / "m"), 0)
for _ in itertools.islice(trial.rounds(), len(faults.FAULTS)):
    pass
print(json.dumps({"counts": trial.counts, "findings": trial.findings}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="commands are forked")
def test_a_fault_is_one_line_or_does_no_harm_and_is_forgotten_by_the_next_run(quantized, tmp_path):
    shutil.copytree(quantized, tmp_path / "quantized")
    words = [sys.executable, "-W", "ignore", "-c", SHORT, tmp_path]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["findings"] == []
    felt = {fault: counts["felt"] for fault, counts in found["counts"].items()}
    assert felt["full disk"] == felt["removed"] == 1
