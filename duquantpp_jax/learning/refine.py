"""Refining: after rounding, what moves the activations is learned once more for these weights.

    W^ = round(T0.weights(W)) stays;    T <- T - rate * gradient of mean KL(float || quantized);
    y = Q(T.activations(x)) @ W^.T

T starts as T0, the transform that moved the weights. The two then part: T corrects what rounding
has done to the weights. It has a matrix for each block of channels, as the affine transforms of
`learn`; where sites have clips and scale offsets of the activations, these are learned too. The
whole model is in memory, and the loss is taken through all of it (learning/model.py): by steps in
bfloat16, and in float32 where held-out rows choose the best of them, as the model is measured.

Source: experiments/beat_hadamard.py; 400 steps at 3e-4 were the best of its search, in
float32.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Integer

from duquantpp_jax.core import Fitted, MXArray
from duquantpp_jax.learning.model import Divergence, at_rates
from duquantpp_jax.learning.moves import Learned, Moves
from duquantpp_jax.learning.training import warmed_cosine
from duquantpp_jax.models import Decoder
from duquantpp_jax.ptq.plan import Plan
from duquantpp_jax.ptq.site import QuantizedSite, layer_of
from duquantpp_jax.ptq.walk import State
from duquantpp_jax.transforms.learned import Affine, block_affine

RATE = 3e-4
"""Peak learning rate of the transform; clips and scale offsets move at ten times of it."""
BATCH_ROWS = 16
HELD_OUT = 8
"""One of so many rows chooses the best step."""


def refine(
    plan: Plan,
    model: Decoder,
    state: State,
    tokens: Integer[np.ndarray, "rows length"],
    steps: int,
    **options: Any,
) -> dict[str, Fitted]:
    """What moves the activations of each site, learned for its rounded weights.

    Args:
      plan: How the state was made.
      tokens: Text to learn from. The last eighth of the rows, at least one, chooses the best step,
        the start included; batches are of 16 rows, or of all where there are fewer.
      options: `callback`, `checkpoint` and others of `training.train`.

    Returns:
      Fits without weights, stacked over layers, for `refitted`.

    Raises:
      ValueError: As `check`; or there is a single row, or a transform is not made of blocks.
    """
    check(plan)
    format = plan.recipes["mlp_in"].activation_format
    sites = state if isinstance(state, dict) else {}
    held_out = max(1, len(tokens) // HELD_OUT)
    if len(tokens) <= held_out:
        raise ValueError("refining learns from all rows but one: give two rows or more")
    start = {}
    for site, width in plan.widths(0).items():
        layers = (layer_of(sites[site].transform, n) for n in range(plan.config.num_hidden_layers))
        each = [block_affine(transform, width, format.block_size) for transform in layers]
        start[site] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    moves = Moves(
        Affine(),
        scale_offset=any(site.scale_offset is not None for site in sites.values()),
        clip="block" if any(site.clip is not None for site in sites.values()) else None,
        through_amax=True,
    )
    weights = {
        name: tuple(w for w in site.weights if isinstance(w, MXArray))
        for name, site in sites.items()
    }
    learned = {s: _learned(moves.init(start[s], ()), site) for s, site in sites.items()}
    objective = Divergence(
        start, moves, (format, format), model, rounded=weights, judged=jnp.dtype(jnp.float32)
    )
    found = objective.learn(
        dict.fromkeys(sites, ()),
        tokens[:-held_out],
        tokens[-held_out:],
        jax.random.fold_in(jax.random.key(plan.seed), 2),
        learned=learned,
        steps=steps,
        optimizer=_optimizer(steps),
        batch_rows=min(BATCH_ROWS, len(tokens) - held_out),
        **options,
    )
    return found.fits


def refitted(
    sites: Mapping[str, QuantizedSite], fits: Mapping[str, Fitted]
) -> dict[str, QuantizedSite]:
    """The sites with their weights as they are, moved by the fits."""
    return {
        name: dataclasses.replace(
            sites[name], transform=fit.transform, clip=fit.clip, scale_offset=fit.scale_offset
        )
        for name, fit in fits.items()
    }


def check(plan: Plan) -> None:
    """Raises ValueError where what a plan makes cannot be refined."""
    if plan.fuse or plan.pad or plan.include != ("*",) or plan.exclude:
        raise ValueError(
            "--refine learns what moves the inputs of all linears as they are: leave out --fuse, "
            "--pad, --include and --exclude"
        )
    if plan.config.num_experts:
        raise ValueError(f"--refine is not for the experts of a {plan.config.architecture}")
    formats = {format for _, format in plan.formats}
    if len(formats) > 1 or not all(format.holds_weights for format in formats):
        raise ValueError("--refine takes one format for the activations of all sites, and not bf16")


def _learned(nothing: Learned, site: QuantizedSite) -> Learned:
    """Where learning starts: the clip and the scale offset that the site has."""
    if site.scale_offset is not None:
        nothing = dataclasses.replace(nothing, log_scale=site.scale_offset.astype(jnp.float32))
    if site.clip is not None:
        nothing = dataclasses.replace(nothing, log_clip=jnp.log(site.clip))
    return nothing


@functools.cache
def _optimizer(steps: int) -> Any:
    """One object for one setting: compiled code is kept for as long as it is the same."""
    scheduled = warmed_cosine(RATE, steps)
    rest = warmed_cosine(10 * RATE, steps)
    return at_rates({"transform": scheduled, "log_scale": rest, "log_clip": rest})
