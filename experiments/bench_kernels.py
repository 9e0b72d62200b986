"""How near to the memory's speed do kernels run, and what does moving inputs cost?

The parts of bench_gpu.py that need no model: the limits of the device, a linear, packed weights,
attention and rotations. Its docstring has the command, the hypothesis and the last result.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from duquantpp_jax.core import ScaleRule
from duquantpp_jax.evaluation.rows import TARGETS
from duquantpp_jax.kernels import rotate_fake_quantize, rotate_quantize
from duquantpp_jax.kernels.flash_attention.api import flash_attention
from duquantpp_jax.kernels.float_matvec.api import float_matvec
from duquantpp_jax.kernels.matvec.api import FEW, matvec, unpacked
from duquantpp_jax.kernels.matvec.rows import PackedRows
from duquantpp_jax.kernels.rotate_quantize.cases import Case
from duquantpp_jax.models import DecoderConfig
from duquantpp_jax.models.attention import (
    causal_attention,
    fused_attention,
    fused_attention_runs,
)
from duquantpp_jax.models.products import exact
from duquantpp_jax.ptq.layout import decoded_once
from duquantpp_jax.ptq.site import QuantizedLinear, QuantizedSite
from duquantpp_jax.transforms.basic import Identity
from duquantpp_jax.transforms.block import BlockRotation
from experiments.bench_fit import least
from experiments.shapes import BLOCK, FORMAT, LLAMA, SMALL, SMOLLM2

REPEATS = 3
COPIES = 8


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Shapes of all parts.

    Attributes:
      model: Of evaluation, generation and quantizing.
      learned: Of the learning step.
      linear: Tokens, inputs and outputs of the linear that is checked and timed alone.
      rows, learned_rows: Of `TARGETS` tokens.
      moved: Tokens and inputs that are moved and rounded.
      copied: Bytes. side: of the square matmul.
      prompt: Tokens read by prefill. new: tokens decoded.
    """

    model: DecoderConfig
    learned: DecoderConfig
    linear: tuple[int, int, int]
    moved: tuple[int, int]
    rows: int
    learned_rows: int
    length: int
    copied: int
    side: int
    prompt: int
    new: int


FULL = Sizes(
    LLAMA, SMOLLM2, (2048, 4096, 14336), (16384, 8192), 4, 16, TARGETS, 2**30, 8192, 2048, 64
)
TINY = Sizes(SMALL, SMALL, (8, 64, 48), (512, 64), 2, 2, 31, 2**20, 64, 40, 4)


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table: seconds, a ratio to another time of this run, and what is aimed at."""

    work: str
    seconds: float
    against: str = ""
    ratio: float | None = None
    goal: str = ""


def seconds_of(call: Callable[[], object]) -> float:
    """Seconds of a call that was compiled before."""
    return least(call, REPEATS)[1]


def each(call: Callable[[Any], Any], items: list[Any]) -> float:
    """Seconds of a call on each item, all in one program, so without a launch."""
    every = jax.jit(lambda items: [call(item) for item in items])
    return seconds_of(lambda: every(items)) / len(items)


def copy_of(size: int) -> float:
    """Seconds in which the device reads size / 2 bytes and writes as many."""
    xs = [jnp.full(size // 4, i, jnp.bfloat16) for i in range(COPIES)]
    return each(lambda x: x + jnp.bfloat16(1), xs)


def limits(sizes: Sizes) -> Iterator[Row]:
    """Copy and bfloat16 matmul: what the device can do."""
    side, seconds = sizes.side, copy_of(2 * sizes.copied)
    yield Row(f"copy, {2 * sizes.copied / seconds / 1e9:.0f} GB/s", seconds)
    a = jnp.ones((side, side), jnp.bfloat16)
    product = jax.jit(jnp.matmul)
    seconds = seconds_of(lambda: product(a, a))
    yield Row(f"bf16 matmul {side}^3, {2 * side**3 / seconds / 1e12:.0f} TFLOP/s", seconds)


def linear(sizes: Sizes) -> Iterator[Row]:
    """One linear in W4A4, checked against float64, with its weight decoded before and at use."""
    tokens, inputs, outputs = sizes.linear
    draw = np.random.default_rng(0)
    x = jnp.asarray(draw.standard_normal((tokens, inputs), np.float32))
    w = jnp.asarray(draw.standard_normal((outputs, inputs), np.float32))
    packed = QuantizedSite(Identity(), (jax.jit(FORMAT.quantize)(w),))
    site = QuantizedLinear(FORMAT)
    run = jax.jit(lambda x, state: site("", x, (), state)[0][0])
    held = {"decoded at use": packed, "decoded before": decoded_once(packed, jax.devices()[0])}
    few = np.asarray(FORMAT.fake_quantize(x[:4]), np.float64)
    wide = np.asarray(jax.jit(FORMAT.fake_quantize)(w), np.float64)
    wanted, bound = few @ wide.T, 2.0**-23 * inputs * (np.abs(few) @ np.abs(wide).T)
    for name, state in held.items():
        if not np.all(np.abs(np.asarray(run(x, state)[:4], np.float64) - wanted) <= bound):
            raise ValueError(f"the linear that is {name} is further off than float32 sums can be")
    narrow = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
    plain = jax.jit(lambda x, w: jnp.einsum("tk,nk->tn", x, w))
    rival = seconds_of(lambda: plain(*narrow))
    shape = f"linear {tokens} x {outputs} x {inputs}"
    yield Row(f"{shape}, bf16", rival)
    for name, state in held.items():
        seconds = seconds_of(lambda: run(x, state))  # noqa: B023
        yield Row(f"{shape}, W4A4 {name}", seconds, "bf16", seconds / rival)


def packed(sizes: Sizes) -> Iterator[Row]:
    """Packed weights decoded for many tokens, and multiplied with few, each layer's in turn."""
    _, inputs, outputs = sizes.linear
    layers, shape = 4, f"{outputs} x {inputs}"
    draw = np.random.default_rng(0)
    w = draw.standard_normal((layers, outputs, inputs), np.float32)
    q = jax.jit(FORMAT.quantize)(w)
    rows, wide = PackedRows.of([q]), jax.jit(lambda q: q.dequantize()[1])(q)
    if not np.array_equal(unpacked(rows, 1)[:outputs].astype(jnp.float32), wide):
        raise ValueError("unpacked weights are not the numbers that were packed")
    of_a_byte = copy_of(2 * sizes.copied) / (2 * sizes.copied)
    every = range(layers)
    decode = jax.jit(lambda rows: [unpacked(rows, layer) for layer in every])
    seconds = seconds_of(lambda: decode(rows)) / layers
    bytes_moved = outputs * inputs * (2 + 17 / 32)
    against = "a copy of its bytes"
    yield Row(f"unpack {shape}", seconds, against, seconds / bytes_moved / of_a_byte, "<= 1.25")
    narrow = [jnp.asarray(layer, jnp.bfloat16) for layer in w]
    for tokens in range(1, FEW + 1):
        token = FORMAT.encode(jnp.asarray(draw.standard_normal((tokens, inputs), np.float32)))
        (y,) = matvec(token, rows, 1)
        factors = np.asarray(token.dequantize(), np.float64), np.asarray(wide, np.float64).T
        bound = 2.0**-23 * inputs / 32 * np.abs(factors[0]) @ np.abs(factors[1])
        if not np.all(np.abs(np.asarray(y, np.float64) - factors[0] @ factors[1]) <= bound):
            raise ValueError("a product with packed weights is further off than its sums can be")
        given = token.dequantize().astype(jnp.bfloat16)
        plain = jax.jit(lambda x, ws: [exact(x, w, parts=1) for w in ws])
        rival = seconds_of(lambda: plain(given, narrow)) / layers  # noqa: B023
        run = jax.jit(lambda x, rows: [matvec(x, rows, layer) for layer in every])
        seconds = seconds_of(lambda: run(token, rows)) / layers  # noqa: B023
        label = f"{tokens} tokens x {shape}, packed"
        yield Row(label, seconds, "bf16 weights", seconds / rival)
        (y,) = float_matvec(given, rows, 1)  # the same numbers, so the same sums
        if not np.all(np.abs(np.asarray(y, np.float64) - factors[0] @ factors[1]) <= bound):
            raise ValueError("a product with inputs in float is further off than its sums can be")
        run = jax.jit(lambda x, rows: [float_matvec(x, rows, layer) for layer in every])
        seconds = seconds_of(lambda: run(given, rows)) / layers  # noqa: B023
        speed = outputs * inputs * 17 / 32 / seconds / 1e9
        label = f"{tokens} tokens in float x {shape}, packed, {speed:.0f} GB/s"
        yield Row(label, seconds, "bf16 weights", seconds / rival)


def attention(sizes: Sizes) -> Iterator[Row]:
    """Attention of a layer over whole rows, checked first: written out, in a kernel, by cuDNN."""
    config = sizes.model
    heads, d = config.num_key_value_heads, config.head_dim
    groups = config.num_attention_heads // heads
    for dtype, length in itertools.product(
        (jnp.float32, jnp.bfloat16), (sizes.length, sizes.prompt)
    ):
        ends = (groups, d), (d,), (d,)
        q, k, v = (
            jax.random.normal(key, (sizes.rows, length, heads, *end), dtype)
            for key, end in zip(jax.random.split(jax.random.key(0), 3), ends, strict=True)
        )
        calls = {"written out": causal_attention, "the default": flash_attention}
        if dtype == jnp.bfloat16 and fused_attention_runs(d):
            calls["by cuDNN"] = fused_attention
        at, rival = jnp.arange(length, dtype=jnp.int32), None
        law = calls["written out"](q, k, v, at, None, float(d)).astype(jnp.float32)
        for name, call in calls.items():
            run = functools.partial(call, positions=at, window=None, scalar=float(d))
            off = jnp.max(jnp.abs(jax.jit(run)(q, k, v).astype(jnp.float32) - law))
            if not off <= (1e-5 if dtype == jnp.float32 else 0.03):
                raise ValueError(f"attention, {name}, is {off:.1e} from what it is written out")
            seconds = _in_a_loop(run, q, k, v)
            rival = rival or seconds
            label = f"attention, {sizes.rows} rows of {length}, {jnp.dtype(dtype).name}, {name}"
            yield Row(label, seconds, "written out", seconds / rival)


def _in_a_loop(call: Callable[..., jax.Array], q: jax.Array, k: jax.Array, v: jax.Array) -> float:
    """Seconds of a call whose result is the next one's queries; its keys change, too, so that
    nothing that is done to them leaves the loop."""

    @jax.jit
    def loop(q: jax.Array, k: jax.Array, v: jax.Array, one: jax.Array) -> jax.Array:
        def body(_: Any, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            q, k, v = carry
            return call(q, k, v), k * one, v * one

        return jax.lax.fori_loop(0, COPIES, body, (q, k, v))[0]

    one = jnp.ones((), q.dtype)
    return seconds_of(lambda: loop(q, k, v, one)) / COPIES


def rotation(sizes: Sizes) -> Iterator[Row]:
    """Inputs moved and rounded, checked first: against a copy, and each way of doing it."""
    rows, width = sizes.moved
    for shared, goal in ((True, "<= 1.11"), (False, "<= 1.25")):
        case = Case(rows, width, shared=shared, scale_rule=ScaleRule.EVEN)
        made = [case.inputs(jax.random.key(i)) for i in range(COPIES)]
        xs, matrices = [x for x, *_ in made], made[0][1]
        for call in (rotate_quantize, rotate_fake_quantize):
            run = functools.partial(call, scale_rule=case.scale_rule)
            near_reference(run, xs[0][:256], matrices)
            seconds = each(lambda x: run(x, matrices), xs)  # noqa: B023
            size = case.bytes if call is rotate_quantize else 4 * rows * width
            limit = copy_of(size)
            label = f"{call.__name__} {case.name}"
            yield Row(label, seconds, "a copy of its bytes", seconds / limit, goal)
    yield from shares(sizes)


def near_reference(run: Callable[..., Any], x: jax.Array, matrices: jax.Array) -> None:
    """Raises ValueError unless all but a few numbers are those of the reference."""
    pair = [run(x, matrices), run(x, matrices, implementation="reference")]
    mine, law = (np.asarray(y.dequantize() if hasattr(y, "dequantize") else y, np.float32)
                 for y in pair)  # fmt: skip
    if np.mean(mine != law) > 1e-3:
        raise ValueError(f"{np.mean(mine != law):.2%} of the numbers are not the reference's")


def walsh_hadamard(x: jax.Array) -> jax.Array:
    """H x of each block of 32 in five stages of sums and differences, over the root of 32."""
    y = x.astype(jnp.float32).reshape(-1, BLOCK)
    for stage in range(5):
        a, b = jnp.moveaxis(y.reshape(len(y), -1, 2, 2**stage), 2, 0)
        y = jnp.stack([a + b, a - b], axis=2).reshape(len(y), BLOCK)
    return y.reshape(x.shape) * np.float32(BLOCK**-0.5)


def shares(sizes: Sizes) -> Iterator[Row]:
    """All inputs of a layer, four widths, moved and rounded in some ways, for a prompt: seconds of
    all layers of the model, of which the share of a prefill is to be seen."""
    config = sizes.model
    widths = (config.hidden_size,) * 3 + (config.intermediate_size,)
    layers = config.num_hidden_layers
    times: dict[str, float] = {}
    for width in dict.fromkeys(widths):
        key, blocks = jax.random.key(width), width // BLOCK
        x = jax.random.normal(key, (sizes.prompt, width), jnp.bfloat16)
        own = jnp.linalg.qr(jax.random.normal(key, (blocks, BLOCK, BLOCK)))[0]
        for name, call in ways(own).items():
            seconds = each(call, [x + x.dtype.type(i) for i in range(COPIES)])
            times[name] = times.get(name, 0.0) + seconds * layers * widths.count(width)
    for name, seconds in times.items():
        label = f"inputs of {layers} layers, a prompt of {sizes.prompt}: {name}"
        yield Row(label, seconds, "rounded alone", seconds / times["rounded alone"])


def ways(own: jax.Array) -> dict[str, Callable[[jax.Array], Any]]:
    """Ways to move and round an input, by name."""

    def by(implementation: Any, transform: Any) -> Callable[[jax.Array], Any]:
        linear, site = QuantizedLinear(FORMAT, implementation), QuantizedSite(transform, ())
        return lambda x: linear.quantized(x, site, FORMAT).whole().astype(jnp.bfloat16)

    found = {
        "rounded alone": by("xla", Identity()),
        "Hadamard by FWHT": lambda x: by("xla", Identity())(walsh_hadamard(x)),
        "a matrix for all blocks": by("xla", BlockRotation(own[:1])),
        "a matrix a block": by("xla", BlockRotation(own)),
    }
    if jax.default_backend() == "gpu":
        found["a matrix for all blocks, kernel"] = by("triton", BlockRotation(own[:1]))
        found["a matrix a block, kernel"] = by("triton", BlockRotation(own))
    return found
