"""What does each convention make of the same numbers? Writes docs/numerics.md.

Question: where do the scale rules and roundings in use differ, and by how much?
Hypothesis: on few, nameable inputs; most of them are next to a power of two, to 6 or to 7.
Command: python -m experiments.numerics_page
Cost: about 20 seconds.
Last result: docs/numerics.md, which a test holds to be what this writes.

All numbers on the page are computed here, by the package's own variants.
"""

import pathlib

import jax.numpy as jnp
import numpy as np

from duquantpp_jax.core import ElementRounding, Format, ScaleRule
from duquantpp_jax.formats import (
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    E5M2,
    MX,
    MXFP4,
    NVFP4,
    FP32Scale,
    FPQuant,
    Log256,
    Quest,
)

PAGE = pathlib.Path(__file__).resolve().parent.parent / "docs" / "numerics.md"
FINEST = float(np.finfo(np.float32).smallest_subnormal)
TOP = float(np.finfo(np.float32).max)


def below(x: float) -> float:
    return float(np.nextafter(np.float32(x), np.float32(0)))


def beyond(x: float) -> float:
    return float(np.nextafter(np.float32(x), np.float32(np.inf)))


NAMED = (
    ("1", 1.0), ("next above 1", beyond(1)), ("3", 3.0), ("3.5", 3.5), ("4", 4.0), ("5", 5.0),
    ("6", 6.0), ("next above 6", beyond(6)), ("6.5", 6.5), ("next below 7", below(7)), ("7", 7.0),
    ("next below 8", below(8)), ("next below 16", below(16)), ("2^-149", FINEST),
    ("2^-126", 2.0**-126), ("6 * 2^-127", 6 * 2.0**-127), ("next above 6 * 2^-127",
    6 * 2.0**-127 + 2.0**-148), ("float32 max", TOP),
)  # fmt: skip
EVEN, AWAY, ZERO = (
    ElementRounding.NEAREST_EVEN, ElementRounding.AWAY, ElementRounding.TOWARD_ZERO,
)  # fmt: skip
CONVENTIONS: tuple[tuple[str, Format, str], ...] = (
    ("OCP MX 1.0, torchao default", MXFP4(), "floor"),
    ("compressed-tensors, AMD Quark", MXFP4(scale_rule=ScaleRule.EVEN), "even"),
    ("torchao ceil", MXFP4(scale_rule=ScaleRule.CEIL), "ceil"),
    ("torchao rceil, cuBLAS, Transformer Engine", MXFP4(scale_rule=ScaleRule.RCEIL_FLOAT),
     "rceil_float"),
    ("microxcaling nearest", MXFP4(rounding=AWAY), "floor, ties away"),
    ("ggml", MXFP4(rounding=ZERO), "floor, ties toward zero (cut)"),
    ("qwix 0.1.8", MXFP4(scale_rule=ScaleRule.RCEIL), "rceil"),
    ("FP-Quant, QuTLASS abs_max", FPQuant(), "not E8M0: 4/3 of floor"),
    ("FP-Quant, QuTLASS quest", Quest(), "from the deviation"),
    ("continuous scale", FP32Scale(), "not E8M0: amax / 6"),
)  # fmt: skip


def row(*cells: object) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def table(head: tuple, rows: list[tuple]) -> str:
    return "\n".join([row(*head), row(*["-"] * len(head)), *[row(*r) for r in rows]])


def number(x: float) -> str:
    """x in few letters: as a multiple of a power of two where it is far from one."""
    x = float(x)
    if not np.isfinite(x) or x == 0:
        return str(x)
    mantissa, exponent = np.frexp(abs(x))
    if -8 < exponent < 12:
        return f"{x:.5g}"
    return f"{'-' if x < 0 else ''}{2 * mantissa:.5g} * 2^{exponent - 1}"


def block(amax: float) -> np.ndarray:
    return np.array([[amax, *[0] * 31]], np.float32)


def by_rule() -> str:
    rules = tuple(ScaleRule)
    rows = []
    for name, amax in NAMED:
        cells = []
        for rule in rules:
            q = MXFP4(scale_rule=rule).quantize(block(amax))
            cells.append(f"{int(q.scale_bytes()[0, 0])}: {number(q.dequantize()[0, 0])}")
        rows.append((name, *cells))
    return table(("amax", *(rule.value for rule in rules)), rows)


def by_convention() -> str:
    x = np.array([[6.5, 5, 3.5, 2.5, 1.75, 1.25, 0.75, 0.25] * 4], np.float32)
    rows = []
    for name, format, rule in CONVENTIONS:
        q = format.quantize(x)
        values = np.asarray(q.dequantize())[0, :8]
        error = float(np.square(np.asarray(format.fake_quantize(x)) - x).mean())
        scale = float(q.scales[0, 0].astype(jnp.float32))
        rows.append((name, rule, f"{scale:.4g}", *(f"{v:.4g}" for v in values), f"{error:.4f}"))
    head = ("convention", "rule", "scale", *(f"{v:g}" for v in x[0, :8]), "mean squared error")
    return table(head, rows)


def by_rounding() -> str:
    ties = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
    rows = []
    for tie in ties:
        for name, x in ((f"next below {tie:g}", below(tie)), (f"{tie:g}", tie),
                        (f"next above {tie:g}", beyond(tie))):  # fmt: skip
            cells = []
            for rounding in (EVEN, AWAY, ZERO):
                given = np.array([[4, x, -x, *[0] * 29]], np.float32)
                got = np.asarray(MXFP4(rounding=rounding).fake_quantize(given))[0, 1:3]
                cells.append(f"{got[0]:g}, {got[1]:g}")
            rows.append((name, *cells))
    return table(("+-x, under scale 1", EVEN.value, AWAY.value, ZERO.value), rows)


EDGE_FORMATS: tuple[tuple[str, Format], ...] = (
    ("MXFP4 floor", MXFP4()), ("MXFP4 rceil", MXFP4(scale_rule=ScaleRule.RCEIL)),
    ("MXFP6 e3m2", MX(E3M2)), ("MXFP8 e4m3", MX(E4M3)), ("NVFP4", NVFP4(block_size=32)),
    ("FP32Scale", FP32Scale()), ("Log256", Log256()), ("FPQuant", FPQuant()), ("Quest", Quest()),
)  # fmt: skip


def edges() -> str:
    cases = (
        ("NaN in the block", [float("nan"), 1, -1]), ("Inf in the block", [float("inf"), 1, -1]),
        ("all zeros", [0.0, -0.0, 0.0]), ("-1e-6 beside 4", [4, -1e-6, 1e-6]),
        ("2^-149 alone", [FINEST, 0, 0]), ("3 * 2^-128 alone", [3 * 2.0**-128, 0, 0]),
        ("float32 max", [TOP, -TOP, 1]),
    )  # fmt: skip
    rows = []
    for name, start in cases:
        cells = []
        for _, format in EDGE_FORMATS:
            x = np.array([[*start, *[0] * (32 - len(start))]], np.float32)
            q = format.quantize(x)
            scale = q.scale_bytes()[0, 0] if q.scales.dtype.itemsize == 1 else q.scales[0, 0]
            numbers = ", ".join(number(v) for v in np.asarray(q.dequantize())[0, : len(start)])
            cells.append(
                f"{number(scale) if scale.dtype == jnp.float32 else int(scale)}: {numbers}"
            )
        rows.append((name, *cells))
    return table(("first numbers of the block", *(name for name, _ in EDGE_FORMATS)), rows)


def elements() -> str:
    rows = [
        (e.name, e.bits, e.exponent_bits, e.mantissa_bits, e.bias, e.emax, f"{e.max:g}",
         number(float(e.decode(jnp.asarray([1], jnp.uint8))[0])))
        for e in (E2M1, E2M3, E3M2, E4M3, E5M2)
    ]  # fmt: skip
    return table(
        ("element", "bits", "exponent", "mantissa", "bias", "emax", "max", "smallest"), rows
    )


TEXT = """# Numerics: what each convention gives

This page is written by `python -m experiments.numerics_page` from the package's own variants; do
not edit it. The rules stand in `duquantpp_jax/formats/scales.py`, in equations.

## Elements

{elements}

## Scale rules

A block of one number amax and 31 zeros: the scale byte, and what amax becomes (MXFP4; byte b is
the scale 2^(b - 127)). `rceil_float` is `rceil` as float32 arithmetic computes it: it differs for
one magnitude only. `mse` takes the larger scale of equals, so a block without error may have a
larger byte than under `floor`.

{by_rule}

## Conventions of libraries

The numbers of the head, four times over as one block, dequantized. The first two rows, the fourth
and the fifth are defaults of libraries in use, and no two are alike: results called "MXFP4, round
to nearest" cannot be compared until the rule is named.

{by_convention}

Checked against the libraries themselves where they run on a CPU (tests/goldens): torchao 0.18.0
agrees bit for bit under all four rules and all five elements except for elements under byte 0,
which it divides by 2^-126 (floor, ceil, even) or by 1 (rceil); compressed-tensors 0.20.1 agrees
with `even` for MXFP4 and MXFP6 where its scale is not below byte 0, and rounds the amax of MXFP8
to one mantissa bit, not three; microxcaling agrees with `floor`, its `nearest` is our `away`; qwix
0.1.8 agrees with `rceil` except where a float log2 is off by one, and flushes tiny blocks; the
reference of four over six agrees with `NVFP4(four_over_six=True)`; torchao's NVFP4 agrees with
`NVFP4()` except that its block scales are at least 2^-6; compressed-tensors' NVFP4 agrees with
`NVFP4(calibrated=True)`.

## Rounding of elements

{by_rounding}

`stochastic` takes the upper neighbour with the probability that makes the expectation exact, to
2^-31 of a quantum; what saturates is not unbiased.

## Edges

What the specification leaves open, decided once. Each cell: scale (the byte, or the float32 number
where a scale has no byte), and what the first numbers of the block become.

{edges}

- NaN or Inf anywhere in a block: byte 255 (NVFP4: 0x7F, the others: NaN), the whole block is NaN,
  its codes are zeros with the signs of the input; no other block changes. In NVFP4 and Log256 such
  a block takes no part in the scale of the tensor.
- A zero block: byte 0 (the float scales: 1), zero codes. -0, and negative numbers that round to
  zero, have code 8 (the sign alone).
- Subnormal inputs and results are exact in the MX formats, on every device. Float scales are never
  below 2^-126, and results of theirs below 2^-126 lose their lowest bits.
- E is clamped to [-127, 127]. float32's largest numbers saturate under `floor`; under the rules
  that round the scale up they dequantize to Inf.
- `clip` that makes amax NaN or Inf makes the block NaN. `scale_offset` is added before clamping.
- float32, bfloat16 and float16 are taken; all else is refused, float64 too (a cast from it would
  round once more). A width that blocks do not divide, and a single number, are refused. Empty
  arrays stay empty.
- A tensor scale of NVFP4 is 1 for an all-zero tensor and at least 2^-126; a block scale is at least
  2^-9, E4M3's smallest, unless its block is zero. Calibrated, a tensor scale is a power of two, and
  a block scale that rounds to zero is 2^-3.
"""


def page() -> str:
    return TEXT.format(
        elements=elements(),
        by_rule=by_rule(),
        by_convention=by_convention(),
        by_rounding=by_rounding(),
        edges=edges(),
    )


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page())
    print(f"wrote {PAGE.name}")
