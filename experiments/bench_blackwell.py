"""Are the kernels right and fast on a real B200? One command, one file to send back.

Hypothesis: what experiments/roofline.py predicts, within 25 %.

    python -m experiments.bench_blackwell               # on a B200; ten minutes; writes a JSON
    python -m experiments.bench_blackwell --rehearse    # anywhere: tiny shapes, the references

It checks numerics first (scaled_matmul against float64 on rows drawn at random, rotate_quantize
bit for bit against the reference on the values that its own arithmetic gives), then times every
case of the proof against lax.scaled_dot and a bfloat16 matmul of the same shape, in one process
and in turns, so that clocks are alike. Times are of the device alone where CUPTI is there, else of
many calls in a row, and the file says which.

Last result: none. Nobody has run this on a B200 yet; send bench_blackwell.json if you do.
"""

import argparse
import functools
import json
import pathlib
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from duquantpp_jax import MXFP4, ScaleRule
from duquantpp_jax.kernels import Operand, rotate_quantize, scaled_matmul
from duquantpp_jax.kernels.implementation import why_not_sm100
from duquantpp_jax.kernels.rotate_quantize import cases as rotations
from duquantpp_jax.kernels.scaled_matmul import cases as matmuls
from duquantpp_jax.kernels.scaled_matmul import mosaic, xla
from duquantpp_jax.kernels.specifications import roofline

TOLERANCE = {"float32": 1e-6, "bfloat16": 2.0**-8}
REPEATS = 20


def time_of(call: Any, *arguments: Any) -> tuple[list[float], str]:
    """Seconds of each repeat, and how they were taken."""
    call = jax.jit(call)
    jax.block_until_ready(call(*arguments))
    if milliseconds := device_times(call, arguments):
        return [t * 1e-3 for t in milliseconds], "device (CUPTI)"
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        for _ in range(10):
            out = call(*arguments)
        jax.block_until_ready(out)
        seconds.append((time.perf_counter() - start) / 10)
    return seconds, "clock, 10 calls"


def device_times(call: Any, arguments: tuple) -> list[float] | None:
    """Milliseconds on the device, or None where there is no GPU or no CUPTI to ask."""
    if jax.devices()[0].platform != "gpu":
        return None
    from jax.experimental.mosaic.gpu import profiler

    try:
        return profiler.measure(call, iterations=REPEATS)(*arguments)[1]
    except RuntimeError as error:
        print(f"  times are of the clock: {error}", file=sys.stderr)
        return None


def summary(seconds: list[float]) -> dict[str, float]:
    """Median and quartiles in microseconds."""
    low, median, high = statistics.quantiles(seconds, n=4)
    return {"median_us": median * 1e6, "low_us": low * 1e6, "high_us": high * 1e6}


def exact_rows(a: Operand, b: Operand, rows: np.ndarray) -> np.ndarray:
    """Some rows of the product, in float64."""

    def values(mx: Any) -> np.ndarray:
        scales = np.repeat(np.asarray(mx.scales).astype(np.float64), mx.block_size, axis=1)
        tensor_scale = 1.0 if mx.tensor_scale is None else float(mx.tensor_scale)
        return np.asarray(mx.elements).astype(np.float64) * scales * tensor_scale

    left, right = a.to_mx(), b.to_mx()
    picked = left.replace(elements=left.elements[rows], scales=left.scales[rows])
    return values(picked) @ values(right).T


def bench_matmul(case: matmuls.Case, name: str) -> dict[str, Any]:
    """Error and times of one product."""
    a, b = jax.jit(case.operands)(jax.random.key(0))
    dtype = jnp.dtype(case.out)

    def mine(a: Operand, b: Operand, implementation: Any = name) -> jax.Array:
        if implementation == "mosaic_sm100" and case.tiling is not None:
            return mosaic.scaled_matmul(a, b, out_dtype=dtype, tiling=case.tiling)
        return scaled_matmul(a, b, out_dtype=dtype, implementation=implementation)

    rows = np.sort(np.random.default_rng(0).permutation(case.m)[:4])
    expected = exact_rows(a, b, rows)
    out = np.asarray(jax.jit(mine)(a, b)[rows], np.float64)
    error = float(np.abs(out - expected).max() / np.abs(expected).max())
    seconds, timer = time_of(mine, a, b)
    result = {
        "error": error,
        "right": error <= TOLERANCE[case.out],
        "timer": timer,
        "kernel": summary(seconds),
        "tflops": case.flops / statistics.median(seconds) / 1e12,
        "roofline_us": roofline(case.flops, case.bytes, case.format)[0] * 1e6,
    }
    if xla.why_not() is None:
        result["scaled_dot"] = summary(
            time_of(functools.partial(mine, implementation="xla"), a, b)[0]
        )
    x = jnp.ones((case.m, case.k), jnp.bfloat16)
    w = jnp.ones((case.n, case.k), jnp.bfloat16)
    result["bfloat16"] = summary(time_of(lambda x, w: x @ w.T, x, w)[0])
    return result


def bench_rotation(case: rotations.Case, name: str) -> dict[str, Any]:
    """Bits and times of one rotation with quantization."""
    x, rotation, smooth = jax.jit(case.inputs)(jax.random.key(0))

    def mine(x: jax.Array, implementation: Any = name) -> Operand:
        return rotate_quantize(
            x, rotation, smooth, scale_rule=case.scale_rule, implementation=implementation
        )

    # Integers times powers of two rotate without rounding, in any order of additions.
    small = min(case.m, 256)
    draw = np.random.default_rng(0)
    exact_x = draw.integers(-8, 9, (small, case.k)) * 2.0 ** draw.integers(-40, 40, (small, 1))
    exact_r = draw.integers(-4, 5, (1 if case.shared else case.k // 32, 32, 32)) / 8
    exact = (jnp.asarray(exact_x, jnp.bfloat16), jnp.asarray(exact_r, jnp.float32))
    out, law = (
        rotate_quantize(*exact, scale_rule=case.scale_rule, implementation=i).to_mx()
        for i in (name, "reference")
    )
    differ = int(
        jnp.sum(out.codes() != law.codes()) + jnp.sum(out.scale_bytes() != law.scale_bytes())
    )
    seconds, timer = time_of(mine, x)
    return {
        "bits_that_differ": differ,
        "right": differ == 0,
        "timer": timer,
        "kernel": summary(seconds),
        "bytes_per_second": case.bytes / statistics.median(seconds),
        "roofline_us": roofline(case.flops, case.bytes, "bfloat16")[0] * 1e6,
        "reference": summary(time_of(functools.partial(mine, implementation="reference"), x)[0]),
        "copy": summary(time_of(lambda x: x + jnp.bfloat16(1), x)[0]),
    }


def main() -> int:
    """Runs all cases and writes the file; 1 if a number is wrong, 2 if there is no B200."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--rehearse", action="store_true", help="tiny shapes, references, any device"
    )
    parser.add_argument("--only", default="", help="cases whose kernel, shape or label has this")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("bench_blackwell.json"))
    options = parser.parse_args()
    name = "reference" if options.rehearse else "mosaic_sm100"
    if not options.rehearse and (reason := why_not_sm100()):
        print(f"no Blackwell here: {reason} (--rehearse runs the references)")
        return 2
    device = jax.devices()[0]
    report: dict[str, Any] = {
        "device": device.device_kind,
        "compute_capability": getattr(device, "compute_capability", None),
        "cores": getattr(device, "core_count", None),
        "platform_version": device.client.platform_version,
        "jax": jax.__version__,
        "implementation": name,
        "scale_rules": [rule.name for rule in ScaleRule],
        "format": MXFP4().element.name,
        "cases": [],
    }
    groups = (
        ("scaled_matmul", matmuls.SMALL if options.rehearse else matmuls.PROOF, bench_matmul),
        (
            "rotate_quantize",
            rotations.SMALL if options.rehearse else rotations.PROOF,
            bench_rotation,
        ),
    )
    for kernel, cases, bench in groups:
        for case in cases:
            if options.only.lower() not in f"{kernel} {case.name} {case.label}".lower():
                continue
            result = {"kernel": kernel, "case": case.name, "label": case.label}
            result |= {"result": bench(case, name)}
            report["cases"].append(result)
            mark = "right" if result["result"]["right"] else "WRONG"
            median = result["result"]["kernel"]["median_us"]
            print(f"{kernel:<16}{case.name:<44}{mark}  {median:>10.2f} us", flush=True)
            options.out.write_text(json.dumps(report, indent=1))
    wrong = [case for case in report["cases"] if not case["result"]["right"]]
    print(f"{len(report['cases'])} cases, {len(wrong)} wrong; send {options.out}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
