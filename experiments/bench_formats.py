"""How fast does MXFP4 quantize, against memory and against others?

Question: from float32 (CPU) or bfloat16 (GPU) to packed codes and scale bytes, and back, how long
does the reference implementation take, as a ratio to work of the same kind in the same run?
Hypothesis: it is bound by memory: within 2x of a read-modify-write of the same array on a CPU, at
85 % of the copy bandwidth on a GPU.
Command: python -m experiments.bench_formats [--elements 67108864] [--growth 268435456]
Cost: about 2 minutes and 3 GB on 2 cores; torchao is timed where torch and torchao are installed.
Last result, 2026-11-25, two cores to itself, 64M float32, three runs with jax 0.12.0.1 and two with
0.10.2: quantize .84 to .90 of a read-modify-write (less than moving the array once), 19.0 to 20.3
times as fast as ml_dtypes and 25.5 times as fast as torchao 0.18.0; dequantize 1.22 to 1.28 of a
read-modify-write, 7.2 to 7.8 times as fast as ml_dtypes (10.9 and 13.9 with 0.10.2, where NumPy was
slower) and 12.5 to 13.6 times as torchao. Writing the result alone takes a tenth of what ml_dtypes
needs to dequantize (9.6 to 10.8 times; 15 and 19 where NumPy was slower): a bound on two cores for
whoever gives the result new memory, as all of these do.
The same day, 16 cores of an Intel Xeon host whose other 16 had other work, jax 0.11.2, one run:
quantize .54 of a read-modify-write and 65.5 times as fast as ml_dtypes, which uses one core;
dequantize .99 and 20.5 times.
Growth from 1M to 256M is even, .5 to .7 ns an element.
On one H200, jax 0.11.2, 256M bfloat16: copy 3221 GB/s, quantize .33 of it through XLA and .99
as `quantize_pack(implementation="triton")`, the same bits; dequantize .17 through XLA.

Every time is the least of several calls after one that compiles. Ratios of one run on one machine
may be compared, times of two machines may not.
"""

import argparse
import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from duquantpp_jax.kernels.quantize_pack.api import quantize_pack, unpack_dequantize

WIDTH = 4096


quantize = functools.partial(quantize_pack, implementation="reference")


@jax.jit
def read_modify_write(x: jax.Array) -> jax.Array:
    """One pass that reads and writes x and computes almost nothing."""
    return x + 1


@jax.jit
def write(scale_bytes: jax.Array) -> jax.Array:
    """What dequantizing writes, with next to nothing read: a bound in new memory."""
    return jnp.repeat(scale_bytes.astype(jnp.float32), 32, axis=-1)


def through_ml_dtypes(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantizes in NumPy; ml_dtypes' cast rounds the elements."""
    blocks = x.reshape(*x.shape[:-1], -1, 32)
    amax = np.abs(blocks).max(axis=-1)
    _, exponent = np.frexp(amax)
    exponent = np.clip(exponent - 1 - 2, -127, 127)
    scaled = np.ldexp(blocks, -exponent[..., None])
    codes = scaled.astype(ml_dtypes.float4_e2m1fn).view(np.uint8).reshape(x.shape)
    return codes[..., 0::2] | codes[..., 1::2] << 4, (exponent + 127).astype(np.uint8)


def from_ml_dtypes(packed: np.ndarray, scale_bytes: np.ndarray) -> np.ndarray:
    """Dequantizes in NumPy; ml_dtypes' cast reads the elements."""
    codes = np.stack([packed & 15, packed >> 4], axis=-1).view(ml_dtypes.float4_e2m1fn)
    values = codes.astype(np.float32).reshape(*scale_bytes.shape, 32)
    scaled = np.ldexp(values, scale_bytes.astype(np.int32)[..., None] - 127)
    return scaled.reshape(*packed.shape[:-1], -1)


def through_torchao(x: np.ndarray) -> dict[str, Callable[[], object]]:
    """torchao's quantize and dequantize, not compiled, if it is installed."""
    try:
        import torch
        from torchao.prototype.mx_formats.mx_tensor import to_dtype, to_mx
    except ImportError:
        return {}
    kind, tensor = torch.float4_e2m1fn_x2, torch.from_numpy(x)
    scales, data = to_mx(tensor, kind, 32)
    back = functools.partial(to_dtype, data, scales, kind, 32, torch.float32)
    return {"quantize": lambda: to_mx(tensor, kind, 32), "dequantize": back}


def least(call: Callable[[], object], times: int) -> float:
    """Seconds of the fastest of several calls, after one that compiles."""
    jax.block_until_ready(call())
    found = []
    for _ in range(times):
        start = time.perf_counter()
        jax.block_until_ready(call())
        found.append(time.perf_counter() - start)
    return min(found)


def many(call: Callable[[], object], calls: int = 20) -> float:
    """Seconds a call when they are queued one after the other, as on a GPU."""
    jax.block_until_ready(call())

    def run() -> float:
        start = time.perf_counter()
        for _ in range(calls):
            last = call()
        jax.block_until_ready(last)
        return (time.perf_counter() - start) / calls

    return min(run() for _ in range(3))


def numbers(elements: int, dtype) -> jax.Array:
    shape = (max(elements // WIDTH, 1), min(elements, WIDTH))
    return jax.random.normal(jax.random.key(0), shape, jnp.float32).astype(dtype)


def memory(x: jax.Array) -> None:
    """Memory that the compiled program reports to need."""
    analysis = jax.jit(quantize).lower(x).compile().memory_analysis()
    given, made = analysis.argument_size_in_bytes, analysis.output_size_in_bytes
    share = (given + made + analysis.temp_size_in_bytes) / (given + made)
    print(f"memory: input {given:,} output {made:,} temporary {analysis.temp_size_in_bytes:,} "
          f"bytes: {share:.3f} of input + output")  # fmt: skip


def on_cpu(x: jax.Array) -> None:
    packed, scale_bytes = quantize(x)
    plain = np.asarray(x)
    theirs = through_ml_dtypes(plain)
    assert (theirs[0] == packed).all()
    assert (theirs[1] == scale_bytes).all()
    assert (from_ml_dtypes(*theirs) == unpack_dequantize(packed, scale_bytes)).all()
    rmw = least(lambda: read_modify_write(x), 5)
    print(f"read-modify-write {rmw * 1e3:8.1f} ms")
    torchao = through_torchao(plain)
    bytes_ = np.asarray(packed), np.asarray(scale_bytes)
    for name, ours, numpy_route in (
        ("quantize", lambda: quantize(x), lambda: through_ml_dtypes(plain)),
        (
            "dequantize",
            lambda: unpack_dequantize(packed, scale_bytes),
            lambda: from_ml_dtypes(*bytes_),
        ),
    ):
        mine, ml = least(ours, 5), least(numpy_route, 1)
        print(f"{name:10} {mine * 1e3:8.1f} ms = {mine / rmw:.2f} of read-modify-write")
        print(f"  ml_dtypes {ml * 1e3:8.1f} ms = {ml / mine:.1f} times as long")
        if name == "dequantize":
            floor = least(lambda: write(scale_bytes), 5)
            print(f"  a write alone {floor * 1e3:4.1f} ms: ml_dtypes takes {ml / floor:.1f} of it")
        if name in torchao:
            ao = least(torchao[name], 1)
            print(f"  torchao   {ao * 1e3:8.1f} ms = {ao / mine:.1f} times as long")


def on_gpu(x: jax.Array) -> None:
    packed, scale_bytes = quantize(x)
    copied, made = 2 * x.nbytes, x.nbytes + packed.nbytes + scale_bytes.nbytes
    copy = copied / many(lambda: read_modify_write(x))
    print(f"copy       {copy / 1e9:7.0f} GB/s")
    narrowed = jax.jit(lambda *bytes_: unpack_dequantize(*bytes_).astype(x.dtype))
    one_pass = jax.jit(functools.partial(quantize_pack, implementation="triton"))
    for mine, theirs in zip(one_pass(x), (packed, scale_bytes), strict=True):
        assert (mine == theirs).all()
    for name, call in (
        ("quantize", lambda: quantize(x)),
        ("  triton", lambda: one_pass(x)),
        ("dequantize", lambda: narrowed(packed, scale_bytes)),
    ):
        rate = made / many(call)
        print(f"{name:10} {rate / 1e9:7.0f} GB/s = {rate / copy:.2f} of copy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--elements", type=int, default=1 << 26)
    parser.add_argument("--growth", type=int, default=1 << 28, help="elements to grow to from 1M")
    options = parser.parse_args()
    gpu = jax.default_backend() == "gpu"
    dtype = jnp.bfloat16 if gpu else jnp.float32
    where = jax.devices()[0].device_kind
    print(f"jax {jax.__version__}, {where}, {options.elements:,} {dtype.__name__}")
    x = numbers(options.elements, dtype)
    memory(x)
    (on_gpu if gpu else on_cpu)(x)
    del x
    elements = 1 << 20
    while elements <= options.growth:
        x = numbers(elements, dtype)
        seconds = (many if gpu else functools.partial(least, times=3))(lambda x=x: quantize(x))
        print(f"quantize {elements >> 20:4} M: {seconds * 1e3:9.3f} ms, "
              f"{seconds / elements * 1e12:7.1f} ps an element")  # fmt: skip
        elements *= 4


if __name__ == "__main__":
    main()
