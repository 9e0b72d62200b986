"""What the options of several commands share: names and annotations."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

TARGETS = 511
"""Targets of a row of `compare`."""

MODEL = Path("model")
"""In place of a text to calibrate on: rows that the model writes itself."""

RotationName = Literal["hadamard", "random_hadamard", "random_orthogonal"]
"""How a rotation is chosen: a Hadamard matrix, the same with random signs of its rows, or Q of the
QR decomposition of a normal matrix. A Hadamard matrix is not known of every side."""

Serve = Literal["transformers", "vllm"]

Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]
Imports = Annotated[tuple[str, ...], tyro.conf.arg(name="import")]
