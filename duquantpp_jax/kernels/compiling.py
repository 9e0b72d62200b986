"""The worker of the proof: compiles cases for a GPU that is not there, and prints their records.

`proof` starts it in a process of its own, because a process has only one architecture. The
environment names the directory in which Mosaic writes machine code.
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
from jax.sharding import SingleDeviceSharding

from duquantpp_jax.kernels import quantized_linear, rotate_quantize, sass, scaled_matmul, target
from duquantpp_jax.kernels.operand import depth_of
from duquantpp_jax.kernels.rotate_quantize import cases as rotations
from duquantpp_jax.kernels.scaled_matmul import cases as matmuls
from duquantpp_jax.kernels.scaled_matmul import mosaic
from duquantpp_jax.kernels.specifications import roofline
from duquantpp_jax.transforms import BlockRotation, Smooth

MMA = {"mxfp4": "UTCOMMA", "nvfp4": "UTCOMMA.4X", "mxfp8": "UTCQMMA", "bfloat16": "UTCHMMA"}
_SM100 = {"implementation": "mosaic_sm100"}
_KEY = jax.eval_shape(lambda: jax.random.key(0))


@dataclasses.dataclass(frozen=True)
class Record(sass.Kernel):
    """One row of the table.

    Attributes:
      kernel: The function that was compiled.
      instruction: The expected tensor-core instruction.
      found: Its number in the innermost loop.
      implied: The number that the shape of the tile implies.
      roofline_seconds: Least time on the target, by NVIDIA's numbers.
      bound: The bound of this time.
      failures: Errors in the machine code.
      seconds: Time to lower and compile.
      other_kernels: Other kernels of the program: sums over parts of K, parts of R, padding.
    """

    kernel: str
    case: str
    label: str
    instruction: str
    found: int
    implied: int
    flops: int
    bytes: int
    roofline_seconds: float
    bound: str
    failures: list[str]
    seconds: float = 0.0
    other_kernels: int = 0


def main(name: str, only: str) -> None:
    """Prints a record a line for every case whose kernel, shape or label contains `only`."""
    directory = pathlib.Path(os.environ["MOSAIC_GPU_DUMP_TO"])
    with target.compile_only(name) as device:
        for kernel, program, case in _programs():
            if only.lower() not in f"{kernel} {case.name} {case.label}".lower():
                continue
            call, arguments, cases = program(case)
            codes, spent = _compile(call, arguments, device, directory)
            for part, code in zip(cases, codes, strict=True):
                row = record(kernel, part, *_expected(part), code)
                print(json.dumps(dataclasses.asdict(row) | spent), flush=True)


def _programs() -> Iterator[tuple[str, Any, Any]]:
    yield from (("scaled_matmul", _matmul, case) for case in matmuls.PROOF)
    yield from (("rotate_quantize", _rotate, case) for case in rotations.PROOF)
    yield "quantized_linear", _linear, matmuls.Case(384, 4096, 4096, label="vmap of jit")


def _matmul(case: matmuls.Case) -> tuple[Any, Any, list]:
    dtype = jnp.dtype(case.out)
    call = functools.partial(scaled_matmul, out_dtype=dtype, **_SM100)
    if case.tiling is not None:
        call = functools.partial(mosaic.scaled_matmul, out_dtype=dtype, tiling=case.tiling)
    return call, jax.eval_shape(case.operands, _KEY), [case]


def _rotate(case: rotations.Case) -> tuple[Any, Any, list]:
    call = functools.partial(rotate_quantize, scale_rule=case.scale_rule, **_SM100)
    return call, jax.eval_shape(case.inputs, _KEY), [case]


def _linear(case: matmuls.Case) -> tuple[Any, Any, list]:
    """Both kernels of a linear under vmap over a batch axis of the tokens."""
    rotation = rotations.Case(case.m, case.k, shared=False, smooth=True)

    def call(x, weights, rotation, smooth):
        transform = Smooth(smooth).then(BlockRotation(rotation))
        linear = functools.partial(quantized_linear, weights=weights, transform=transform, **_SM100)
        return jax.vmap(linear)(x.reshape(4, -1, x.shape[-1]))

    x, matrices, smooth = jax.eval_shape(rotation.inputs, _KEY)
    weights = jax.eval_shape(case.operands, _KEY)[1]
    return call, (x, weights, matrices, smooth), [rotation, case]


def _expected(case: matmuls.Case | rotations.Case) -> tuple[str, int]:
    """What a case multiplies, and the tensor-core instructions in its loop."""
    if isinstance(case, rotations.Case):  # a tile: 4 blocks, 2 parts of R, 2 instructions for 32
        return "bfloat16", 4 * 2 * 2
    t = case.used_tiling
    tiles = -(-case.m // t.rows) * -(-case.n // t.columns) * t.splits
    depth = depth_of(case.element.dtype)
    steps = -(-tiles // (t.cores // t.ctas)) * -(-case.k // depth) // t.splits
    # The loop has a step for each slot. An instruction takes 32 of the 128 bytes of a step.
    return case.format, 4 * min(t.stages, steps)


def _compile(
    call: Any, arguments: Any, device: Any, directory: pathlib.Path
) -> tuple[list[sass.Kernel], dict[str, Any]]:
    """Machine code of the kernels of a program, and what a record says of the whole program."""
    for file in directory.iterdir():
        file.unlink()
    place = functools.partial(jax.ShapeDtypeStruct, sharding=SingleDeviceSharding(device))
    placed = jax.tree.map(lambda x: place(x.shape, x.dtype), arguments)
    start = time.perf_counter()
    compiled = jax.jit(call).lower(*placed).compile()
    seconds = round(time.perf_counter() - start, 3)
    kernels = sass.read(directory)
    if not kernels:
        raise RuntimeError("no new kernel: this process has compiled the very same one before")
    others = device_instructions(compiled.as_text() or "") - len(kernels)
    return kernels, {"seconds": seconds, "other_kernels": others}


def device_instructions(hlo: str) -> int:
    """Number of instructions in a compiled module's entry that run on the device."""
    entry = hlo[hlo.index("\nENTRY ") :]
    opcodes = re.findall(r"^\s+(?:ROOT )?%\S+ = .*? ([a-z][a-z-]*)\(%?", entry, re.MULTILINE)
    free = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element"}
    return sum(opcode not in free for opcode in opcodes)


def record(name: str, case: Any, kind: str, implied: int, code: sass.Kernel) -> Record:
    """The row of a compiled case, with the errors in its machine code.

    Args:
      kind: What is multiplied.
      implied: Tensor-core instructions that the innermost loop must have.
    """
    instruction, in_loop = MMA[kind], code.tensor_core_in_loop()
    found, kinds = in_loop.get(instruction, 0), ", ".join(in_loop) or "none"
    wrong = {
        f"{instruction} expected, {kinds} found": set(in_loop) != {instruction},
        f"{implied} {instruction} implied by the tile, {found} in the loop": found != implied,
        f"{code.spill_bytes} bytes of registers spill": code.spill_bytes > 0,
        f"compiled for {code.target}": code.target != "sm_100a",
    }
    least, bound = roofline(case.flops, case.bytes, kind)
    about = {field: getattr(case, field) for field in ("label", "flops", "bytes")}
    return Record(
        **vars(code),
        **about,
        kernel=name,
        case=case.name,
        instruction=instruction,
        found=found,
        implied=implied,
        roofline_seconds=least,
        bound=bound,
        failures=[text for text, so in wrong.items() if so],
    )


if __name__ == "__main__":
    main(*sys.argv[1:3])
