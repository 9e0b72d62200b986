"""Learning at one site, on what calibration keeps of its input: nothing of the model is needed.

With x^ = Q(x T) T^-1 and W^ = Q(W') T^T, both brought back to where they came from, and x, W as
they are, the loss is the mean over tokens of

    activations    |x - x^|^2 / |x|^2
    both           that, and |W - W^|^2 / |W|^2
    output         |x W^T - x^ W^^T|^2 / |x W^T|^2

the last two as means over the linears that share the site. Each token's error is taken against its
own energy, or a single massive token would be all that counts. Of a rotation the first is the plain
error of the format, |x T - Q(x T)|^2; of another matrix that error alone would reward shrinking.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jaxtyping import Array, Float

from duquantpp_jax.core import Fit, Fitted, Needs, RandomKey, Recipe, Stats, Weights, shared
from duquantpp_jax.learning.moves import Learned, Moves, SitesObjective
from duquantpp_jax.models import dense
from duquantpp_jax.transforms.block import BlockAffine
from duquantpp_jax.transforms.learned import block_affine

Kind = Literal["activations", "both", "output"]
SITE = "site"


@struct.dataclass
class SiteError(SitesObjective):
    """The losses at the top of this file, of a batch of tokens, at the one site SITE."""

    weights: Weights
    kind: Kind = struct.field(pytree_node=False)

    def loss(self, learned: dict[str, Learned], batch: Float[Array, "tokens k"]) -> Array:
        state = self.states(learned)[SITE]
        if self.kind == "output":
            wanted, _ = dense(SITE, batch, self.weights, None)
            ys, _ = self.linear(SITE, batch, self.weights, state)
            return _mean([relative_error(a, b) for a, b in zip(wanted, ys, strict=True)])
        transform, x, rounded = self.linear.quantized(batch, self.weights, state)
        back = transform.inverse()
        loss = relative_error(batch, back.activations(x))
        if self.kind == "activations":
            return loss
        pairs = zip(self.weights, map(back.weights, rounded), strict=True)
        return loss + _mean([relative_error(w.ravel(), found.ravel()) for w, found in pairs])


@dataclasses.dataclass(frozen=True)
class FitLearned:
    """A fit that lowers a loss at one site, on the token sample; its last tokens choose the step.

    Attributes:
      start: The fit that learning starts from; it must lower to matrices of one block.
      optimizer: From a learning rate to an optimiser of optax.
      rate: Its peak; warmed up over a tenth of the steps (not at all where those are fewer than
        ten), then down a cosine to zero.
      batch_tokens: Tokens of a batch, or all that there are if those are fewer.
      held_out: A share of the sample.
      sharing: "shared" learns a single matrix for all blocks, and starts from one.
    """

    moves: Moves
    start: Fit
    kind: Kind = "output"
    optimizer: Callable[[optax.Schedule], optax.GradientTransformation] = optax.adam
    rate: float = 1e-2
    steps: int = 100
    batch_tokens: int = 256
    check_every: int = 20
    held_out: float = 0.125
    sharing: Literal["per_block", "shared"] = "per_block"
    draws = True

    def shared(self) -> "FitLearned":
        return dataclasses.replace(self, start=shared(self.start), sharing="shared")

    @property
    def needs(self) -> Needs:
        """The formats, whose error it lowers, and what the start needs."""
        return Needs.FORMATS | self.start.needs

    def __call__(self, weights: Weights, stats: Stats, recipe: Recipe, key: RandomKey) -> Fitted:
        tokens, width = stats.sample, weights[0].shape[-1]
        last = max(1, round(self.held_out * len(tokens)))
        if last >= len(tokens):
            raise ValueError(
                f"{len(tokens)} tokens cannot be learned from and held out: give more calibration"
            )
        first = self.start(weights, stats, recipe, key)
        weights = first.weights or weights
        start = start_of(first, width, recipe.activation_format.block_size)
        if self.sharing == "shared":
            start = _first_of_all(start)
        formats = (recipe.activation_format, recipe.weight_format)
        rows, held_out = tokens[:-last], tokens[-last:]
        found = SiteError({SITE: start}, self.moves, formats, weights, self.kind).learn(
            {SITE: weights},
            rows,
            held_out,
            jax.random.fold_in(key, 1),
            steps=self.steps,
            optimizer=_optimizer(self.optimizer, self.rate, self.steps),
            batch_rows=min(self.batch_tokens, len(rows)),
            check_every=self.check_every,
            devices=jax.local_devices()[:1],  # a batch is too small to share
        )
        fitted = found.fits[SITE]
        return fitted if fitted.weights else dataclasses.replace(fitted, weights=first.weights)


def start_of(fitted: Fitted, width: int, size: int) -> BlockAffine:
    """The transform of a fit, as matrices that learning starts from.

    Raises:
      ValueError: It has no such form, or the fit holds a clip or a scale offset: what is learned
        takes no account of them.
    """
    for name in ("clip", "scale_offset"):
        if getattr(fitted, name) is not None:
            raise ValueError(
                f"learning starts from a fit that holds a {name}, which it would lose: "
                f"start from one without, and let the {name} learn"
            )
    return block_affine(fitted.transform, width, size)


def _first_of_all(start: BlockAffine) -> BlockAffine:
    """The matrix that all blocks share."""
    matrices = np.asarray(start.matrices)
    if np.any(matrices != matrices[:1]):
        raise ValueError(
            "a single matrix for all blocks is learned from a start that has one: "
            "give a fit with one matrix, and no smoothing inside it"
        )
    return BlockAffine(start.matrices[:1], start.inverses[:1])


@functools.cache
def _optimizer(
    make: Callable[[optax.Schedule], optax.GradientTransformation], rate: float, steps: int
) -> optax.GradientTransformation:
    """One object for one setting: compiled code is kept for as long as it is the same."""
    return make(optax.warmup_cosine_decay_schedule(0.0, rate, steps // 10, steps))


def relative_error(
    wanted: Float[Array, "*rows k"], found: Float[Array, "*rows k"]
) -> Float[Array, ""]:
    """Mean over rows of |wanted - found|^2 / |wanted|^2; rows of nothing count as 1."""
    energy = jnp.sum(jnp.square(wanted), axis=-1)
    error = jnp.sum(jnp.square(wanted - found), axis=-1)
    return jnp.mean(error / jnp.where(energy > 0, energy, 1.0))


def _mean(losses: list[Float[Array, ""]]) -> Float[Array, ""]:
    return jnp.mean(jnp.stack(losses))
