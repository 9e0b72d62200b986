"""`duquantpp kernels`: compiles kernels, or a whole model, for a GPU that is not there."""

import sys
from typing import Any

from duquantpp_jax.commands.options.kernels import Options
from duquantpp_jax.kernels import proof

_HEADER = (
    f"{'step':<10}{'tokens':>7}{'layers':>7}{'linears':>8}{'on tensor cores':>16}{'rotations':>10}"
    f"{'kernels':>8}{'UTCOMMA':>8}{'regs':>6}{'spill':>6}{'compile':>9}"
)


def run(options: Options) -> int:
    """Prints the table; returns the exit code, as `proof.run`.

    Raises:
      ValueError: There is no such target, or the model cannot be laid out for it.
    """
    if options.model is None:
        return proof.run(options)
    if (refusal := proof.refusal(options)) is not None:
        print(refusal, file=sys.stderr)
        return 2
    if options.tokens < 1:
        raise ValueError(f"--tokens {options.tokens}: give 1 or more")
    steps = list(proof.printed_by("duquantpp_jax.commands.whole_model", options.target,
                             str(options.model), str(options.tokens)))  # fmt: skip
    failed = [step for step in steps if step["failures"]]
    said = [_HEADER, *map(_line, steps)]
    said += [f"{step['step']}: {'; '.join(step['failures'])}" for step in failed]
    said += [f"{len(steps)} programs compiled for {options.target}, {len(failed)} failed"]
    found = {"target": options.target, "model": options.model.resolve().name, "steps": steps}
    options.terminal.give(found, lambda: print("\n".join(said)))
    return int(bool(failed))


def _line(step: dict[str, Any]) -> str:
    return (
        f"{step['step']:<10}{step['tokens']:>7}{step['layers']:>7}{step['linears']:>8}"
        f"{step['scaled_matmul']:>16}{step['rotate_quantize']:>10}{step['kernels']:>8}"
        f"{step['utcomma']:>8}{step['registers']:>6}{step['spill_bytes']:>6}"
        f"{step['seconds']:>7.1f} s"
    )
