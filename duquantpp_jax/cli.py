"""The command line: `duquantpp COMMAND`; `duquantpp --version [--verbose]` prints versions.

A command is a frozen dataclass of options. Bad input is one line on stderr and exit code 2, never
a traceback; Ctrl-C is exit code 130, SIGTERM and SIGHUP are 143.
"""

import contextlib
import dataclasses
import difflib
import importlib
import importlib.metadata
import io
import platform
import re
import sys
from collections.abc import Sequence
from typing import Any

import tyro

from duquantpp_jax import __version__
from duquantpp_jax.commands import options
from duquantpp_jax.commands.options.common import Terminal
from duquantpp_jax.commands.progress import guarded

COMMANDS: dict[str, type] = {
    "compare": options.CompareOptions,
    "ablate": options.AblateFile,
    "evaluate": options.EvaluateOptions,
    "generate": options.GenerateOptions,
    "serve": options.ServeOptions,
    "learn": options.LearnOptions,
    "quantize": options.QuantizeOptions,
    "export": options.ExportOptions,
    "inspect": options.InspectOptions,
    "recipes": options.RecipesOptions,
    "kernels": options.KernelOptions,
    "completion": options.CompletionOptions,
}
"""Options of each command."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code, but of several processes that fail ends this one."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and set(arguments) <= {"--version", "--verbose"} and "--version" in arguments:
        print(f"{versions()}; {_devices()}" if "--verbose" in arguments else versions())
        return 0

    def run() -> int:
        given = _parse(arguments)
        name = next(name for name, kind in COMMANDS.items() if type(given) is kind)
        if name == "completion":
            script = _completion(given.shell)
            given.terminal.give({"shell": given.shell, "script": script}, lambda: print(script))
            return 0
        # Imported only now: `--help` and what the parser refuses need no JAX.
        module = importlib.import_module(f"duquantpp_jax.commands.{name}")
        from duquantpp_jax.commands.programs import kept_programs

        with kept_programs():
            if given.terminal.verbose:
                print(f"{versions()}; {_devices()}", file=sys.stderr)
            return module.run(given)

    code = 1
    try:
        code = guarded("duquantpp", run, "--verbose" in arguments)
    finally:
        if hosts := sys.modules.get("duquantpp_jax.commands.hosts"):
            hosts.leave_at_once(code)
    return code


def versions() -> str:
    """Versions of the package, of Python and of what computes, in one line.

    They are read from the metadata of what is installed. Devices are named with --verbose alone: to
    ask for them imports JAX and takes hold of a GPU.
    """
    computing = (f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib", "flax"))
    python = f"Python {platform.python_version()}"
    return ", ".join((f"duquantpp_jax {__version__}", *computing, python))


def _devices() -> str:
    import jax

    found = jax.devices()
    return f"{len(found)} of {found[0].device_kind}"


def _completion(shell: str) -> str:
    """The script that the parser makes for a shell."""
    script = io.StringIO()
    with contextlib.redirect_stdout(script), contextlib.suppress(SystemExit):
        _parse(["--tyro-print-completion", shell])
    return script.getvalue().rstrip()


def _unknown_option(command: str, word: str) -> str:
    """One line about an option that a command does not have."""
    if command not in COMMANDS:
        return f"there is no option {command} before the command: see duquantpp --help"
    asked = word.partition("=")[0].replace("_", "-")
    others = [name for name, kind in COMMANDS.items() if asked in _flags(kind)]
    least = 0.85 if others else 0.7  # what another command has is no misspelling
    near = difflib.get_close_matches(asked, _flags(COMMANDS[command]), n=1, cutoff=least)
    hint = (
        f"that is an option of {', '.join(others)}" if others else f"see duquantpp {command} --help"
    )
    hint = f"did you mean {near[0]}?" if near else hint
    return f"{command} has no option {word}: {hint}"


def _flags(kind: type) -> list[str]:
    """The options of a command as they are typed."""
    fields = (*dataclasses.fields(kind), *dataclasses.fields(Terminal))
    flags = ["--" + field.name.replace("_", "-") for field in fields if field.name != "terminal"]
    return ["--import" if flag == "--imports" else flag for flag in flags]


def _parse(arguments: Sequence[str]) -> Any:
    """The options of the chosen command; ValueError has the parser's message as one line."""
    if arguments and not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
        near = difflib.get_close_matches(arguments[0].lower(), COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(COMMANDS)}"
        raise ValueError(f"unknown command {arguments[0]!r}: {hint}")
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.extras.subcommand_cli_from_dict(
                COMMANDS,
                prog="duquantpp",
                description="Rotations, formats and rounding of language models in 4 bits.",
                args=list(arguments),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
    # Without the title in the first line, the lines of the boxes, and the pointer to --help.
    text = re.sub(r"[─-╿]|-{3,}", " ", complaint.getvalue())
    lines = [" ".join(line.split()) for line in text.splitlines()[1:]]
    said = " ".join(line for line in lines if line)
    if stated := re.search(r"Unrecognized (?:or misplaced )?options: (-\S+)", said):
        raise ValueError(_unknown_option(arguments[0], stated[1].rstrip(",")))
    said = re.split(r"Argument helptext:|For full helptext", said)[0].strip()
    raise ValueError(f"{said} (see duquantpp --help)")


if __name__ == "__main__":
    sys.exit(main())
