"""How long does a step of learning take, and how much memory?

Hypothesis: .12 s for SmolLM2's shape and 8,176 tokens; a step through a model of 1B, and through a
block of an 8B, of as many tokens, within the memory of one H200.

    python -m experiments.bench_learning --out experiments/results/bench_learning.json   # one GPU
    python -m experiments.bench_learning --tiny                                          # anywhere

Each part is a process of its own, as a device tells its peak memory once. Weights are random: sizes
and work are those of real models, losses mean nothing. A step is the least, over CHECKS checks, of
the time between two, through STEPS steps and the loss of one held-out row, which is a hundredth.
What is kept is `kept_bytes` of the learning that ran, a bound on what the forward pass keeps.

Cost: four minutes on one H200.
Last result, 2026-11-30 (results/bench_learning.json): SmolLM2's shape .107 s in 23 GiB, with
  attention written out .137 s in 32 GiB; a block of an 8B .036 s in 11 GiB, with its weights .039 s
  in 15 GiB; through 1B .292 s in 7.5 GiB (attention written out, layers run again). A 1B in four
  parts was not measured.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax

from duquantpp_jax import files
from duquantpp_jax.evaluation.rows import TARGETS
from duquantpp_jax.learning import training
from duquantpp_jax.learning.blocks import BlockError
from duquantpp_jax.learning.model import Divergence
from duquantpp_jax.learning.moves import SitesObjective, moves_named
from duquantpp_jax.learning.sharing import kept_bytes
from duquantpp_jax.models import Decoder, DecoderConfig, decoder
from duquantpp_jax.models.layers import positional_of
from duquantpp_jax.ptq.calibration import layers_of
from experiments.shapes import FORMAT, LLAMA, LLAMA_1B, SMALL, SMOLLM2, random_model, starts

STEPS, CHECKS = 4, 4
MOVES = ("affine",)


@dataclasses.dataclass(frozen=True)
class Part:
    """A kind of learning.

    Attributes:
      config: Shape of the model.
      block: Learn one block, by the error of its output, and not through the model.
      accumulate: Parts that a batch is taken in.
      fused: Attention as `learn` has it on a GPU, in cuDNN's kernels; else written out.
    """

    config: DecoderConfig
    goal: str = ""
    moves: tuple[str, ...] = MOVES
    block: bool = False
    accumulate: int = 1
    fused: bool = True


PARTS = {
    "smollm2": Part(SMOLLM2, "<= .12 s"),
    "smollm2_written_out": Part(SMOLLM2, "<= .12 s", fused=False),
    "block_8b": Part(LLAMA, block=True),
    "block_8b_weights": Part(LLAMA, moves=(*MOVES, "weights_moved"), block=True),
    "model_1b": Part(LLAMA_1B),
    "model_1b_in_4": Part(LLAMA_1B, accumulate=4),
}


def through_model(model: Decoder, moves: Sequence[str]) -> tuple[SitesObjective, Any]:
    """Learning through a model, and the parameters at the start."""
    start, chosen = starts(model), moves_named(moves)
    objective = Divergence(start, chosen, (FORMAT, FORMAT), model)
    return objective, {s: chosen.init(start[s], model.weights(s)) for s in start}


def through_block(model: Decoder, moves: Sequence[str]) -> tuple[SitesObjective, Any]:
    """Learning of the first block of a model."""
    chosen, parameters = moves_named(moves), next(layers_of(model))
    start = {site: jax.tree.map(lambda leaf: leaf[0], own) for site, own in starts(model).items()}
    arrays = {name: array.astype(jnp.float32) for name, array in parameters.items()}
    where = positional_of(model.config, 0)
    objective = BlockError(start, chosen, (FORMAT, FORMAT), arrays, where, model.config)
    weights = {site: tuple(w[0] for w in model.weights(site)) for site in start}
    return objective, {s: chosen.init(start[s], weights[s]) for s in start}


def rows_of(part: Part, count: int, length: int) -> Any:
    """Random rows to learn from."""
    draw, config = np.random.default_rng(0), part.config
    if not part.block:
        return draw.integers(0, config.vocab_size, (count, length)).astype(np.int32)
    shape = (count, length - 1, config.hidden_size)
    return draw.standard_normal(shape, np.float32), draw.standard_normal(shape, np.float32)


def step_seconds(
    objective: SitesObjective, learned: Any, rows: Any, batch_rows: int, **options: Any
) -> float:
    """Seconds of a step of learning from batches of as many rows."""
    times: list[float] = []
    training.train(
        objective, learned, rows, jax.tree.map(lambda a: a[:1], rows), jax.random.key(0),
        steps=STEPS * (1 + CHECKS), check_every=STEPS, batch_rows=batch_rows,
        optimizer=optax.adam(1e-3), callback=lambda *_: times.append(time.perf_counter()),
        **options,
    )  # fmt: skip
    return float(min(np.diff(times))) / STEPS


def measured(part: Part, count: int, length: int) -> dict[str, Any]:
    """Seconds and memory of a step."""
    config, through = part.config, through_block if part.block else through_model
    model = random_model(dataclasses.replace(config, num_hidden_layers=1) if part.block else config)
    objective, learned = through(model, part.moves)
    rows = rows_of(part, count, length)
    ran: list[tuple[int, bool]] = []
    tight: Callable[..., bool] = training._tight

    def watched(given: Any, learned: Any, rows: Any, sharing: Any, each: int) -> bool:
        some = jax.tree.map(lambda a: jax.ShapeDtypeStruct((each, *a.shape[1:]), a.dtype), rows)
        found = tight(given, learned, rows, sharing, each)
        ran.append((kept_bytes(given.sparing() if found else given, learned, some), found))
        return found

    runs = decoder.fused_attention_runs if part.fused else lambda _: False
    with mock.patch.object(training, "_tight", watched), \
            mock.patch.object(decoder, "fused_attention_runs", runs):  # fmt: skip
        seconds = step_seconds(objective, learned, rows, count, accumulate=part.accumulate,
                               devices=jax.local_devices()[:1])  # fmt: skip
    device = jax.local_devices()[0]
    memory = None if device.platform == "cpu" else device.memory_stats()
    kept, again = ran[0]
    return {
        "tokens": count * (length - 1),
        "seconds": seconds,
        "goal": part.goal,
        "attention": "fused" if not part.block and runs(config.head_dim) else "written out",
        "layers run again": again,
        "kept GiB": kept / 2**30,
        "peak GiB": None if memory is None else memory["peak_bytes_in_use"] / 2**30,
        "device": device.device_kind,
        "jax": jax.__version__,
    }


def tiny(part: Part) -> Part:
    """The part with a small model."""
    return dataclasses.replace(part, config=SMALL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="a small shape, for any device")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rows", type=int, default=16, help="of a batch")
    parser.add_argument("--out", type=Path, help="parts that it holds are not measured again")
    parser.add_argument("--here", choices=PARTS, help="one part in this process, as JSON")
    options = parser.parse_args()
    length = 32 if options.tiny else TARGETS + 1
    if options.here:
        part = PARTS[options.here]
        found = measured(tiny(part) if options.tiny else part, options.rows, length)
        print(json.dumps(found))
        return 0
    results: dict[str, Any] = {}
    if options.out and options.out.is_file():
        results = files.read_json(options.out)
    failed = 0
    for name in options.parts:
        if "seconds" in results.get(name, {}):
            continue
        command = [sys.executable, "-m", "experiments.bench_learning", "--here", name]
        command += ["--rows", str(options.rows), *["--tiny"] * options.tiny]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            failed += 1
            results[name] = {"error": done.stderr.strip()[-600:]}
            print(f"{name}: {done.stderr.strip()[-600:]}", flush=True)
        else:
            results[name] = json.loads(done.stdout.splitlines()[-1])
            said = ", ".join(f"{key} {value}" for key, value in results[name].items())
            print(f"{name}: {said}", flush=True)
        if options.out:
            files.write_whole(options.out, files.to_json(results))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
