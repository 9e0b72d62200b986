"""How near to bfloat16 and to the memory's speed does a GPU run what the commands run?

Hypothesis: the goals beside each row below, all ratios of one run.

    python -m experiments.bench_gpu --out experiments/results/bench_gpu.json     # one GPU
    python -m experiments.bench_gpu --tiny --parts limits linear                 # anywhere

First the limits of the device (copy, bfloat16 matmul), then results are checked, then times are
taken: evaluation of an 8B shape by the engine that measures (`Reference.nll`), prefill and decode
by what `generate` runs, a learning step of SmolLM2's shape, one 8B layer quantized by RTN. Weights
are random: sizes, shapes and work are those of real models, outputs mean nothing. A time is the
least of REPEATS calls after the first, which compiles.

Cost: three minutes on one H200.
Last result, 2026-11-30 (results/bench_gpu.json): evaluation in W4A4 1.33 times bfloat16, with a
  matrix for each block 1.41, by --compute bf16 1.07 and 1.16; prefill 1.16, decode 1.11; a
  learning step .148 s. Decode with packed weights .76 in a run of its own
  (results/bench_gpu_generation.json). What bounds each: docs/performance.md.
"""

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from duquantpp_jax import files
from duquantpp_jax.evaluation import Predictor, Reference
from duquantpp_jax.evaluation.rows import TARGETS
from duquantpp_jax.kernels.matvec.api import FEW, matvec, unpacked
from duquantpp_jax.kernels.matvec.rows import PackedRows
from duquantpp_jax.learning.model import Divergence
from duquantpp_jax.learning.moves import moves_named
from duquantpp_jax.learning.training import held_out_loss, train
from duquantpp_jax.models import SITES, Decoder, DecoderConfig, dense
from duquantpp_jax.models.parameters import LAYER
from duquantpp_jax.models.products import exact
from duquantpp_jax.models.sampling import generate
from duquantpp_jax.ptq.layout import decoded_once, for_writing
from duquantpp_jax.ptq.plan import Plan
from duquantpp_jax.ptq.site import QuantizedLinear, QuantizedSite
from duquantpp_jax.ptq.stores import store
from duquantpp_jax.ptq.walk import quantize_layer
from duquantpp_jax.recipes import recipe
from duquantpp_jax.transforms.basic import Identity
from duquantpp_jax.transforms.block import BlockAffine
from experiments.bench_fit import least
from experiments.shapes import (
    BLOCK,
    FORMAT,
    LLAMA,
    SMALL,
    SMOLLM2,
    quantized,
    random_model,
    rotations,
)

REPEATS = 3


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Shapes of all parts.

    Attributes:
      model: Of evaluation, generation and quantizing.
      learned: Of the learning step.
      linear: Tokens, inputs and outputs of the linear that is checked and timed alone.
      rows, learned_rows: Of `TARGETS` tokens.
      copied: Bytes. side: of the square matmul.
      prompt: Tokens read by prefill. new: tokens decoded.
    """

    model: DecoderConfig
    learned: DecoderConfig
    linear: tuple[int, int, int]
    rows: int
    learned_rows: int
    length: int
    copied: int
    side: int
    prompt: int
    new: int


FULL = Sizes(LLAMA, SMOLLM2, (2048, 4096, 14336), 4, 16, TARGETS, 2**30, 8192, 2048, 64)
TINY = Sizes(SMALL, SMALL, (8, 64, 48), 2, 2, 31, 2**20, 64, 40, 4)


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


def limits(sizes: Sizes) -> Iterator[Row]:
    """Copy and bfloat16 matmul: what the device can do."""
    x, side = jnp.zeros(sizes.copied // 2, jnp.bfloat16), sizes.side
    copy = jax.jit(lambda x: x + jnp.bfloat16(1))
    seconds = seconds_of(lambda: copy(x))
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
    copy = jax.jit(lambda x: x + jnp.bfloat16(1))
    x = jnp.zeros(sizes.copied // 2, jnp.bfloat16)
    of_a_byte = seconds_of(lambda: copy(x)) / (2 * sizes.copied)
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


def evaluation(sizes: Sizes) -> Iterator[Row]:
    """Evaluation as `evaluate` runs it, a batch of rows."""
    config, model = sizes.model, random_model(sizes.model)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (sizes.rows, sizes.length + 1))
    tokens, count = tokens.astype(np.int32), sizes.rows * sizes.length
    what = f"evaluation, {config.num_hidden_layers} layers, {count} tokens"

    def seconds(predictor: Predictor, dtype: Any) -> float:
        model = predictor.model.computing(dtype)
        engine = Reference(dataclasses.replace(predictor, model=model), tokens)
        return seconds_of(engine.nll)

    rival = seconds(Predictor(model), jnp.bfloat16)
    yield Row(f"{what}, model in bf16", rival)
    for name, goal in {"nothing": "<= 1.25", "a matrix a block": "<= 1.4"}.items():
        predictor = quantized(model, rotations(config, per_block=name != "nothing"))
        for compute, dtype in {"bf16": jnp.bfloat16, "float32": jnp.float32}.items():
            own = seconds(predictor, dtype)
            yield Row(
                f"{what}, W4A4 moved by {name}, --compute {compute}",
                own,
                "model in bf16",
                own / rival,
                goal,
            )


def generation(sizes: Sizes) -> Iterator[Row]:
    """Prefill and decode as `generate` runs them, a single prompt, a bf16 cache."""
    config, model = sizes.model, random_model(sizes.model).computing(jnp.bfloat16)
    moved = quantized(model, rotations(config, per_block=True))
    options: Any = {"store": store("bf16", config.head_dim)}
    device = jax.devices()[0]
    state = decoded_once(moved.state, device)
    held = for_writing(moved.linear, moved.state, device)
    kinds: dict[str, tuple[Decoder, dict[str, Any]]] = {
        "model in bf16": (model, {"linear": dense}),
        "W4 decoded at use": (moved.model, {"linear": moved.linear, "state": moved.state}),
        "W4 decoded before": (moved.model, {"linear": moved.linear, "state": state}),
        "W4 packed": (moved.model, {"linear": moved.linear, "state": held}),
    }
    draw = np.random.default_rng(0)
    long = draw.integers(0, config.vocab_size, sizes.prompt).tolist()
    short, least_new = long[: 2 * sizes.new], sizes.new // 2  # of one capacity
    rivals: dict[str, float] = {}
    for name, (decoder, given) in kinds.items():
        decoder = decoder.computing(jnp.bfloat16)
        run = functools.partial(generate, decoder, key=jax.random.key(0), **options, **given)
        times = {
            "prefill": seconds_of(lambda: run([long], new=1)),  # noqa: B023
            "decode": (
                seconds_of(lambda: run([short], new=least_new + sizes.new))  # noqa: B023
                - seconds_of(lambda: run([short], new=least_new))  # noqa: B023
            )
            / sizes.new,
        }
        goals = {"prefill": "<= 1.11", "decode": "<= .43"}
        for what, seconds in times.items():
            tokens = f"prefill of {sizes.prompt} tokens" if what == "prefill" else "decode a token"
            rival = rivals.setdefault(what, seconds)
            beside = {} if given.get("state") is None else {"against": "model in bf16"}
            ratio = seconds / rival if beside else None
            label = f"{tokens}, {config.num_hidden_layers} layers, {name}"
            yield Row(label, seconds, ratio=ratio, goal=goals[what] if beside else "", **beside)


def learning(sizes: Sizes) -> Iterator[Row]:
    """A step of learning through the model, and the loss on a batch, which has no backward pass."""
    config, model, rows = sizes.learned, random_model(sizes.learned), sizes.learned_rows
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (rows, sizes.length + 1))
    tokens, steps = jnp.asarray(tokens, jnp.int32), 4  # between checks
    start = {}
    for site in SITES:
        width = model.weights(site)[0].shape[-1]
        eyes = jnp.broadcast_to(jnp.eye(BLOCK), (config.num_hidden_layers, width // BLOCK, 32, 32))
        start[site] = BlockAffine(eyes, eyes)
    moves, optimizer = moves_named(["affine"]), optax.adam(1e-3)
    objective = Divergence(start, moves, (FORMAT, FORMAT), model)
    learned = {s: moves.init(start[s], model.weights(s)) for s in start}
    held = tokens[:1]

    def run(steps: int) -> object:
        options: Any = {"steps": steps, "check_every": 4, "batch_rows": rows}
        return train(objective, learned, tokens, held, jax.random.key(0), optimizer=optimizer,
                     **options).history  # fmt: skip

    loss = seconds_of(lambda: held_out_loss(objective, learned, held, 1))
    seconds = (seconds_of(lambda: run(3 * steps)) - seconds_of(lambda: run(steps))) / (2 * steps)
    seconds -= loss / steps
    what = f"learning step, {config.num_hidden_layers} layers, {rows * sizes.length} tokens"
    forward = seconds_of(lambda: held_out_loss(objective, learned, tokens, rows))
    yield Row(what, seconds, "both forward passes", seconds / forward, "<= .12 s")
    yield Row("the loss of such a batch", forward)


def layer(sizes: Sizes) -> Iterator[Row]:
    """A layer quantized by `quantize`'s walk: calibrated, moved, rounded to nearest."""
    config = sizes.model
    parameters = {
        name.removeprefix(LAYER): array[0]
        for name, array in random_model(
            dataclasses.replace(config, num_hidden_layers=1)
        ).parameters().items()
        if name.startswith(LAYER)
    }  # fmt: skip
    plan = Plan.of(config, recipe("block_hadamard", "even"))
    shape = (4 * sizes.rows, sizes.length, config.hidden_size)
    hidden = np.random.default_rng(0).standard_normal(shape, np.float32)

    def run() -> Any:
        made = quantize_layer(plan, 0, parameters, hidden.copy())
        return jax.block_until_ready(made.sites)

    first, later = least(run, REPEATS)
    what = f"one layer quantized by RTN, {shape[0]} rows"
    yield Row(f"{what}, the first, compiling", first)
    yield Row(what, later, "", None, "< 5.6 s (3 minutes of 32)")


PARTS: dict[str, Callable[[Sizes], Iterator[Row]]] = {
    "limits": limits,
    "linear": linear,
    "packed": packed,
    "evaluation": evaluation,
    "generation": generation,
    "learning": learning,
    "layer": layer,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="small shapes, for any device")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--layers", type=int, help="of the large model, in place of 32")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    sizes = TINY if options.tiny else FULL
    if options.layers:
        config = dataclasses.replace(sizes.model, num_hidden_layers=options.layers)
        sizes = dataclasses.replace(sizes, model=config)
    device = jax.devices()[0]
    found: dict[str, Any] = {"device": device.device_kind, "jax": jax.__version__, "rows": []}
    print(f"{device.device_kind}, jax {jax.__version__}")
    for part in options.parts:
        for row in PARTS[part](sizes):
            ratio = "" if row.ratio is None else f"{row.ratio:.2f} x {row.against}"
            print(f"{row.work:<84}{row.seconds * 1e3:>11.3f} ms  {ratio:<28}{row.goal}", flush=True)
            found["rows"].append({"part": part} | dataclasses.asdict(row))
            if options.out:
                files.write_whole(options.out, json.dumps(found, indent=1).encode() + b"\n")


if __name__ == "__main__":
    sys.exit(main())
