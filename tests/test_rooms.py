"""Every room can be the first that a program imports."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import duquantpp_jax

PACKAGE = Path(duquantpp_jax.__file__).parent
PROGRAM = """
import importlib, os, sys
import jax, flax.nnx, optax, rich.console, safetensors.numpy, scipy.stats, tokenizers, tyro
for room in sys.argv[1:]:
    if not (child := os.fork()):
        importlib.import_module(f"duquantpp_jax.{room}")
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(room)
"""
"""What others make is imported once, for all processes."""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_every_room_can_be_imported_first():
    rooms = [path.stem for path in PACKAGE.iterdir() if path.is_dir() or path.suffix == ".py"]
    rooms = sorted({*rooms} - {"__init__", "__pycache__"})
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, *rooms, "evaluation.rows", "ptq.walk"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
