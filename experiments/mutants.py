"""Do the tests of the formats catch errors? Plants an error at a time and runs them.

Question: is there an error in the formats that their quick tests miss?
Hypothesis: none of those listed here.
Command: python -m experiments.mutants [--only NAME ...] [--jobs 2]
Cost: about 6 minutes on 2 cores.
Last result, 2026-11-25: all 60 caught (jax 0.12.0.1, Python 3.12).

Each mutant is a copy of the package in a temporary directory in which one piece of text, found
exactly once, is replaced. The tests named beside it run against the copy, stop at the first
failure, and must fail; on a copy without any change they must pass.
"""

import argparse
import concurrent.futures
import dataclasses
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = "duquantpp_jax"
TIMEOUT = 900  # seconds for the tests of one mutant


@dataclasses.dataclass(frozen=True)
class Mutant:
    """An error: in a file of the package, `right` becomes `wrong`; the tests that should see it."""

    name: str
    file: str
    right: str
    wrong: str
    tests: str


ELEMENTS, SCALES, ERRORS = "formats/elements.py", "formats/scales.py", "formats/errors.py"
MX, NVFP4, OTHERS = "formats/mx.py", "formats/nvfp4.py", "formats/nonstandard.py"
DIVISION, PACKING, TENSORS, CORE = (
    "formats/division.py", "formats/packing.py", "formats/tensors.py", "core/arrays.py",
)  # fmt: skip

MUTANTS = (
    Mutant("floor exponent off by one", SCALES, "floor = exponent - element.emax\n",
           "floor = exponent - element.emax + 1\n", "test_scales"),
    Mutant("ceil raises powers of two", SCALES, "up = significand > unit\n",
           "up = significand >= unit\n", "test_scales"),
    Mutant("even rounds half down", SCALES, "up = significand >= 2 * unit - ulp // 2",
           "up = significand > 2 * unit - ulp // 2", "test_scales"),
    Mutant("even rounds a bit too early", SCALES, "2 * unit - ulp // 2", "2 * unit - ulp",
           "test_scales"),
    Mutant("rceil raises the largest element", SCALES,
           "up = significand > element.max_significand * ulp",
           "up = significand >= element.max_significand * ulp", "test_scales"),
    Mutant("float rceil forgets the bit lost below 2^-126", SCALES,
           "lost = (floor == -127).astype(jnp.int32)", "lost = jnp.zeros_like(floor)",
           "test_scales"),
    Mutant("scale clamped one too high", SCALES, "jnp.clip(exponent, -127, 127)",
           "jnp.clip(exponent, -126, 127)", "test_scales"),
    Mutant("scale clamped one too low at the top", SCALES, "jnp.clip(exponent, -127, 127)",
           "jnp.clip(exponent, -127, 125)", "test_scales test_mx"),
    Mutant("mse takes the smaller of equals", ERRORS, "(a[1] < b[1])", "(a[1] <= b[1])",
           "test_scales"),
    Mutant("mse does not look below floor", SCALES, "for step in (0, -1):", "for step in (0,):",
           "test_scales"),
    Mutant("mse does not look above floor", SCALES, "best = clamp(clamp(floor) + 1)",
           "best = clamp(clamp(floor) - 1)", "test_scales"),
    Mutant("squared error drops its low part", ERRORS, "return high + (low >> bits), low &",
           "return high, low &", "test_scales"),
    Mutant("ties to odd", ELEMENTS, "(significand >> shift & 1)", "(~(significand >> shift) & 1)",
           "test_elements"),
    Mutant("ties away under nearest-even", ELEMENTS,
           "added = half - 1 + (significand >> shift & 1)", "added = half", "test_elements"),
    Mutant("away rounds ties down", ELEMENTS, "added = half\n", "added = half - 1\n",
           "test_elements"),
    Mutant("toward zero rounds", ELEMENTS, "added = jnp.zeros_like(half)",
           "added = half - 1", "test_elements"),
    Mutant("stochastic never rounds up", ELEMENTS, "return (significand + random) >> shift",
           "return significand >> shift", "test_elements"),
    Mutant("stochastic takes half the randomness", ELEMENTS,
           "jnp.uint32) & ((1 << shift) - 1)", "jnp.uint32) & ((1 << shift) // 2 - 1)",
           "test_elements"),
    Mutant("saturation lost", ELEMENTS, "jnp.minimum((above << element.mantissa_bits) + rounded, "
           "element.max_code)", "(above << element.mantissa_bits) + rounded", "test_elements"),
    Mutant("sign of zero lost", ELEMENTS, "negative << (element.bits - 1)",
           "jnp.where(code > 0, negative, 0) << (element.bits - 1)", "test_elements"),
    Mutant("element subnormals one quantum too coarse", ELEMENTS,
           "jnp.maximum(0, element.emin - scaled)", "jnp.maximum(0, element.emin + 1 - scaled)",
           "test_elements"),
    Mutant("shift capped too low", ELEMENTS, "shift = jnp.minimum(shift, 25)",
           "shift = jnp.minimum(shift, 24)", "test_elements"),
    Mutant("wrong bias of e3m2", ELEMENTS, '"e3m2", 3, 2, bias=3', '"e3m2", 3, 2, bias=4',
           "test_elements"),
    Mutant("e4m3 reaches its NaN", ELEMENTS, "max_code=0x7E", "max_code=0x7F", "test_elements"),
    Mutant("subnormal inputs flushed", DIVISION,
           "return exponent, jnp.where(magnitude == 0, 0, significand)",
           "return exponent, jnp.where(subnormal, 0, significand)", "test_scales"),
    Mutant("subnormal inputs scaled wrongly", DIVISION, "127 + 149, 127)", "127 + 148, 127)",
           "test_scales"),
    Mutant("sticky bit lost", DIVISION, "+ (rest > 0).astype(jnp.int32)", "", "test_scales"),
    Mutant("constant division loses its sticky bit", DIVISION, "(whole | sticky)", "(whole)",
           "test_scales"),
    Mutant("quotients by multiplying with a reciprocal", DIVISION,
           "guess = guess + (rest >= b).astype(jnp.int32) - (rest < 0).astype(jnp.int32)",
           "guess = guess + 0", "test_scales"),
    Mutant("NaN swallowed", SCALES, "bad = amax >= INFINITY_BITS",
           "bad = amax == INFINITY_BITS", "test_mx"),
    Mutant("Inf swallowed", SCALES, "bad = amax >= INFINITY_BITS",
           "bad = amax > INFINITY_BITS", "test_mx"),
    Mutant("NaN byte is 254", MX, "jnp.where(bad, 255,", "jnp.where(bad, 254,", "test_mx"),
    Mutant("zero block under mse has byte one", MX,
           "jnp.where(amax == 0, -127, sc.clamp(exponent))", "sc.clamp(exponent)", "test_mx"),
    Mutant("clip ignored", SCALES, ".astype(jnp.float32) * clip", ".astype(jnp.float32)",
           "test_mx"),
    Mutant("offset subtracted", MX, "exponent + scale_offset", "exponent - scale_offset",
           "test_mx"),
    Mutant("bfloat16 subnormals cast by floats' rules", MX, "jnp.uint32) << 16",
           "jnp.uint32) << 15", "test_elements"),
    Mutant("float64 cast silently", MX, '("float32", "bfloat16", "float16")',
           '("float32", "bfloat16", "float16", "float64")', "test_mx"),
    Mutant("byte 255 dequantizes to a number", CORE,
           "jnp.where(byte == 255, ", "jnp.where(byte == 256, ", "test_mx"),
    Mutant("subnormal results flushed", CORE, "subnormal = sign | (significand >> "
           "jnp.clip(1 - moved, 0, 31))", "subnormal = sign", "test_elements"),
    Mutant("overflow wraps", CORE, "jnp.where(moved > 254,", "jnp.where(moved > 255,",
           "test_elements"),
    Mutant("negative zero decoded as zero", CORE, "| negative\n",
           "| jnp.where(magnitude > 0, negative, 0)\n", "test_elements"),
    Mutant("gradient blocked", CORE, "moved = tangents[0].astype(jnp.float32)",
           "moved = 0 * tangents[0].astype(jnp.float32)", "test_gradient"),
    Mutant("gradient passes beyond the largest element", CORE,
           "jnp.where(passes, moved, jnp.zeros_like(moved))", "moved", "test_gradient"),
    Mutant("gradient stops at the largest element", CORE, "jnp.float32)) <= q.limit()",
           "jnp.float32)) < q.limit()", "test_gradient"),
    Mutant("nibbles swapped", PACKING, "codes[..., 0::2] | codes[..., 1::2] << 4",
           "codes[..., 1::2] | codes[..., 0::2] << 4", "test_packing"),
    Mutant("nibbles swapped in float4", CORE, "codes[..., 0::2] | codes[..., 1::2] << 4",
           "codes[..., 1::2] | codes[..., 0::2] << 4", "test_elements"),
    Mutant("unpacking swaps nibbles", PACKING, "[packed & 15, packed >> 4]",
           "[packed >> 4, packed & 15]", "test_packing"),
    Mutant("swizzle transposed", PACKING, "(-2, -3, -4), (-4, -3, -2))",
           "(-2, -4, -3), (-4, -3, -2))", "test_packing"),
    Mutant("padding of tiles is not zero", PACKING, "jnp.pad(scale_bytes, padding)",
           "jnp.pad(scale_bytes, padding, constant_values=127)", "test_packing"),
    Mutant("six-bit codes stored highest bit first", TENSORS,
           'axis=1, bitorder="little", count=bits)', 'axis=1, bitorder="big", count=bits)',
           "test_tensors"),
    Mutant("nvfp4 block scale may be zero", NVFP4, "jnp.maximum(byte, 1), jnp.uint8(0))",
           "byte, jnp.uint8(0))", "test_nvfp4"),
    Mutant("nvfp4 tensor scale for a largest scale of 240", NVFP4, "else (21, 7)", "else (45, 5)",
           "test_nvfp4"),
    Mutant("four over six chooses the larger error", NVFP4, "less(error(four), error(byte))",
           "less(error(byte), error(four))", "test_nvfp4"),
    Mutant("nvfp4 NaN block counts for the tensor scale", NVFP4,
           "jnp.max(jnp.where(whole < sc.INFINITY_BITS, whole, 0), initial=0)",
           "jnp.max(whole, initial=0)",
           "test_nvfp4"),
    Mutant("log256 index rounded", OTHERS, "jnp.floor(255 * (log - low) / span)",
           "jnp.round(255 * (log - low) / span)", "test_nonstandard"),
    Mutant("log256 over 256 intervals", OTHERS, "jnp.exp2(low + span * index / 255)",
           "jnp.exp2(low + span * index / 256)", "test_nonstandard"),
    Mutant("log256 counts zero blocks", OTHERS, "positive = amax > 0",
           "positive = amax >= 0", "test_nonstandard"),
    Mutant("fpquant without its 4/3", OTHERS, "jnp.full(amax.shape, 4 / 3, jnp.float32)",
           "jnp.full(amax.shape, 1.0, jnp.float32)", "test_nonstandard"),
    Mutant("quest about zero and not the mean", OTHERS, "square - mean * mean", "square",
           "test_nonstandard"),
)  # fmt: skip


def copy(into: pathlib.Path, mutant: Mutant | None) -> None:
    """The package and its tests in `into`, with the error planted.

    Raises:
      ValueError: The text to replace is not there exactly once.
    """
    ignore = shutil.ignore_patterns("__pycache__")
    for name in (PACKAGE, "tests", "experiments", "docs"):
        shutil.copytree(ROOT / name, into / name, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", into)
    if mutant is None:
        return
    path = into / PACKAGE / mutant.file
    text = path.read_text()
    if text.count(mutant.right) != 1:
        raise ValueError(
            f"{mutant.name}: {mutant.right!r} is {text.count(mutant.right)} times in {mutant.file}"
        )
    path.write_text(text.replace(mutant.right, mutant.wrong))


def caught(mutant: Mutant | None, tests: str, cache: str) -> bool:
    """Whether the tests fail on the copy. `cache` keeps compiled programs, most of which recur."""
    with tempfile.TemporaryDirectory() as place:
        copy(pathlib.Path(place), mutant)
        files = [f"tests/formats/{name}.py" for name in tests.split()]
        options = ["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider"]
        environment = {
            **os.environ,
            "PYTHONPATH": place,
            "PYTHONDONTWRITEBYTECODE": "1",
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        command = [sys.executable, "-m", "pytest", *options, *files]
        run = subprocess.run(
            command, cwd=place, env=environment, capture_output=True, text=True, timeout=TIMEOUT
        )
        if run.returncode not in (0, 1):
            raise RuntimeError(f"pytest could not run:\n{run.stdout}\n{run.stderr}")
        return run.returncode == 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", help="names of mutants")
    parser.add_argument("--jobs", type=int, default=2, help="tests at a time")
    options = parser.parse_args()
    chosen = [m for m in MUTANTS if options.only is None or m.name in options.only]
    every = " ".join(sorted({t for m in chosen for t in m.tests.split()}))
    missed = []
    with (
        tempfile.TemporaryDirectory() as cache,
        concurrent.futures.ThreadPoolExecutor(options.jobs) as pool,
    ):
        runs = {pool.submit(caught, m, m.tests, cache): m for m in chosen}
        unchanged = pool.submit(caught, None, every, cache)
        for run in concurrent.futures.as_completed(runs):
            seen = run.result()
            missed += [] if seen else [runs[run].name]
            print("caught " if seen else "MISSED ", runs[run].name, flush=True)
        if unchanged.result():
            sys.exit("the tests fail without any planted error: mend that first")
    print(f"{len(chosen) - len(missed)} of {len(chosen)} caught; without an error the tests pass")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
