"""How much faster are two, four or eight devices than one, at the same work?

Hypothesis: evaluation, of which devices share nothing but the sums, 1.9 times on two; a learning
step, on which each device moves and rounds all weights by itself, 1.6 times.

    python -m experiments.bench_devices --out experiments/results/bench_devices.json   # all GPUs
    python -m experiments.bench_devices --tiny                                         # anywhere

An 8B shape is evaluated by the engine that measures (`Reference.nll`), in W4A4, float32 else; a
step through a model of SmolLM2's shape learns from 8,176 tokens. In one run 1, 2, 4, .. devices
share the same rows, whose NLL must be the same within TOLERANCE. Weights are random: sizes and work
are those of real models. A time is the least of REPEATS after the first, which compiles; of a step
as in bench_learning.

Cost: 100 s on two H200.
Last result, 2026-11-30 (results/bench_devices.json): two H200 evaluate 2.00 times as fast as one
  (4,088 tokens, 175 ms and 88), and take a learning step 1.65 times as fast (136 ms and 83).
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from duquantpp_jax import files
from duquantpp_jax.evaluation import Reference
from duquantpp_jax.evaluation.rows import TARGETS
from experiments.bench_fit import least
from experiments.bench_learning import MOVES, step_seconds, through_model
from experiments.shapes import LLAMA, SMALL, SMOLLM2, quantized, random_model, rotations

REPEATS = 3
ROWS = 4
"""Of a batch of evaluation, for each device."""
LEARNED_ROWS = 16
TOLERANCE = 1e-5
"""Largest relative difference of NLL: rows are whole on a device, so none but in how a program is
compiled."""

Times = Iterator[tuple[int, float]]


def evaluation(tiny: bool, counts: Sequence[int]) -> Times:
    """Seconds of the same rows on each number of devices."""
    config, length = (SMALL, 32) if tiny else (LLAMA, TARGETS + 1)
    model = random_model(config)
    predictor = quantized(model, rotations(config, "none"))
    del model
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, config.vocab_size, (ROWS * max(counts), length)).astype(np.int32)
    first = None
    for count in counts:
        engine = Reference(predictor, tokens, batch_rows=ROWS, devices=jax.devices()[:count])
        nll = engine.nll()
        first = nll if first is None else first
        if (off := np.max(np.abs(nll / first - 1))) > TOLERANCE:
            raise ValueError(f"on {count} devices NLL is {off:g} of itself away from one device's")
        yield count, least(engine.nll, REPEATS)[1]
        del engine


def learning(tiny: bool, counts: Sequence[int]) -> Times:
    """Seconds of a step on each number of devices."""
    config, length = (SMALL, 32) if tiny else (SMOLLM2, TARGETS + 1)
    objective, learned = through_model(random_model(config), MOVES)
    draw = np.random.default_rng(0)
    rows = draw.integers(0, config.vocab_size, (LEARNED_ROWS, length)).astype(np.int32)
    for count in counts:
        devices = jax.devices()[:count]
        yield count, step_seconds(objective, learned, rows, LEARNED_ROWS, devices=devices)


WORK: dict[str, Callable[[bool, Sequence[int]], Times]] = {
    "learning": learning,
    "evaluation": evaluation,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="small shapes, eight host devices")
    parser.add_argument("--work", nargs="+", choices=WORK, default=list(WORK))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.tiny:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", 8)
    devices = jax.devices()
    counts = [count for count in (1, 2, 4, 8, 16) if count <= len(devices)]
    found: dict[str, Any] = {"device": devices[0].device_kind, "jax": jax.__version__, "rows": []}
    print(f"{len(devices)} of {devices[0].device_kind}, jax {jax.__version__}")
    for name in options.work:
        alone = None
        for count, seconds in WORK[name](options.tiny, counts):
            alone = alone or seconds
            row = {"work": name, "devices": count, "seconds": seconds, "times": alone / seconds}
            found["rows"].append(row)
            print(f"{name} on {count}: {seconds * 1e3:.1f} ms, {alone / seconds:.2f} times as fast",
                  flush=True)  # fmt: skip
            if options.out:
                files.write_whole(options.out, files.to_json(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
