"""Which cheap ideas beat WUSH on a real model, without a step of learning through it?

Hypothesis: an error that is measured at a site, in the formats of the recipe, chooses better than
  second moments do, which do not see the few largest numbers that set the scales.
Method, of each site or block b, on the token sample, with x^ = Q(x T) and W^ = Q(W T^-T):
    brake           WUSH with S^(-l/2) in place of S^(-1/2), KBBQ's (arXiv 2609.08135); l fixed, or
                    of each block the l of least error |x_b W_b^T - x^_b W^_b^T|^2, of each token
                    relative to its output
    equal tokens    WUSH on second moments of tokens divided by their norm: a massive token counts
                    no more than another
    phase           T of a block times 2^(i/8), i = 0 .. 7, by least error: where amax falls between
                    two powers of two
    best rotation   of 8 random Hadamard matrices after WUSH, that of least error of each block
    gains           rows of W times g = <y, y^> / <y^, y^>, which is what E2M1 shrinks them by
                    (arXiv 2606.20381), then moved and rounded
    best of kinds   of each site the best of WUSH, WUSH on equal tokens and smoothed Hadamard
    alpha           smoothed Hadamard, of each site or block the alpha in .5 .. .8 of least error
    threshold       the scale doubles where amax is above t, in units of the scale: 6 is rceil, 7
                    even, 8 floor; 6.5, 7.25 and 7.5 are what auto-round and others try
    roundings       WUSH with weights rounded by each of GPTQ's relatives
Command: duquantpp ablate experiments/ideas.py --table [--model DIR --text FILE
    --calibration-text FILE]
Cost: 66 cells; on an H200 that two runs shared 7 s each, those that choose by block up to 55 s.
Last result, 2026-11-30, SmolLM2-135M, 65,408 targets of 8 development books, floor, weights to
  nearest, one seed, jax 0.11.2: 16 cells (results/grid_ideas_smollm2_128rows.json), and 20 under
  even (below). Those under rceil, of the thresholds, and of GPTQ and its relatives under floor were
  not measured. KL, and its difference to
  WUSH, .392 (excess NLL .345); * significant after Holm's correction over the table:
    zigzag, brake by block        .372   -.020 +- .005*   NLL -.024 +- .012*
    gains                         .381   -.011 +- .008    NLL -.020 +- .007*
    brake 1.25; .75; .5           .384, .386, .460   -.008 +- .010, -.006 +- .009, +.067 +- .010*
    best rotation by block        .392   -.001 +- .006
    phase by block                .401   +.009 +- .009
    brake by block                .419   +.027 +- .010*
    equal tokens; after zigzag    .440, .424   +.048 +- .012*, +.032 +- .010*
    best of kinds by site         .451   +.058 +- .014*
  and to smoothed Hadamard at alpha .7, .491 (.438), not corrected:
    alpha by site                 .504   +.014 +- .009    NLL +.031 +- .011
    alpha by block                .467   -.024 +- .008    NLL -.019 +- .015
    zigzag, alpha by block        .422   -.069 +- .013    NLL -.092 +- .036
  The hypothesis is wrong: of what chooses by the error at a site only smoothing by block gains, and
  what chooses exponents, phases or kinds of transforms so does harm or nothing, although the mean
  SQNR of the linears rises (WUSH 18.97 dB; 19.07, 19.22, 19.10). What WUSH gains after zigzag it
  has from zigzag (.364 without a brake, gathered.py). Smoothing by block after zigzag comes within
  .03 of WUSH, and is level with it in NLL (+.000 +- .022). Gains of rows, free when served, are the
  one new gain for WUSH, too small to be sure of in KL. Nothing here is near what is learned through
  the model (.248, .228).
  Under even (results/grid_ideas_even_smollm2_128rows.json; WUSH .341, excess NLL .305) less is
  left: gains .330 (-.010 +- .005*, NLL -.027 +- .016*), best rotation .341, after zigzag brake by
  block .340 (-.000 +- .005); brake .75, 1.25 and by block +.022*, +.032*, +.013*, phase by block
  +.017*, equal tokens +.109*, best of kinds +.121*. Smoothed Hadamard at alpha .7 has .456, alpha
  by site .449, by block .436, after zigzag .398. Weights by GPTQ .284 (-.057 +- .006*), gptq_scale
  .278 (-.062 +- .005*), descent .274 (-.067 +- .005*), asymmetric descent .307 (-.033 +- .014*).
"""

import dataclasses
import functools
import operator
import sys
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from duquantpp_jax.commands.ablate import main
from duquantpp_jax.core import (
    Fit,
    Fitted,
    Format,
    Needs,
    RandomKey,
    Recipe,
    Stats,
    Weights,
    stack,
)
from duquantpp_jax.formats import MXFP4
from duquantpp_jax.formats.division import split
from duquantpp_jax.formats.elements import encode
from duquantpp_jax.formats.mx import Blocks, Rng, Rounded
from duquantpp_jax.formats.scales import clamp, clipped_amax
from duquantpp_jax.lab import Cell
from duquantpp_jax.transforms.basic import FitInTurn, FitSmooth
from duquantpp_jax.transforms.block import BlockAffine
from duquantpp_jax.transforms.hadamard import FitHadamard, hadamard
from duquantpp_jax.transforms.learned import block_affine
from duquantpp_jax.transforms.permutation import FitPermutation
from duquantpp_jax.transforms.wush import FitWush, block_gram, damped_moments

SIZE = 32
DAMPING = 1e-3
_product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
Formats = tuple[Format, Format]
"""Of activations and of weights."""


@dataclasses.dataclass(frozen=True)
class FitBrake:
    """WUSH with an exponent: T = H S^(-l/2) U^T L_w^T, of moments of all tokens or equal ones.

    Attributes:
      exponent: l; 1 is WUSH.
      equal_tokens: Second moments of the token sample, each token divided by its norm.
    """

    exponent: float = 1.0
    equal_tokens: bool = False
    needs = Needs.GRAM

    def __call__(self, weights: Weights, stats: Stats, recipe: Recipe, key: RandomKey) -> Fitted:
        w = np.asarray(stack(weights), np.float64)
        if self.equal_tokens:
            x = np.asarray(stats.sample, np.float64)
            x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-30)
            moments = x.T @ x / len(x)
        else:
            gram = stats.require(Needs.GRAM, "WUSH")
            moments = np.asarray(gram, np.float64) / float(stats.count)
        both = np.stack([block_gram(m, SIZE) for m in (moments, w.T @ w / len(w))])
        l_x, l_w = np.linalg.cholesky(damped_moments(both, DAMPING))
        u, s, _ = np.linalg.svd(l_w.mT @ l_x)
        s **= self.exponent / 2
        h = np.asarray(hadamard(SIZE), np.float64)
        # T^T = L_w U S^(-l/2) H^T, and its inverse H S^(l/2) U^T L_w^-1.
        forward = (l_w @ u / s[:, None, :]) @ h.T
        back = h @ (s[:, :, None] * u.mT) @ np.linalg.inv(l_w)
        return Fitted(BlockAffine(*(jnp.asarray(m, jnp.float32) for m in (forward, back))))


@dataclasses.dataclass(frozen=True)
class FitScaled:
    """A fit whose matrices are multiplied by a number, and their inverses divided by it."""

    fit: Fit
    factor: float

    @property
    def needs(self) -> Needs:
        return self.fit.needs

    def __call__(self, weights: Weights, stats: Stats, recipe: Recipe, key: RandomKey) -> Fitted:
        moved = _affine(self.fit(weights, stats, recipe, key), stats)
        return Fitted(BlockAffine(moved.matrices * self.factor, moved.inverses / self.factor))


@dataclasses.dataclass(frozen=True)
class FitBest:
    """Of several fits the one whose error, in the formats of the recipe, is least.

    Attributes:
      fits: They lower to matrices of one block, and hold no weights.
      per: Whether each block chooses for itself, by its own part of the output, or the whole site.
    """

    fits: tuple[Fit, ...]
    per: Literal["site", "block"] = "block"

    @property
    def needs(self) -> Needs:
        each = (fit.needs for fit in self.fits)
        return functools.reduce(operator.or_, each, Needs.FORMATS)

    @property
    def draws(self) -> bool:
        return any(getattr(fit, "draws", False) for fit in self.fits)

    def __call__(self, weights: Weights, stats: Stats, recipe: Recipe, key: RandomKey) -> Fitted:
        keys = jax.random.split(key, len(self.fits))
        found = [
            _affine(fit(weights, stats, recipe, fit_key), stats)
            for fit, fit_key in zip(self.fits, keys, strict=True)
        ]
        formats = recipe.activation_format, recipe.weight_format
        error = block_errors if self.per == "block" else site_error
        errors = [error(stats.sample, stack(weights), moved, formats=formats) for moved in found]
        best = jnp.argmin(jnp.stack(errors), axis=0)
        every = jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)
        return Fitted(jax.tree.map(lambda a: _chosen(a, best), every))


def _affine(fitted: Fitted, stats: Stats) -> BlockAffine:
    """The matrices of a fit, of every block."""
    width = stats.absmax.shape[-1]
    moved = block_affine(fitted.transform, width, SIZE)
    shape = (width // SIZE, SIZE, SIZE)
    return jax.tree.map(lambda a: jnp.broadcast_to(a, shape), moved)


def _chosen(every: Float[Array, "fits blocks n n"], best: Array) -> Float[Array, "blocks n n"]:
    best = jnp.broadcast_to(best, every.shape[1:2])
    return jnp.take_along_axis(every, best[None, :, None, None], axis=0)[0]


@functools.partial(jax.jit, static_argnames="formats")
def block_errors(
    x: Float[Array, "tokens k"], w: Float[Array, "n k"], moved: BlockAffine, *, formats: Formats
) -> Float[Array, " blocks"]:
    """Mean over tokens of |x_b W_b^T - x^_b W^_b^T|^2 / |x W^T|^2 of each block b."""
    rounded = formats[0].fake_quantize(moved.activations(x))
    seen = formats[1].fake_quantize(moved.weights(w))
    # |a B^T - c D^T|^2 = [a, -c] [B, D]^T [B, D] [a, -c]^T
    both = jnp.concatenate([_by_block(x), -_by_block(rounded)], axis=-1)
    columns = jnp.concatenate([_by_block(w), _by_block(seen)], axis=-1)
    grams = _product(columns.mT, columns)
    error = jnp.sum(_product(both, grams) * both, axis=-1)
    energy = jnp.sum(jnp.square(_product(x, w.T)), axis=-1)
    return jnp.mean(error / jnp.maximum(energy, 1e-30), axis=-1)


@functools.partial(jax.jit, static_argnames="formats")
def site_error(
    x: Float[Array, "tokens k"], w: Float[Array, "n k"], moved: BlockAffine, *, formats: Formats
) -> Float[Array, ""]:
    """Mean over tokens of |x W^T - x^ W^^T|^2 / |x W^T|^2."""
    y, seen = _product(x, w.T), _outputs(x, w, moved, formats)
    error, energy = (jnp.sum(jnp.square(a), axis=-1) for a in (y - seen, y))
    return jnp.mean(error / jnp.maximum(energy, 1e-30))


def _outputs(x: Array, w: Array, moved: Any, formats: Formats) -> Float[Array, "tokens n"]:
    """What the linears give once both sides are moved and rounded."""
    rounded = formats[0].fake_quantize(moved.activations(x))
    return _product(rounded, formats[1].fake_quantize(moved.weights(w)).T)


def _by_block(a: Float[Array, "rows k"]) -> Float[Array, "blocks rows n"]:
    return a.reshape(len(a), -1, SIZE).swapaxes(0, 1)


@dataclasses.dataclass(frozen=True)
class FitGains:
    """A fit, and weights whose rows are multiplied by what rounding shrinks their outputs by.

    g_o = <y_o, y^_o> / <y^_o, y^_o> over the token sample, each token divided by its norm.
    """

    fit: Fit

    @property
    def needs(self) -> Needs:
        return Needs.FORMATS | self.fit.needs

    def __call__(self, weights: Weights, stats: Stats, recipe: Recipe, key: RandomKey) -> Fitted:
        fitted = self.fit(weights, stats, recipe, key)
        formats = recipe.activation_format, recipe.weight_format
        gains = _gains(stats.sample, stack(weights), fitted.transform, formats=formats)
        ends = np.cumsum([len(w) for w in weights])[:-1]
        scaled = tuple(w * g[:, None] for w, g in zip(weights, jnp.split(gains, ends), strict=True))
        return Fitted(fitted.transform, scaled)


@functools.partial(jax.jit, static_argnames="formats")
def _gains(
    x: Float[Array, "tokens k"], w: Float[Array, "n k"], moved: Any, *, formats: Formats
) -> Float[Array, " n"]:
    norm = jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-30)
    y, seen = _product(x, w.T) / norm, _outputs(x, w, moved, formats) / norm
    energy = jnp.sum(jnp.square(seen), axis=0)
    return jnp.where(energy > 0, jnp.sum(y * seen, axis=0) / jnp.maximum(energy, 1e-30), 1.0)


@dataclasses.dataclass(frozen=True)
class Threshold(MXFP4):
    """MXFP4 whose scale doubles where the largest magnitude is above `threshold` scales.

    Attributes:
      threshold: In [4, 8]; 6 is RCEIL, 8 FLOOR. Above 6 what lies between saturates at 6.
    """

    threshold: float = 6.0

    def round_blocks(
        self, blocks: Blocks, key: Rng, scale_offset: Any = None, clip: Any = None
    ) -> Rounded:
        amax, bad = clipped_amax(blocks, clip)
        exponent, significand = split(amax)
        above = significand > int(self.threshold * 2**21)  # 2^23 is 4 scales
        exponent = exponent - self.element.emax + above.astype(jnp.int32)
        if scale_offset is not None:
            exponent = exponent + scale_offset
        exponent = jnp.where(amax == 0, -127, clamp(exponent))
        scale = jnp.where(bad, 512, exponent)
        codes = encode(blocks, scale[..., None], self.element, self.rounding, key)
        byte = jnp.where(bad, 255, exponent + 127).astype(jnp.uint8)
        return codes, jax.lax.bitcast_convert_type(byte, jnp.float8_e8m0fnu), None


WUSH = FitWush()
EQUAL = FitBrake(equal_tokens=True)
BRAKE = FitBest(tuple(FitBrake(exponent) for exponent in (0.5, 0.75, 1.0, 1.25)))
PHASE = FitBest(tuple(FitScaled(WUSH, 2 ** (i / 8)) for i in range(8)))
ROTATED = FitInTurn((WUSH, FitHadamard(random_signs=True)))
SMOOTH_HADAMARD = FitInTurn((FitSmooth(0.7), FitHadamard()))
ALPHAS = tuple(FitInTurn((FitSmooth(alpha), FitHadamard())) for alpha in (0.5, 0.6, 0.7, 0.8))
ZIGZAG = FitPermutation("zigzag")
FITS: dict[str, Fit] = {
    "wush": WUSH,
    "brake .5": FitBrake(0.5),
    "brake .75": FitBrake(0.75),
    "brake 1.25": FitBrake(1.25),
    "brake by block": BRAKE,
    "equal tokens": EQUAL,
    "phase by block": PHASE,
    "best rotation by block": FitBest((WUSH,) + (ROTATED,) * 8),
    "gains": FitGains(WUSH),
    "best of kinds by site": FitBest((WUSH, EQUAL, SMOOTH_HADAMARD), per="site"),
    "zigzag, brake by block": FitInTurn((ZIGZAG, BRAKE)),
    "zigzag, equal tokens": FitInTurn((ZIGZAG, EQUAL)),
    "smooth_hadamard at .7": SMOOTH_HADAMARD,
    "alpha by site": FitBest(ALPHAS, per="site"),
    "alpha by block": FitBest(ALPHAS),
    "zigzag, alpha by block": FitInTurn((ZIGZAG, FitBest(ALPHAS))),
}
"""Module-level, so that `experiments.ideas:NAME` names those that have a name."""
RULES = ("floor", "even", "rceil")
THRESHOLDS = {f"threshold {t:g}": Threshold(threshold=t) for t in (6.5, 7.25, 7.5)}
ROUNDINGS = ("gptq", "gptq_scale", "descent", "asymmetric_descent")
BASELINE = "wush"
CELLS = [
    *(Cell(name, rule, fit=fit) for rule in RULES for name, fit in FITS.items()),
    *(
        Cell(name, label, fit=fit, weight_format=format, activation_format=format)
        for label, format in THRESHOLDS.items()
        for name, fit in FITS.items()
        if name in (BASELINE, "smooth_hadamard at .7")
    ),
    *(Cell(BASELINE, rule, fit=WUSH, rounding=r) for rule in RULES for r in ROUNDINGS),
]


def ROWS(cell: Cell) -> str:
    """The idea, and how weights are rounded."""
    return cell.recipe + (f", {cell.rounding}" if cell.rounding != "rtn" else "")


def COLUMNS(cell: Cell) -> str:
    """The scale rule."""
    return cell.format


if __name__ == "__main__":
    main(sys.modules[__name__])
