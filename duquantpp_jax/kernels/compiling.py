"""The worker of the proof: compiles its cases for a GPU that is not there, one record a line.

A process of its own, as a process has one architecture. `proof` starts it, with the folder into
which Mosaic writes machine code in the environment.
"""

import dataclasses
import functools
import json
import os
import pathlib
import re
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from duquantpp_jax.kernels import sass, target
from duquantpp_jax.kernels.operand import depth_of
from duquantpp_jax.kernels.quantized_linear import quantized_linear
from duquantpp_jax.kernels.rotate_quantize import api as rotate_quantize
from duquantpp_jax.kernels.rotate_quantize import cases as rotate_quantize_cases
from duquantpp_jax.kernels.scaled_matmul import api as scaled_matmul
from duquantpp_jax.kernels.scaled_matmul import cases as scaled_matmul_cases
from duquantpp_jax.kernels.scaled_matmul import mosaic
from duquantpp_jax.kernels.specifications import roofline
from duquantpp_jax.transforms.basic import Smooth
from duquantpp_jax.transforms.block import BlockRotation

__all__ = ["Compiled", "Record", "main", "record"]

MMA = {"mxfp4": "UTCOMMA", "nvfp4": "UTCOMMA.4X", "mxfp8": "UTCQMMA"}
ROTATION_MMA = "UTCHMMA"
ROTATION_MMAS = 16  # a tile: 4 blocks, high and low part of R, 2 instructions for 32 of K


@dataclasses.dataclass(frozen=True)
class Record:
    """One row of the table.

    Attributes:
      instruction: The tensor-core instruction that was asked for.
      found: How often it stands in the innermost loop.
      implied: How often the shape of the tile says it must.
      failures: What is wrong; empty if nothing.
      instructions: How often each opcode stands in the code.
      loops: The same for the loops of the roles "load", "multiply" and "write".
      seconds: To lower and compile.
      other_kernels: What XLA runs beside it: sums over parts of K, parts of R, filling up.
      roofline_seconds: Least time on the target, by NVIDIA's numbers.
      bound: What bounds that.
    """

    kernel: str
    case: str
    label: str
    instruction: str
    found: int
    implied: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    tensor_columns: int
    ctas: int
    cluster: int
    seconds: float
    other_kernels: int
    flops: int
    bytes: int
    roofline_seconds: float
    bound: str
    failures: tuple[str, ...]
    instructions: dict[str, int]
    loops: dict[str, dict[str, int]]


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A kernel, the seconds it took to compile, and how many XLA adds around it."""

    kernel: sass.Kernel
    seconds: float
    other_kernels: int


def main(name: str, only: str) -> None:
    """Prints a record of every case whose kernel, shape or label contains `only`, a line each."""
    directory = pathlib.Path(os.environ["MOSAIC_GPU_DUMP_TO"])
    with target.compile_only(name) as device:
        for kernel, case in _cases():
            if only.lower() in f"{kernel} {case.name} {case.label}".lower():
                for row in _PROOFS[kernel](case, device, directory):
                    print(json.dumps(dataclasses.asdict(row)), flush=True)


def _cases() -> Iterator[tuple[str, Any]]:
    yield from (("scaled_matmul", case) for case in scaled_matmul_cases.PROOF)
    yield from (("rotate_quantize", case) for case in rotate_quantize_cases.PROOF)
    yield "quantized_linear", scaled_matmul_cases.Case(384, 4096, 4096, label="vmap of jit")


def _matmul(case: scaled_matmul_cases.Case, device: Any, directory: pathlib.Path) -> list[Record]:
    def call(a, b):
        if case.tiling is not None:
            return mosaic.scaled_matmul(a, b, out_dtype=jnp.dtype(case.out), tiling=case.tiling)
        return scaled_matmul.scaled_matmul(
            a, b, out_dtype=jnp.dtype(case.out), implementation="mosaic_sm100"
        )

    (compiled,) = _compile(call, jax.eval_shape(case.operands, _KEY), device, directory)
    instruction = MMA[case.format]
    return [record("scaled_matmul", case, case.format, instruction, _implied(case), compiled)]


def _implied(case: scaled_matmul_cases.Case) -> int:
    """Tensor-core instructions in the loop: a step for each slot, or only those there are."""
    t = case.used_tiling
    depth = depth_of(case.dtype)
    tiles = -(-case.m // t.rows) * -(-case.n // t.columns) * t.splits
    steps = -(-tiles // (t.cores // t.ctas)) * -(-case.k // depth) // t.splits
    return 4 * min(t.stages, steps)  # an instruction takes 32 of the 128 bytes of a step


def _rotate(case: rotate_quantize_cases.Case, device: Any, directory: pathlib.Path) -> list[Record]:
    def call(x, rotation, smooth):
        return rotate_quantize.rotate_quantize(
            x, rotation, smooth, scale_rule=case.scale_rule, implementation="mosaic_sm100"
        )

    arguments = jax.eval_shape(case.inputs, _KEY)
    (compiled,) = _compile(call, arguments, device, directory)
    name, kind = "rotate_quantize", "bfloat16"
    return [record(name, case, kind, ROTATION_MMA, ROTATION_MMAS, compiled)]


def _linear(case: scaled_matmul_cases.Case, device: Any, directory: pathlib.Path) -> list[Record]:
    """Both kernels of a linear, whose tokens come in a batch axis that vmap takes."""
    rotation = rotate_quantize_cases.Case(case.m, case.k, shared=False, smooth=True)

    def call(x, weights, rotation, smooth):
        transform = Smooth(smooth).then(BlockRotation(rotation))
        one = functools.partial(
            quantized_linear, weights=weights, transform=transform, implementation="mosaic_sm100"
        )
        return jax.vmap(one)(x.reshape(4, -1, x.shape[-1]))

    x, matrices, smooth = jax.eval_shape(rotation.inputs, _KEY)
    weights = jax.eval_shape(case.operands, _KEY)[1]
    first, second = _compile(call, (x, weights, matrices, smooth), device, directory)
    name = "quantized_linear"
    return [
        record(name, rotation, "bfloat16", ROTATION_MMA, ROTATION_MMAS, first),
        record(name, case, case.format, MMA[case.format], _implied(case), second),
    ]


_PROOFS = {"scaled_matmul": _matmul, "rotate_quantize": _rotate, "quantized_linear": _linear}
_KEY = jax.eval_shape(lambda: jax.random.key(0))


def _compile(call: Any, arguments: Any, device: Any, directory: pathlib.Path) -> list[Compiled]:
    for file in directory.iterdir():
        file.unlink()
    start = time.perf_counter()
    compiled = jax.jit(call).lower(*target.with_sharding(arguments, device)).compile()
    seconds = time.perf_counter() - start
    kernels = sass.read(directory)
    if not kernels:
        raise RuntimeError("no new kernel: this process has compiled the very same one before")
    others = device_instructions(compiled.as_text() or "") - len(kernels)
    return [Compiled(kernel, seconds, others) for kernel in kernels]


def device_instructions(hlo: str) -> int:
    """Instructions of a compiled module's entry that run on the device."""
    entry = hlo[hlo.index("\nENTRY ") :]
    opcodes = re.findall(r"^\s+(?:ROOT )?%\S+ = .*? ([a-z][a-z-]*)\(%?", entry, re.MULTILINE)
    free = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element"}
    return sum(opcode not in free for opcode in opcodes)


def record(
    name: str,
    case: Any,
    kind: str,
    instruction: str,
    implied: int,
    compiled: Compiled,
) -> Record:
    """The row of a compiled case, with what is wrong in its machine code.

    Args:
      kind: What is multiplied, for the roofline.
      instruction: The tensor-core instruction to be found.
      implied: How often, in the innermost loop.
    """
    kernel = compiled.kernel
    in_loop = kernel.tensor_core_in_loop()
    found = in_loop.get(instruction, 0)
    failures = []
    if set(in_loop) != {instruction}:
        failures.append(f"{instruction} expected, {', '.join(in_loop) or 'none'} found")
    if found != implied:
        failures.append(f"{implied} {instruction} implied by the tile, {found} in the loop")
    if kernel.spill_bytes:
        failures.append(f"{kernel.spill_bytes} bytes of registers spill")
    if kernel.target != "sm_100a":
        failures.append(f"compiled for {kernel.target}")
    least, bound = roofline(case.flops, case.bytes, kind)
    return Record(
        kernel=name,
        case=case.name,
        label=case.label,
        instruction=instruction,
        found=found,
        implied=implied,
        registers=kernel.registers,
        spill_bytes=kernel.spill_bytes,
        shared_bytes=kernel.shared_bytes,
        tensor_columns=kernel.tensor_columns,
        ctas=kernel.grid,
        cluster=kernel.cluster,
        seconds=round(compiled.seconds, 3),
        other_kernels=compiled.other_kernels,
        flops=case.flops,
        bytes=case.bytes,
        roofline_seconds=least,
        bound=bound,
        failures=tuple(failures),
        instructions=kernel.instructions,
        loops=kernel.loops,
    )


if __name__ == "__main__":
    main(*sys.argv[1:3])
