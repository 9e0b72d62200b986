"""The command line: `duquantpp COMMAND`.

A command is a frozen dataclass of options. Bad input is one line on stderr and exit code 2, never
a traceback; Ctrl-C is exit code 130.
"""

import contextlib
import io
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tyro

from duquantpp_jax.commands import (
    ablate,
    compare,
    evaluate,
    export,
    generate,
    inspect,
    learn,
    quantize,
)
from duquantpp_jax.commands.progress import remembering_interrupts
from duquantpp_jax.kernels import proof

COMMANDS: Mapping[str, tuple[type, Callable[[Any], int]]] = {
    "compare": (compare.CompareOptions, compare.run),
    "ablate": (ablate.AblateFile, ablate.run),
    "evaluate": (evaluate.EvaluateOptions, evaluate.run),
    "generate": (generate.GenerateOptions, generate.run),
    "learn": (learn.LearnOptions, learn.run),
    "quantize": (quantize.QuantizeOptions, quantize.run),
    "export": (export.ExportOptions, export.run),
    "inspect": (inspect.InspectOptions, inspect.run),
    "kernels": (proof.Options, proof.run),
}
"""Options of each command, and the function that runs it and returns the exit code."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code."""
    try:
        with remembering_interrupts():
            options = _parse(sys.argv[1:] if arguments is None else arguments)
            run = next(run for kind, run in COMMANDS.values() if type(options) is kind)
            return run(options)
    except (ValueError, OSError, OverflowError) as error:
        print("duquantpp: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("duquantpp: interrupted", file=sys.stderr)
        return 130


def _parse(arguments: Sequence[str]) -> Any:
    """The options of the chosen command; ValueError has the parser's message as one line."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.extras.subcommand_cli_from_dict(
                {name: options for name, (options, _) in COMMANDS.items()},
                prog="duquantpp",
                description=__doc__,
                args=list(arguments),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
    # Without the title in the first line, the lines of the boxes, and the pointer to --help.
    text = re.sub(r"[─-╿]|-{3,}", " ", complaint.getvalue())
    lines = [" ".join(line.split()) for line in text.splitlines()[1:]]
    said = " ".join(line for line in lines if line)
    said = re.split(r"Argument helptext:|For full helptext", said)[0].strip()
    raise ValueError(f"{said} (see duquantpp --help)")


if __name__ == "__main__":
    sys.exit(main())
