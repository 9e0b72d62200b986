"""How fast is DuQuant++ fitted, against the plain loop?

Question: how long does the greedy search take for every block of one Llama-3-8B layer (inputs 4096,
4096, 4096 and 14336 wide; 2048 pooled tokens, 128 steps), as a ratio to a loop in NumPy that does
the same, and how does it grow?
Hypothesis: on a CPU twice as fast, bound by the matrix product of each step, 2048 x 32 by 32 x 32
(29 of the 37 us of a step that takes all rows, on one core: XLA splits no product so small); on a
GPU, which takes 64 blocks at once, 20 times, and 32 layers in less than a minute.
Command: python -m experiments.bench_fit [--widths 4096 4096 4096 14336] [--tokens 2048]
    [--steps 128] [--plain-blocks 8] [--no-growth]
Cost: about a minute on two idle cores.
Last result, 2026-11-25, 2 idle cores, jax 0.12.0.1: one layer of 832 blocks 2.49 s, so 32 layers
79.8 s; 3.0 ms a block against 7.7 of the loop in NumPy: 2.57 times as fast; on tokens without tails
5.2 ms a block, 1.5 times as fast. Four times the width takes 4.4 times as long, the tokens 2.1, the
steps 3.7. On one H100 (jax 0.11.2) one layer 0.12 s, 32 layers 3.7 s, 85 times as fast as that loop
on its host; four times the width takes 3.9 times as long, the tokens 2.9, the steps 3.1.

On a CPU the search takes only rows whose norm is above the least criterion, since no rotation can
make the others matter; how many that are is up to the tokens. Of the rows of 2048 tokens of
gutenberg-27m it needs 5 to 27 % before o_proj, 2 to 8 % before down_proj and 83 to 100 % before
q/k/v and up/gate (medians over blocks of layers 0, 1, 4, 7). The tokens here need 25 %.

The loop in NumPy is timed on a few blocks of the same tokens, with its rotations given, and
multiplied up; it takes the threads that its BLAS takes. Ours is the fit as `compare` calls it,
drawing of the rotations and polishing included, the least of several calls after one that compiles.
"""

import argparse
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from duquantpp_jax.core import Stats
from duquantpp_jax.recipes import recipe
from duquantpp_jax.transforms.duquant import FitDuquantpp, mixed_rotations

SIZE = 32
LAYERS = 32
SEED = 1


def plain(x: np.ndarray, rotations: np.ndarray) -> np.ndarray:
    """The greedy search of one block as one would write it: the equations of duquant.py."""
    product = best = np.eye(SIZE, dtype=x.dtype)
    magnitude = np.abs(x)
    peak = int(np.argmax(magnitude))
    least = magnitude.flat[peak]
    for rotation in rotations:
        swap = np.arange(SIZE)
        d = peak % SIZE
        swap[[0, d]] = swap[[d, 0]]
        s = rotation[np.ix_(swap, swap)]
        x, product = x @ s, product @ s
        magnitude = np.abs(x)
        peak = int(np.argmax(magnitude))
        if magnitude.flat[peak] < least:
            least, best = magnitude.flat[peak], product
    return best


def tokens_of(count: int, width: int, tail: float = 5.0) -> jax.Array:
    """Tokens whose channels differ in size: Student's t with `tail` degrees of freedom."""
    rng = np.random.default_rng(width)
    scale = np.exp(0.5 * rng.standard_normal(width))
    return jnp.asarray(scale * rng.standard_t(tail, (count, width)), jnp.float32)


def least(call: Callable[[], object], times: int = 3) -> tuple[float, float]:
    """Seconds of the first call, which compiles, and of the fastest of those after it."""
    seconds = []
    for _ in range(1 + times):
        start = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - start)
    return seconds[0], min(seconds[1:])


def fit_seconds(
    count: int, width: int, steps: int, tail: float = 5.0
) -> tuple[float, float, np.ndarray]:
    """Seconds of the first and of later fits of one site, and the rotations of its blocks."""
    stats = Stats.init(width, 1, count, sample_limit=count)
    stats = stats.update(tokens_of(count, width, tail)[None], jnp.int32(0))
    jax.block_until_ready(stats)
    weights, method = (jnp.ones((1, width)),), recipe("greedy", "floor")
    fit = FitDuquantpp(steps=steps)
    first, later = least(lambda: fit(weights, stats, method, jax.random.key(SEED)).transform)
    return (
        first,
        later,
        np.asarray(fit(weights, stats, method, jax.random.key(SEED)).transform.matrices),
    )


def plain_seconds(count: int, width: int, steps: int, blocks: int, fitted: np.ndarray) -> float:
    """Seconds a block of the loop in NumPy, which must find the same rotations."""
    x = np.asarray(tokens_of(count, width)).reshape(count, -1, SIZE)
    rotations = np.asarray(mixed_rotations(jax.random.key(SEED), steps, SIZE, "left"))
    seconds = []
    for block in range(min(blocks, x.shape[1])):
        tokens = np.ascontiguousarray(x[:, block])
        start = time.perf_counter()
        found = plain(tokens, rotations)
        seconds.append(time.perf_counter() - start)
        # Rounding may turn a near-tie of two channels the other way, and with it what follows.
        peaks = [np.abs(tokens @ r).max() for r in (found, fitted[block])]
        if abs(peaks[0] - peaks[1]) > 0.1 * peaks[0]:
            raise AssertionError(f"block {block}: the loop ends at {peaks[0]}, ours at {peaks[1]}")
    return min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[4096, 4096, 4096, 14336])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--plain-blocks", type=int, default=8, help="blocks that NumPy is timed on")
    parser.add_argument("--no-growth", action="store_true", help="leave out the table of growth")
    options = parser.parse_args()
    count, steps = options.tokens, options.steps
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {count} tokens, {steps} steps")

    times = {width: fit_seconds(count, width, steps) for width in sorted(set(options.widths))}
    layer = sum(times[width][1] for width in options.widths)
    blocks = sum(width // SIZE for width in options.widths)
    narrow = min(times)
    loop = plain_seconds(count, narrow, steps, options.plain_blocks, times[narrow][2])
    for width, (first, later, _) in times.items():
        print(f"width {width:6}: {later:8.3f} s, {later / width * SIZE * 1e3:7.2f} ms a block "
              f"(first call {first:.1f} s)")  # fmt: skip
    print(f"one layer, {blocks} blocks: {layer:.2f} s; {LAYERS} layers: {LAYERS * layer:.1f} s")
    print(f"loop in NumPy: {loop * 1e3:.2f} ms a block, {loop * blocks:.2f} s a layer "
          f"= {loop * blocks / layer:.2f} times as long")  # fmt: skip
    whole = fit_seconds(count, narrow, steps, tail=1e6)[1]
    print(f"width {narrow}, tokens without tails: {whole:.3f} s = {whole / times[narrow][1]:.2f} "
          "times as long")  # fmt: skip
    if options.no_growth:
        return
    for name, cases in {
        "width": [(count, narrow * n, steps) for n in (1, 4)],
        "tokens": [(count * n, narrow, steps) for n in (1, 4)],
        "steps": [(count, narrow, steps * n) for n in (1, 4)],
    }.items():
        grown = [fit_seconds(*case)[1] for case in cases]
        print(f"{name} x 4: {grown[1] / grown[0]:.2f} times as long")


if __name__ == "__main__":
    main()
