"""What the options of several commands share: names, annotations, and what a command prints."""

import dataclasses
import functools
import json
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

TARGETS = 511
"""Targets of a row of `compare`."""

MODEL = Path("model")
"""In place of a text to calibrate on: rows that the model writes itself."""

RotationName = Literal["hadamard", "random_hadamard", "random_orthogonal"]
"""How a rotation is chosen: a Hadamard matrix, the same with random signs of its rows, or Q of the
QR decomposition of a normal matrix. A Hadamard matrix is not known of every side."""

Serve = Literal["transformers", "vllm", "qutlass"]
"""The program that an export is for (checkpoints/readers.py)."""

Compute = Literal["float32", "bf16"]
"""The type of matrix products outside of quantized linears."""

Implementation = Literal["triton", "xla"]
"""By kernels, or by what XLA compiles."""

Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]
Imports = Annotated[tuple[str, ...], tyro.conf.arg(name="import")]


@dataclasses.dataclass(frozen=True)
class Terminal:
    """What a command prints.

    Attributes:
      json: Print the result as one JSON object on stdout, and nothing else there (docs/results.md).
      verbose: Say more on stderr: versions and devices, each step in a line, and where an error was
        raised.
    """

    json: Flag = False
    verbose: Flag = False

    def give(self, result: Any, show: Callable[[], object]) -> None:
        """Prints a result, or calls what shows it to a reader."""
        if not self.json:
            show()
            return
        print(json.dumps(result, indent=1, allow_nan=False), flush=True)


Printing = Annotated[Terminal, tyro.conf.OmitArgPrefixes]


class Plain:
    """Options that take plain values: a str where a Path is declared, a list or a single value
    where a tuple is."""

    def __post_init__(self) -> None:
        hints = _hints(type(self))
        for field in dataclasses.fields(self):  # pyright: ignore[reportArgumentType]
            value = _declared(hints[field.name], getattr(self, field.name))
            object.__setattr__(self, field.name, value)


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _declared(hint: Any, value: Any) -> Any:
    """A value as its type is declared."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for kind in kinds:
        if typing.get_origin(kind) is tuple and value is not None:
            items = value if isinstance(value, list | tuple) else (value,)
            return tuple(_declared(typing.get_args(kind)[0], item) for item in items)
    return Path(value) if Path in kinds and isinstance(value, str) else value
