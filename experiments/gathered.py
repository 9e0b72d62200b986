"""Which channels should share a block, and can a free rotation of the residual stream gather them?

WUSH leaves an error of sum_b (tr S_b)^2, S_b the singular values of L_w^T L_x of block b. Without
correlations tr S_b = sum_j e_j over the channels of the block, with the *energy*
e_j = rms(x_j) rms(w_j), so blocks of equal energy are best. And rotations R1 of the whole stream,
which are free online, can be searched for the least mean over the sites that read it, each relative
to the energy tr(X^T X W^T W) of its output.

Hypothesis: dealing channels by energy is better than by largest magnitude; a permutation of the
  stream, one for all layers, keeps some of that for nothing; principal components gather more, and
  R1 learned on that error more still.
Method: WUSH and smoothed Hadamard after permutations of each site; and of models turned by an R1:
  none but the gains folded (the control), a permutation by mean energy, principal components of the
  normalized inputs, in order or dealt to the blocks, and the matrix after 400 steps of Adam.
Command: duquantpp ablate experiments/gathered.py --table [--model DIR --text FILE
    --calibration-text FILE]
Cost: 30 cells; learning R1 for SmolLM2 takes some six minutes on an H200 that three runs share.
Last result, 2026-11-29, SmolLM2-135M, 65,408 targets of 8 development books, one seed
  (results/methods_smollm2_128rows.json; KL less that of WUSH, .390 / .341, floor / even):
    zigzag by largest magnitude, WUSH         -.026 +- .007* / -.005 +- .008
    zigzag by energy, WUSH                    -.026 +- .007* / -.007 +- .007
    equal energy, WUSH                        -.025 +- .008* / -.006 +- .008
    R1: gains folded alone, WUSH              -.001 +- .004  / +.009 +- .007
    R1: a permutation by energy, WUSH         +.006 +- .006  / -.002 +- .007
    R1: the permutation, 400 steps, WUSH      +.058 +- .019* / -.009 +- .006
    R1: principal components, dealt, WUSH     +.098 +- .012* / +.119 +- .009*
    R1: principal components in order, WUSH   +.226 +- .009* / +.227 +- .010*
  and less smoothed Hadamard at alpha .7 (.493, floor): gains folded +.002, a permutation by energy
  -.031, after 400 steps -.004, principal components +.298, in order +.800. Nothing free helps WUSH:
  permutations have to be those of each site, by either measure, and principal components do as much
  harm as random rotations do, although the error that R1 is chosen by falls (12.49 to 11.03 in 400
  steps from the permutation). So that is not what costs KL: second moments do not see the few
  largest numbers that set the scales. Under even smoothed Hadamard was measured alone.
"""

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from duquantpp_jax.commands.ablate import AblateOptions, main
from duquantpp_jax.core import Fit, Fitted, Needs, RandomKey, Recipe, Stats, Weights, stack
from duquantpp_jax.evaluation.rows import TARGETS
from duquantpp_jax.evaluation.subject import load_rows
from duquantpp_jax.lab import Cell
from duquantpp_jax.models import SITE_WEIGHTS, Decoder
from duquantpp_jax.models.parameters import EMBEDDING, HEAD, LAYER, NORM, input_norms
from duquantpp_jax.models.products import matmul
from duquantpp_jax.transforms.basic import FitInTurn, FitSmooth, Permute
from duquantpp_jax.transforms.block import BlockAffine
from duquantpp_jax.transforms.hadamard import FitHadamard
from duquantpp_jax.transforms.learned import Cayley
from duquantpp_jax.transforms.permutation import FitPermutation, balanced, zigzag
from duquantpp_jax.transforms.wush import FitWush

SIZE = 32
ROWS_SEEN = 32
"""Calibration rows that an R1 is chosen on."""
RATE = 3e-3
"""Of Adam, at its first step; down a cosine."""
WRITERS = ("self_attn.o_proj", "mlp.down_proj")
Grams = Float[Array, "sites k k"]
Start = Literal["gains", "energy", "components", "components in order"]


@dataclasses.dataclass(frozen=True)
class FitEnergy:
    """Deals channels to blocks by energy, in zigzag or so that each block has the same."""

    kind: Literal["zigzag", "equal"]
    needs = Needs.GRAM

    def __call__(self, weights: Weights, stats: Stats, recipe: Recipe, key: RandomKey) -> Fitted:
        w = np.asarray(stack(weights), np.float64)
        gram = stats.require(Needs.GRAM, "energy")
        x = np.diagonal(np.asarray(gram, np.float64)) / float(stats.count)
        deal = zigzag if self.kind == "zigzag" else balanced
        order = deal(np.sqrt(x * np.mean(w**2, axis=0)), SIZE)
        return Fitted(Permute(jnp.asarray(order, jnp.int32)))


@dataclasses.dataclass(frozen=True)
class Gathered:
    """Turns the residual stream of a model by an R1, its function unchanged.

    Attributes:
      start: The first R1; see the top of this file.
      steps: Of learning, from there.
      model, text, text_key: Whose rows of which calibration text it is chosen on.
    """

    start: Start
    steps: int = 0
    model: Path | None = None
    text: Path | None = None
    text_key: str = "text"

    def __call__(self, model: Decoder) -> Decoder:
        asked = self.text, ROWS_SEEN * TARGETS, "calibration", self.text_key
        rows = load_rows(self.model, *asked).tokens
        old = {name: np.asarray(a, np.float64) for name, a in model.parameters().items()}
        x, w = _moments(model, old, np.asarray(rows, np.int32)[:, :-1])
        rotation = np.asarray(_learned(self._start(x, w), x, w, self.steps), np.float64)
        u, _, vt = np.linalg.svd(rotation)  # orthogonal to the last bit
        return _turned(model, old, u @ vt)

    def _start(self, x: Grams, w: Grams) -> Float[np.ndarray, "k k"]:
        moments, outputs = (np.asarray(grams, np.float64) for grams in (x, w))
        eye = np.eye(moments.shape[-1])
        if self.start == "gains":
            return eye
        if self.start == "energy":
            energy = np.sqrt(np.einsum("skk,skk->sk", moments, outputs))
            return eye[:, zigzag(energy.mean(axis=0), SIZE)]
        share = moments / np.trace(moments, axis1=1, axis2=2)[:, None, None]
        values, vectors = np.linalg.eigh(share.mean(axis=0))
        dealt = self.start == "components"
        return vectors[:, zigzag(values, SIZE)] if dealt else vectors[:, ::-1]


def _moments(
    model: Decoder, parameters: dict[str, np.ndarray], rows: np.ndarray
) -> tuple[Grams, Grams]:
    """X^T X over tr(X^T X W^T W), and W^T W, of each site that reads the stream, gains folded."""

    def capture(site: str, x: Array, weights: Weights, _: Any) -> tuple[Weights, Array]:
        flat = x.reshape(-1, x.shape[-1])
        return tuple(matmul(x, w) for w in weights), matmul(flat.T, flat.T)

    run = jax.jit(lambda model, tokens: model(tokens, capture)[1])
    batches = [run(model, jnp.asarray(b)) for b in np.split(rows, range(4, len(rows), 4))]
    total = jax.tree.map(lambda *parts: sum(parts[1:], parts[0]), *batches)
    inputs, outputs = [], []
    for site, norm in input_norms(model.config).items():
        gains = parameters[LAYER + norm]
        kept = np.asarray(total[site], np.float64) / rows.size
        inputs.append(kept / (gains[:, :, None] * gains[:, None, :]))
        names = [LAYER + name for name in SITE_WEIGHTS[site]]
        w = np.concatenate([parameters[name] * gains[:, None, :] for name in names], axis=1)
        outputs.append(w.mT @ w / w.shape[1])
    x, w = np.concatenate(inputs), np.concatenate(outputs)
    x /= np.einsum("skl,skl->s", x, w)[:, None, None]
    return jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32)


def error(rotation: Float[Array, "k k"], x: Grams, w: Grams) -> Float[Array, ""]:
    """What WUSH leaves, relative to the output, as the mean over the sites."""
    blocks_x, blocks_w = (_blocks(rotation.T @ moments @ rotation) for moments in (x, w))
    factor = jnp.linalg.cholesky(blocks_x)
    s = jnp.sqrt(jnp.maximum(jnp.linalg.eigvalsh(factor.mT @ blocks_w @ factor), 1e-20))
    return jnp.mean(jnp.sum(jnp.square(jnp.sum(s, axis=-1)), axis=-1))


def _blocks(moments: Grams) -> Float[Array, "sites blocks size size"]:
    """The diagonal blocks, each plus 1e-3 of its mean diagonal."""
    count = moments.shape[-1] // SIZE
    each = moments.reshape(-1, count, SIZE, count, SIZE)
    blocks = jnp.moveaxis(jnp.diagonal(each, axis1=1, axis2=3), -1, 1)
    ridge = 1e-3 / SIZE * jnp.trace(blocks, axis1=-2, axis2=-1)
    return blocks + ridge[..., None, None] * jnp.eye(SIZE)


def _learned(
    start: Float[np.ndarray, "k k"], x: Grams, w: Grams, steps: int
) -> Float[Array, "k k"]:
    """R1 after steps of Adam on `error`, by Cayley's map from the start."""
    matrices = jnp.asarray(start, jnp.float32)[None]
    first = BlockAffine(matrices, matrices.mT)
    optimizer = optax.adam(optax.cosine_decay_schedule(RATE, max(1, steps)))
    learned = Cayley().init(first)

    def loss(learned: dict[str, Array]) -> Array:
        return error(Cayley().transform(first, learned).matrices[0], x, w)

    @jax.jit
    def step(learned: dict[str, Array], state: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):  # optax counts on it
            updates, state = optimizer.update(jax.grad(loss)(learned), state)
            return optax.apply_updates(learned, updates), state

    state = optimizer.init(learned)
    with jax.default_matmul_precision("highest"):
        for _ in range(steps):
            learned, state = step(learned, state)
    return Cayley().transform(first, learned).matrices[0]


def _turned(
    model: Decoder, old: dict[str, np.ndarray], rotation: Float[np.ndarray, "k k"]
) -> Decoder:
    """The model whose stream is h R: gains folded, the head a matrix of its own."""
    new = dict(old)
    for site, norm in input_norms(model.config).items():
        gains = old[LAYER + norm]
        for name in SITE_WEIGHTS[site]:
            new[LAYER + name] = (old[LAYER + name] * gains[:, None, :]) @ rotation
        new[LAYER + norm] = np.ones_like(gains)
    for name in WRITERS:
        new[LAYER + name] = rotation.T @ old[LAYER + name]
    new[EMBEDDING] = old[EMBEDDING] @ rotation
    new[HEAD] = (old.get(HEAD, old[EMBEDDING]) * old[NORM]) @ rotation
    new[NORM] = np.ones_like(old[NORM])
    config = dataclasses.replace(model.config, tie_word_embeddings=False)
    return Decoder(config, {name: jnp.asarray(a, jnp.float32) for name, a in new.items()})


FITS: dict[str, Fit] = {
    "wush": FitWush(),
    "smooth_hadamard at .7": FitInTurn((FitSmooth(0.7), FitHadamard())),
    "zigzag by largest magnitude, wush": FitInTurn((FitPermutation("zigzag"), FitWush())),
    "zigzag by energy, wush": FitInTurn((FitEnergy("zigzag"), FitWush())),
    "equal energy, wush": FitInTurn((FitEnergy("equal"), FitWush())),
}
LEARNING_STEPS = 400
TURNS = (
    *(Gathered(start) for start in get_args(Start)),
    Gathered("energy", LEARNING_STEPS),
)
BASELINE = "wush"


def CELLS(options: AblateOptions) -> Iterator[Cell]:
    """The grid, with each R1 chosen on the first calibration text that is given."""
    texts = options.calibration_text or (None,)
    found = {"model": options.model, "text": texts[0], "text_key": options.text_key}
    for rule in ("floor", "even"):
        for name, fit in FITS.items():
            yield Cell(name, rule, fit=fit)
            if name in ("wush", "smooth_hadamard at .7"):
                for turn in TURNS:
                    change = dataclasses.replace(turn, **found)
                    yield Cell(name, rule, fit=fit, change=change)


def ROWS(cell: Cell) -> str:
    """The recipe, and the R1 before it."""
    if not isinstance(cell.change, Gathered):
        return cell.recipe
    learned = f", {cell.change.steps} steps" if cell.change.steps else ""
    return f"{cell.recipe}, R1 by {cell.change.start}{learned}"


if __name__ == "__main__":
    main(sys.modules[__name__])
