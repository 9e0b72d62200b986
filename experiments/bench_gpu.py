"""How near to bfloat16 and to the memory's speed does a GPU run what the commands run?

Hypothesis: the goals beside each row below, all ratios of one run.

    python -m experiments.bench_gpu --out experiments/results/bench_gpu.json     # one GPU
    python -m experiments.bench_gpu --tiny --parts limits linear                 # anywhere

First the limits of the device (copy, bfloat16 matmul), then times, those of single kernels after
their results are checked: evaluation of an 8B shape by the engine that measures (`Reference.nll`),
prefill and decode by what `generate` runs, the same with inputs moved in four ways, a learning step
of SmolLM2's shape, one 8B layer quantized by RTN. Weights are random: sizes, shapes and work are
those of real models, outputs mean nothing. A time is the least of REPEATS calls after the first,
which compiles.

Cost: six minutes on one H200.
Last result, 2026-12-01 (results/bench_gpu_*.json): evaluation in W4A4 1.28 times bfloat16, with a
  matrix for each block 1.29, by --compute bf16 1.03 and 1.02; prefill with packed weights .97,
  decode .60, with inputs in float 1.05 and .84. A matrix for each block adds nothing to a prefill
  and 6 % to a token, FWHT 37 and 29 %. What bounds each: docs/performance.md. The
  part `attention` has not run on a GPU.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from duquantpp_jax import files
from duquantpp_jax.evaluation import Predictor, Reference
from duquantpp_jax.learning.training import held_out_loss
from duquantpp_jax.models import Decoder, dense
from duquantpp_jax.models.parameters import LAYER
from duquantpp_jax.models.sampling import generate
from duquantpp_jax.ptq.layout import decoded_once, for_writing
from duquantpp_jax.ptq.plan import Plan
from duquantpp_jax.ptq.site import QuantizedLinear
from duquantpp_jax.ptq.stores import store
from duquantpp_jax.ptq.walk import quantize_layer
from duquantpp_jax.recipes import recipe
from experiments.bench_fit import least
from experiments.bench_kernels import (
    FULL,
    REPEATS,
    TINY,
    Row,
    Sizes,
    attention,
    limits,
    linear,
    packed,
    rotation,
    seconds_of,
    walsh_hadamard,
)
from experiments.bench_learning import MOVES, step_seconds, through_model
from experiments.shapes import (
    FORMAT,
    Matrices,
    quantized,
    random_model,
    rotations,
)


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
    written_out = ", --attention xla"
    plain = Predictor(model, attention="xla")
    own = seconds(plain, jnp.bfloat16)
    yield Row(f"{what}, model in bf16{written_out}", own, "model in bf16", own / rival)
    kinds: dict[str, tuple[Matrices, str]] = {
        "nothing": ("none", "<= 1.25"),
        "a matrix a block": ("block", "<= 1.4"),
    }
    for name, (matrices, goal) in kinds.items():
        predictor = quantized(model, rotations(config, matrices))
        by_xla = dataclasses.replace(predictor, linear=QuantizedLinear(FORMAT, "xla"))
        plain = dataclasses.replace(predictor, attention="xla")
        for (compute, dtype), (how, engine) in itertools.product(
            {"bf16": jnp.bfloat16, "float32": jnp.float32}.items(),
            {"": predictor, ", --implementation xla": by_xla, written_out: plain}.items(),
        ):
            own = seconds(engine, dtype)
            yield Row(
                f"{what}, W4A4 moved by {name}, --compute {compute}{how}",
                own,
                "model in bf16",
                own / rival,
                goal,
            )


def generation(sizes: Sizes) -> Iterator[Row]:
    """Prefill and decode as `generate` runs them, a single prompt, a bf16 cache."""
    config, model = sizes.model, random_model(sizes.model).computing(jnp.bfloat16)
    moved = quantized(model, rotations(config, "block"))
    plain = store("bf16", config.head_dim, implementation="xla")
    device = jax.devices()[0]
    state = decoded_once(moved.state, device)
    held, in_float = for_writing(moved.linear, moved.state, device), QuantizedLinear(None)
    beside_float = for_writing(in_float, moved.state, device)
    kinds: dict[str, tuple[Decoder, dict[str, Any]]] = {
        "model in bf16": (model, {"linear": dense}),
        "model in bf16, --implementation xla": (model, {"linear": dense, "store": plain}),
        "W4 decoded at use": (moved.model, {"linear": moved.linear, "state": moved.state}),
        "W4 decoded before": (moved.model, {"linear": moved.linear, "state": state}),
        "W4 packed": (moved.model, {"linear": moved.linear, "state": held}),
        "W4A16 decoded before": (moved.model, {"linear": in_float, "state": state}),
        "W4A16 packed": (moved.model, {"linear": in_float, "state": beside_float}),
    }
    rivals: dict[str, float] = {}
    for name, (decoder, given) in kinds.items():
        goals = {"prefill": "<= 1.11", "decode": "<= .43"}
        for what, seconds in writing(decoder, given, sizes).items():
            rival = rivals.setdefault(what, seconds)
            beside = {} if seconds is rival else {"against": "model in bf16"}
            ratio = seconds / rival if beside else None
            label = f"{what}, {config.num_hidden_layers} layers, {name}"
            goal = goals[what.split()[0]] if beside else ""
            yield Row(label, seconds, ratio=ratio, goal=goal, **beside)


def writing(decoder: Decoder, given: dict[str, Any], sizes: Sizes) -> dict[str, float]:
    """Seconds of a prefill, and of a token after it, as `generate` runs them."""
    config, draw = sizes.model, np.random.default_rng(0)
    long = draw.integers(0, config.vocab_size, sizes.prompt).tolist()
    short, least_new = long[: 2 * sizes.new], sizes.new // 2  # of one capacity
    options: dict[str, Any] = {"store": store("bf16", config.head_dim)} | given
    decoder = decoder.computing(jnp.bfloat16)
    run = functools.partial(generate, decoder, key=jax.random.key(0), **options)
    tokens = seconds_of(lambda: run([short], new=least_new + sizes.new))
    tokens -= seconds_of(lambda: run([short], new=least_new))
    prefill = seconds_of(lambda: run([long], new=1))
    return {f"prefill of {sizes.prompt} tokens": prefill, "decode a token": tokens / sizes.new}


def moving(sizes: Sizes) -> Iterator[Row]:
    """What moving inputs adds to a prefill and to a token, whole, with packed weights.

    The kernels that round multiply with the identity where nothing moves, so a matrix costs them
    no more than to read it. With FWHT norms, activations and additions of a token are kernels of
    their own, which is a part of what it costs.
    """
    config, model = sizes.model, random_model(sizes.model)
    rivals: dict[str, float] = {}
    kinds: dict[str, Matrices] = {
        "by nothing": "none",
        "by Hadamard as FWHT": "none",
        "by a matrix for all blocks": "shared",
        "by a matrix a block": "block",
    }
    for name, matrices in kinds.items():
        predictor = quantized(model, rotations(config, matrices))
        state = for_writing(predictor.linear, predictor.state, jax.devices()[0])
        linear: Any = predictor.linear
        if "FWHT" in name:
            linear = functools.partial(_after_hadamard, predictor.linear)
        given = {"linear": linear, "state": state}
        for what, seconds in writing(predictor.model, given, sizes).items():
            rival = rivals.setdefault(what, seconds)
            label = f"{what}, {config.num_hidden_layers} layers, inputs moved {name}"
            yield Row(label, seconds, "nothing moved", seconds / rival)


def _after_hadamard(linear: Any, site: str, x: jax.Array, weights: Any, state: Any) -> Any:
    """A linear whose input is moved by `walsh_hadamard` before."""
    return linear(site, walsh_hadamard(x), weights, state)


def learning(sizes: Sizes) -> Iterator[Row]:
    """A step of learning through the model, and the loss on a batch, which has no backward pass."""
    config, rows = sizes.learned, sizes.learned_rows
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (rows, sizes.length + 1))
    tokens = tokens.astype(np.int32)
    objective, learned = through_model(random_model(config), MOVES)
    seconds = step_seconds(objective, learned, tokens, rows, devices=jax.local_devices()[:1])
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
    "attention": attention,
    "rotation": rotation,
    "evaluation": evaluation,
    "generation": generation,
    "moving": moving,
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
