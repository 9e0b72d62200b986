"""Which part of the greedy search matters, and how far is it from random rotations, best of N?

Hypothesis: a fresh Q each step and one rotation for each block; the rest is within seeds. A search
  that keeps the best of 128 rotations it stumbles over may be little better than the best of 128
  drawn at random.
Method: from the paper's setting (channel index, largest magnitude, a rotation for each block, fresh
  Q, pooled tokens, 128 steps, no smoothing) one thing is changed at a time. `random, best of N`
  draws N rotations and keeps for each block the one with the least largest magnitude: the same
  criterion on the same tokens, no search.
Command: duquantpp ablate experiments/greedy.py --table
  or python -m experiments.greedy --table, with --model DIR --text FILE --calibration-text FILE for
  another model than the embedded one.
Cost: 104 cells.
Last result, 2026-11-25 (commit bf5fc7c), 65,408 targets, three seeds, H100s
  (results/grid_greedy_*.json), KL less that of the paper's setting, floor / even, on
  gutenberg-27m:
    random_hadamard                 -.0024 +- .0012 / -.0028 +- .0010 (WikiText-2: -.0073, -.0051)
    criterion mse                   -.0016 +- .0012 / -.0025 +- .0008
    one Q                           -.0001 +- .0009 / -.0005 +- .0007
    one rotation for all blocks     +.0024 +- .0013 / +.0024 +- .0008
    released index                  +.0018 +- .0011 / +.0034 +- .0010
    one Q, right                    +.0031 +- .0009 / +.0022 +- .0011
    8 steps; 512 steps              -.0006, +.0018 / -.0015, -.0014
    best of 8 searches              +.0009 +- .0009 / +.0006 +- .0007
    random, best of 128; of 1024    +.0051, +.0017 / +.0054, +.0020
  Half of the hypothesis holds: a rotation for each block matters, a fresh Q does not, nor do steps
  beyond 8, nor choosing among searches. The search is better than random rotations, best of 1024
  (embedded model: by .0042 / .0084), but those are no yardstick: a Hadamard matrix with random
  signs, which has seen no data, is ahead of the search.
  A surprise: choosing by the same criterion among more random rotations is no gain over one of them
  (haar .1244, best of 128 .1248), so the least largest magnitude says little about KL.
  On the embedded model `one Q` is ahead of the paper's setting by .0039 / .0025, and under floor
  random_hadamard equals it (-.0002 +- .0011).
  On SmolLM2-135M (2026-11-30, commit 6353ac3, 8 development books, one H200) the paper's setting
  has .962 / .894 and its three seeds lie .086 / .019 apart, so that little can be told from it: of
  34 differences in KL one is significant, 512 steps under even (-.019 +- .009*; NLL -.021 +- .036),
  and in NLL two, floor: one Q on the right (+.109 +- .039*), random, best of 1024 (+.073 +- .032*).
    random_hadamard; block_hadamard   +.023 +- .151, -.019 +- .105 / +.009 +- .057, +.040 +- .024
    haar; random, best of 1024        +.065 +- .139, +.101 +- .052 / +.128 +- .054, +.104 +- .209
    one rotation for all blocks       +.059 +- .064 / +.061 +- .050
    released index                    +.163 +- .129 / +.089 +- .057
    one Q; one Q, right               -.006, +.116 +- .071 / +.008, +.208 +- .139
    criterion mse; best of 8 searches -.029, +.000 / -.042, +.028
    8 steps; 512 steps                +.023, -.015 / +.008, -.019 +- .009
"""

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from duquantpp_jax.commands.ablate import main
from duquantpp_jax.core import Fitted, Needs, Recipe, Stats, Weights
from duquantpp_jax.lab import Cell
from duquantpp_jax.recipes import FITS
from duquantpp_jax.transforms.block import BlockRotation
from duquantpp_jax.transforms.duquant import FitDuquantpp
from experiments.seeding import seeded


@dataclasses.dataclass(frozen=True)
class FitBestOf:
    """For each block, of `count` uniformly random rotations the one with the least max |x R|.

    The draws serve all blocks, as the greedy search's do.
    """

    count: int
    size: int = 32
    needs = Needs.NOTHING
    draws = True

    def __call__(
        self, weights: Weights, stats: Stats, recipe: Recipe, key: Key[Array, ""]
    ) -> Fitted:
        rotations = jax.random.orthogonal(key, self.size, (self.count,))
        return Fitted(BlockRotation(_best_of(stats.sample, rotations)))


@jax.jit
def _best_of(
    tokens: Float[Array, "tokens k"], rotations: Float[Array, "count n n"]
) -> Float[Array, "blocks n n"]:
    size = rotations.shape[-1]
    blocks = tokens.reshape(tokens.shape[0], -1, size).swapaxes(0, 1)
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

    def best(block: Float[Array, "tokens n"]) -> Float[Array, "n n"]:
        largest = jax.lax.map(lambda r: jnp.max(jnp.abs(product(block, r))), rotations)
        return rotations[jnp.argmin(largest)]

    return jax.lax.map(best, blocks)


_PAPER = FitDuquantpp()
_CHANGES = {
    "released index": {"index": "released"},
    "criterion range": {"criterion": "range"},
    "criterion mse": {"criterion": "mse"},
    "one for all blocks": {"sharing": "shared"},
    "one Q": {"fresh_q": False},
    "one Q, right": {"fresh_q": False, "q_side": "right"},
    "averaged tokens": {"averaged": True},
    "8 steps": {"steps": 8},
    "32 steps": {"steps": 32},
    "512 steps": {"steps": 512},
    "best of 8 searches": {"seeds": 8},
}
_FITS = {
    "block_hadamard": FITS["block_hadamard"],
    "random_hadamard": FITS["random_hadamard"],
    "haar": FITS["haar"],
    "paper": _PAPER,
    **{name: dataclasses.replace(_PAPER, **change) for name, change in _CHANGES.items()},
    **{f"random, best of {n}": FitBestOf(n) for n in (8, 128, 1024)},
}
CELLS = [
    cell
    for name, fit in _FITS.items()
    for rule in ("floor", "even")
    for cell in seeded(Cell(name, rule, fit=fit))
]
BASELINE = "paper"

if __name__ == "__main__":
    main(sys.modules[__name__])
