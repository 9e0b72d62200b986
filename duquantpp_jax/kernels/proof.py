"""Proof without the chip: compiles every kernel for Blackwell and reads its machine code.

A kernel is proved if its innermost loop has the tensor-core instruction of its format as often as
the shape of the tile implies, and if no register spills. This does not measure time: the table
shows the time of the roofline, from NVIDIA's numbers, and what bounds it.

    duquantpp kernels --target b200
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import IO, Any, cast

from duquantpp_jax.commands.options.kernels import Options
from duquantpp_jax.kernels import compiling, sass, target
from duquantpp_jax.kernels.compiling import Record

ROOFLINE = (
    "roofline: 9 PFLOP/s of FP4, 4.5 of FP8, 2.25 of BF16, and 8 TB/s: NVIDIA's DGX B200 data sheet"
    " divided by its 8 GPUs, and the Blackwell architecture brief; launches are left out"
)
_HEADER = (
    f"{'kernel':<16}{'case':<42}{'instruction':<12}{'in loop':>8}{'regs':>6}{'spill':>6}"
    f"{'smem':>8}{'tmem':>6}{'CTAs':>6}{'compile':>9}{'GFLOP':>10}{'MB':>9}{'roofline':>12}  bound"
)


def run(options: Options) -> int:
    """Prints the table; the command `duquantpp kernels`.

    Returns:
      0 if every kernel is proved; 1 if an instruction is missing or miscounted or a register
      spills; 2 if nothing was compiled.

    Raises:
      ValueError: There is no such target.
    """
    if (said := refusal(options)) is not None:
        print(said, file=sys.stderr)
        return 2
    records = []
    if not options.terminal.json:
        print(_HEADER)
    for record in prove(options):
        records.append(record)
        if not options.terminal.json:
            print(_line(record), flush=True)
    failed = [record for record in records if record.failures]
    said = [f"{len(records)} kernels compiled for {options.target}, {len(failed)} failed", ROOFLINE]
    said += [f"{record.kernel} {record.case}: {'; '.join(record.failures)}" for record in failed]
    found = {"target": options.target, "kernels": [dataclasses.asdict(r) for r in records]}
    options.terminal.give(found, lambda: print("\n".join(said)))
    return 2 if not records else int(bool(failed))


def prove(options: Options) -> Iterator[Record]:
    """Compiles all cases in a process of its own, because a process has only one architecture."""
    for found in printed_by(compiling.__name__, options.target, options.only):
        yield Record(**found)


def refusal(options: Options) -> str | None:
    """Why nothing can be compiled here, in a line; None if it can.

    Raises:
      ValueError: There is no such target.
    """
    if options.target not in target.TARGETS:
        raise ValueError(f"no target {options.target!r}: name one of {', '.join(target.TARGETS)}")
    if missing := target.missing_wheels():
        return f"compiling for {options.target} needs {', '.join(missing)}: {target.INSTALL}"
    return None


def printed_by(module: str, *arguments: str) -> Iterator[dict[str, Any]]:
    """The lines of JSON that a module prints in a process for the target, as they come.

    Raises:
      ValueError: What was refused there, as is said in a line.
      RuntimeError: The process failed; the message ends with its errors.
    """
    with tempfile.TemporaryDirectory() as directory:
        # On other platforms the plugin looks for a driver and cuDNN.
        places = {"JAX_PLATFORMS": "cpu", "MOSAIC_GPU_DUMP_TO": directory}
        command = [sys.executable, "-m", module, *arguments]
        environment, pipe = os.environ | sass.DUMP | places, subprocess.PIPE
        with subprocess.Popen(
            command, env=environment, stdout=pipe, stderr=pipe, text=True
        ) as worker:
            for line in cast(IO[str], worker.stdout):
                yield json.loads(line)
            errors = cast(IO[str], worker.stderr).read()
        if worker.returncode:
            last = errors.rstrip().rpartition("\n")[2]
            if last.startswith("ValueError: "):
                raise ValueError(last.removeprefix("ValueError: "))
            raise RuntimeError(f"compiling for {arguments[0]} failed:\n{errors[-4000:]}")


def _line(record: Record) -> str:
    mark = "  FAILED" if record.failures else ""
    ctas = f"{record.ctas}/{record.cluster}" if record.cluster > 1 else f"{record.ctas}"
    return (
        f"{record.kernel:<16}{record.case:<42}{record.instruction:<12}{record.found:>8}"
        f"{record.registers:>6}{record.spill_bytes:>6}{record.shared_bytes:>8}"
        f"{record.tensor_columns:>6}{ctas:>6}{record.seconds:>7.2f} s{record.flops / 1e9:>10.3f}"
        f"{record.bytes / 1e6:>9.3f}{record.roofline_seconds * 1e6:>9.2f} us  {record.bound}{mark}"
    )
