"""What share of a B200 would the kernels reach, and what stops them?

Hypothesis: MXFP4 at 8192^3 reaches 90 % of the tensor cores, rotate_quantize at 16384 x 8192 90 %
of the memory's bandwidth.

    python -m experiments.roofline [--json] [--only TEXT]     # one to two minutes; no GPU

The model counts, for each multiprocessor, the cycles that its busiest part is busy, from the
machine code and the bytes that a tile moves, and adds what cannot overlap:

    step  = max(tensor core, shared memory, issue of the loading and multiplying warps,
                latency / slots of the ring)
    tile  = steps * step + the write of accumulator columns that the next tile needs
    SM    = latency + tiles of the busiest cluster * tile + the last write
    time  = max(SM, bytes / DRAM bandwidth)

It has no latency of barriers, no bank conflicts, no power limit (a B200 at full FP4 load lowers
its clock), and no limit on L2, for which no measurement of a B200 was found: the table says what
L2 has to deliver. It says twice what shared memory allows: in `share`, tensor cores' reads alone
count, as in the measurements of [F] and [S]; in `fills too`, TMA's writes and stores do as well.

NOT VALIDATED: no measurement of ours on a B200 exists. Beside the prediction stands what QuTLASS
publishes for its own kernels on one. The one kernel of ours measured on Hopper, quantize_pack in
Triton, took 1.01 times its bytes over the copy bandwidth of the same run (bench_formats.py): that
bears out the memory's term alone.

Constants, none of them fitted:
  [D] NVIDIA's data sheets (duquantpp_jax/kernels/specifications.py).
  [F] Zadouri et al., FlashAttention-4, 2026: 8192 FLOP (BF16) and 128 bytes of shared memory a
      cycle on each multiprocessor of a B200. The clock is then [D]'s peak by [F]'s FLOP a cycle.
  [S] SemiAnalysis, "Dissecting Nvidia Blackwell", 31 March 2026: tensor cores reach their peak
      with 128 columns or more and are bound by 128 bytes a cycle below; copies from DRAM saturate
      at 6.6 TB/s.
  [J] Jarmusch and Chandrasekaran, arXiv 2512.02189: about 1000 cycles for a miss to DRAM (Hopper).
  [G] CUDA C++ Programming Guide: a scheduler issues one instruction a cycle; of conversions and
      minima 64 results a cycle, half of the 128 of other instructions.
  [Q] QuTLASS on a B200, 57344 x 8192, M = 8192: 5040 TFLOP/s ideal, 4705 with Hadamard-32.

Last result (25 November 2026, commit 9171ffb): 8192^3 in 126 us, 97 % of the tensor cores (84 % if
fills count too), 18 TB/s asked of L2; rotate_quantize at 16384 x 8192 in 52 us, 99 % of what copies
reach and 82 % of the data sheet's bandwidth. All cases: docs/blackwell.md says how to read them.
"""

import argparse
import dataclasses
import json
import sys

import jax.numpy as jnp

from duquantpp_jax.core import ScaleRule
from duquantpp_jax.kernels import target
from duquantpp_jax.kernels.operand import depth_of
from duquantpp_jax.kernels.proof import Options, Record, prove
from duquantpp_jax.kernels.rotate_quantize import cases as rotate_quantize
from duquantpp_jax.kernels.scaled_matmul import cases as scaled_matmul
from duquantpp_jax.kernels.specifications import BYTES_PER_SECOND, CORES, FLOPS_PER_SECOND

FLOP_PER_CYCLE = 8192  # bfloat16, of one multiprocessor [F]
CLOCK = FLOPS_PER_SECOND["bfloat16"] / (CORES * FLOP_PER_CYCLE)  # 1.86 GHz
SHARED = 128  # bytes a cycle [F]
DRAM = 6.6e12  # bytes a second that copies reach [S]
LATENCY = 1000  # cycles from DRAM [J]
L2_BYTES = 126e6  # [D]
HALF_RATE = ("F2FP", "VIMNMX", "FMNMX")  # [G]
QUTLASS = {"mxfp4 8192x57344x8192": 5040e12}  # [Q]
TMA_ROW = 128  # bytes of K in a row of a tile


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Time and its parts, for one case.

    Attributes:
      seconds: Predicted time, launch left out.
      share: Of the resource's limit: tensor-core peak or DRAM's data-sheet bandwidth.
      of: Which of the two that is.
      share_of_copy: Of DRAM, the share of what copies reach, where DRAM is the limit.
      share_with_fills: The share if all traffic of shared memory counts.
      bound: What is busiest.
      l2_bytes_per_second: What L2 has to deliver for that.
      loses: Where the rest goes, as shares of the time.
    """

    kernel: str
    case: str
    label: str
    seconds: float
    share: float
    of: str
    share_of_copy: float | None
    share_with_fills: float
    bound: str
    l2_bytes_per_second: float
    loses: dict[str, float]


def issue(record: Record, role: str) -> int:
    """Cycles that a scheduler needs for one round of a role's loop; 0 where it was unrolled."""
    opcodes = record.loops[role]
    if opcodes == record.instructions:
        return 0
    return sum(n * (2 if op.startswith(HALF_RATE) else 1) for op, n in opcodes.items())


def predict_matmul(case: scaled_matmul.Case, record: Record) -> Prediction:
    """The model for scaled_matmul."""
    t, depth = case.used_tiling, depth_of(case.element.dtype)
    steps = -(-case.k // depth) // t.splits
    tiles = -(-case.m // t.rows) * -(-case.n // t.columns) * t.splits
    in_sequence = -(-tiles // record.ctas * t.ctas)
    itemsize = 4 if t.splits > 1 else jnp.dtype(case.out).itemsize

    peak = FLOPS_PER_SECOND[case.format] / (CORES * CLOCK)
    tensor = 2 * 128 * t.columns * depth / peak
    scales = (1 + t.columns // 128) * 128 * depth // case.block
    operands = (128 + t.columns // t.ctas) * TMA_ROW
    reads = operands + scales
    out = 2 * 128 * t.columns * itemsize  # written to shared memory, and read by TMA
    rounds = record.found // 4  # steps that stand in the multiplying loop
    parts = {
        "tensor cores": tensor,
        "shared memory": reads / SHARED,
        "loading warp": issue(record, "load"),
        "multiplying warp": issue(record, "multiply") / rounds,
        "latency": LATENCY / t.stages,
    }
    write = issue(record, "write")
    overlap = t.columns - t.stride(depth, case.block)
    exposed = write * -(-overlap // t.store_columns) * t.store_columns / t.columns

    def total(parts: dict[str, float]) -> tuple[float, str]:
        step, bound = max((cycles, name) for name, cycles in parts.items())
        cycles = LATENCY + in_sequence * (steps * step + exposed) + write
        again = -(-case.m // (t.rows * t.group)) if case.bytes > L2_BYTES else 1
        weights = case.n * (case.k * case.element.bits // 8 + case.k // case.block)
        dram = (case.bytes + (again - 1) * weights) / DRAM
        return max((cycles / CLOCK, bound), (dram + LATENCY / CLOCK, "DRAM"))

    seconds, bound = total(parts)
    fills = reads + operands + scales + out / steps
    with_fills, _ = total(parts | {"shared memory": fills / SHARED})
    compute = case.flops / FLOPS_PER_SECOND[case.format]
    memory = case.bytes / BYTES_PER_SECOND
    limit, of = max((compute, "tensor cores"), (memory, "DRAM"))
    cycles = seconds * CLOCK
    return Prediction(
        record.kernel,
        record.case,
        record.label,
        seconds,
        limit / seconds,
        of,
        memory * BYTES_PER_SECOND / DRAM / seconds if of == "DRAM" else None,
        limit / with_fills,
        bound,
        in_sequence * steps * (operands + scales / t.ctas) * record.ctas / seconds,
        {
            "start and last write": (LATENCY + write) / cycles,
            "accumulators overlap": in_sequence * exposed / cycles,
            "cores idle or rows unused": 1
            - compute * CLOCK / (in_sequence * steps * tensor) * min(1.0, CORES / record.ctas)
            if bound == "tensor cores"
            else 0.0,
        },
    )


def predict_rotation(case: rotate_quantize.Case, record: Record) -> Prediction:
    """The model for rotate_quantize."""
    tiles = -(-case.m // 128) * -(-case.k // 128)
    in_sequence = -(-tiles // record.ctas)
    matrices = 0 if case.shared else 4 * 2 * 32 * 32 * 2
    x = 128 * 128 * 2
    out = 128 * 64 + 512
    mma = 16 * (128 * 16 * 2 + 32 * 16 * 2)  # operands of 16 instructions, from shared memory
    # MSE tries three scales in a loop, whose code stands once: three times all of it is a bound.
    write = issue(record, "write") * (3 if case.scale_rule is ScaleRule.MSE else 1)
    parts = {
        "tensor cores": 16 * 2 * 128 * 32 * 16 / FLOP_PER_CYCLE,
        "shared memory": mma / SHARED,
        "quantizing warps": write,
        "multiplying warp": issue(record, "multiply"),
        "loading warp": issue(record, "load"),
        "latency": LATENCY / 3,
    }

    def total(parts: dict[str, float]) -> tuple[float, str]:
        step, bound = max((cycles, name) for name, cycles in parts.items())
        cycles = LATENCY + parts["shared memory"] + in_sequence * step
        return max((cycles / CLOCK, bound), (case.bytes / DRAM + LATENCY / CLOCK, "DRAM"))

    seconds, bound = total(parts)
    with_fills, _ = total(parts | {"shared memory": (mma + x + matrices + 2 * out) / SHARED})
    limit = case.bytes / BYTES_PER_SECOND
    return Prediction(
        record.kernel,
        record.case,
        record.label,
        seconds,
        limit / seconds,
        "DRAM",
        limit * BYTES_PER_SECOND / DRAM / seconds,
        limit / with_fills,
        bound,
        tiles * (x + matrices) / seconds,
        {
            "copies reach 6.6 of 8 TB/s": 1 - DRAM / BYTES_PER_SECOND if bound == "DRAM" else 0.0,
            "start": LATENCY / CLOCK / seconds,
        },
    )


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    if missing := target.missing_wheels():
        print(f"needs {', '.join(missing)}: {target.INSTALL}")
        return 2
    matmuls = {(c.name, c.label): c for c in scaled_matmul.PROOF}
    rotations = {(c.name, c.label): c for c in rotate_quantize.PROOF}
    predictions = []
    for record in prove(Options(only=arguments.only)):
        key = (record.case, record.label)
        if record.kernel == "scaled_matmul":
            predictions.append(predict_matmul(matmuls[key], record))
        elif record.kernel == "rotate_quantize":
            predictions.append(predict_rotation(rotations[key], record))
        else:
            continue
        if not arguments.json:
            print(line(predictions[-1]), flush=True)
    if arguments.json:
        print(json.dumps([dataclasses.asdict(p) for p in predictions], indent=1))
    else:
        print("NOT VALIDATED: no measurement of ours on a B200 exists (see the docstring)")
    return 0


def line(p: Prediction) -> str:
    """One row of the table."""
    name = f"{p.kernel} {p.case}" + (f" ({p.label})" if p.label else "")
    lost = ", ".join(f"{what} {part:.1%}" for what, part in p.loses.items() if part > 0.005)
    published = ""
    if p.case in QUTLASS:
        flops = p.share * FLOPS_PER_SECOND["mxfp4"]
        published = f"; {flops / 1e12:.0f} TFLOP/s, QuTLASS publishes {QUTLASS[p.case] / 1e12:.0f}"
    copy = f" ({p.share_of_copy:.1%} of a copy)" if p.share_of_copy else ""
    of = p.of + copy
    return (
        f"{name:<72}{p.seconds * 1e6:>9.2f} us {p.share:>6.1%} of {of:<24}"
        f"fills too {p.share_with_fills:>6.1%}  bound: {p.bound:<17}"
        f"L2 {p.l2_bytes_per_second / 1e12:>5.1f} TB/s  {lost}{published}"
    )


if __name__ == "__main__":
    sys.exit(main())
