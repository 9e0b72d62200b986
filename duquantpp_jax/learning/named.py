"""Learning by names and numbers, as `duquantpp learn` has it: start, moves, loss, steps.

    site     each site alone, the loss of `learning/site.py` on its calibration tokens
    block    one decoder block after the other, `learning/blocks.py`; one block is in memory
    model    through the whole model, `learning/model.py`

All give {site: Fitted}, stacked over layers. The transform learns at `rate`, weights, which are
small, at a tenth of it, clips and scale offsets, which are logarithms of order one, at ten times.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Integer

from duquantpp_jax.checkpoints import load
from duquantpp_jax.checkpoints.lazy import Checkpoint
from duquantpp_jax.commands.options.learn import LearnSettings
from duquantpp_jax.core import Fitted, Recipe
from duquantpp_jax.learning.blocks import learn_blocks, stack_blocks
from duquantpp_jax.learning.model import at_rates, learn_model
from duquantpp_jax.learning.moves import PARTS, moves_named
from duquantpp_jax.learning.site import FitLearned, start_of
from duquantpp_jax.learning.training import Trained, warmed_cosine
from duquantpp_jax.models import SITES
from duquantpp_jax.ptq.calibration import calibrate_layer
from duquantpp_jax.ptq.plan import Plan
from duquantpp_jax.ptq.walk import fit_layer
from duquantpp_jax.recipes import checked_seed, find_fit, known
from duquantpp_jax.transforms import storage
from duquantpp_jax.transforms.block import BlockAffine

CALIBRATION_ROWS = 64
"""Most rows that starts are fitted on, the first of those to learn from."""

OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adam": optax.scale_by_adam,
    "adan": optax.scale_by_adan,
    "amsgrad": optax.scale_by_amsgrad,
    "lion": optax.scale_by_lion,
    "rms": optax.scale_by_rms,
    "sgd": optax.identity,
}
"""Directions of optax, by its names."""

FACTORS = dict.fromkeys(PARTS, 10.0) | {"transform": 1.0, "weights": 0.1}
"""Of the rate, what each part moves at."""

Report = Callable[[str, int, int], None]
"""Called with what is being done, steps done, steps in all."""

Tokens = Integer[np.ndarray, "_ length"]
"""Rows of token ids."""


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """Makes an optimiser, by a name of OPTIMIZERS, from a schedule of learning rates; parts learn
    at their FACTORS of it."""

    name: str

    def __call__(self, schedule: optax.Schedule) -> optax.GradientTransformation:
        rates = {p: lambda count, factor=f: factor * schedule(count) for p, f in FACTORS.items()}
        return at_rates(rates, OPTIMIZERS[self.name]())


def check_settings(how: LearnSettings) -> None:
    """Raises ValueError where a name is not known or a number is none of its kind."""
    find_fit(how.start)
    checked_seed(how.seed)
    moves_named(how.moves)
    known("optimizer", how.optimizer, OPTIMIZERS)
    for name in ("steps", "batch_rows", "check_every"):
        if getattr(how, name) < 1:
            raise ValueError(f"{name} = {getattr(how, name)}: give at least 1")
    if not how.rate > 0:
        raise ValueError(f"rate = {how.rate:g}: give a positive number")


def learn(
    how: LearnSettings,
    checkpoint: Checkpoint,
    recipe: Recipe,
    rows: Tokens,
    held_out: Tokens,
    *,
    place: Path,
    report: Report = lambda *_: None,
) -> Trained:
    """Learns fits for a model.

    Args:
      checkpoint: The float model, read a layer at a time unless learning goes through all of it.
      recipe: The formats; `how.start` goes over its fit.
      rows: Token ids to learn from; the last of each row is a target and not an input.
      held_out: Token ids to choose by. A site holds out a part of its sample instead.
      place: A directory for progress: a run that was killed goes on from there to the same bits.

    Returns:
      Fits, and losses: in nats where learned through the model, as means over blocks where block by
      block, none where site by site.

    Raises:
      ValueError: Bad settings, a start or a width that has no blocks, or progress of other
        settings.
    """
    check_settings(how)
    check_learnable(checkpoint)
    place.mkdir(parents=True, exist_ok=True)
    moves, count, layers = moves_named(how.moves), how.steps, checkpoint.config.num_hidden_layers
    calibration, optimizer = rows[:CALIBRATION_ROWS, :-1], Optimizer(how.optimizer)
    settings: dict[str, Any] = {"steps": count, "check_every": how.check_every}
    fit = find_fit(how.start)
    if how.through == "site":
        settings |= {"optimizer": optimizer, "rate": how.rate, "batch_tokens": 16 * how.batch_rows}
        fit = FitLearned(moves, fit, **settings)
    plan = Plan.of(checkpoint.config, dataclasses.replace(recipe, fit=fit), seed=how.seed)
    if how.through == "site":
        return Trained(None, 0.0, [], _learn_sites(plan, checkpoint, calibration, place, report))
    settings |= {"optimizer": optimizer(warmed_cosine(how.rate, count))}
    settings |= {"batch_rows": how.batch_rows}
    formats = (recipe.activation_format, recipe.weight_format)
    starts = _starts(plan, checkpoint, calibration, max(format.block_size for format in formats))
    key = jax.random.fold_in(jax.random.key(how.seed), 1)
    if how.through == "model":
        start = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(start for _, start in starts))
        return learn_model(
            load(checkpoint.directory), start, moves, formats, rows, held_out, key,
            checkpoint=place / "model.safetensors",
            report=lambda step, _, loss: report(f"held-out KL {loss:.5f}", step, count),
            **settings,
        )  # fmt: skip
    done: list[Trained] = []

    def say(step: int, _: float, loss: float) -> None:
        what = f"block {len(done) + 1} of {layers}: held-out {loss:.5f}"
        report(what, len(done) * count + step, layers * count)

    inputs, choosing = (checkpoint.embed(part[:, :-1]) for part in (rows, held_out))
    for block in learn_blocks(
        checkpoint.config, starts, moves, formats, inputs, choosing, key,
        checkpoint=place, report=say, **settings,
    ):  # fmt: skip
        done.append(block)
    return stack_blocks(done)


def check_learnable(checkpoint: Checkpoint) -> None:
    """Raises ValueError where nothing can be learned for a model."""
    if checkpoint.config.num_experts:
        raise ValueError(
            f"learning for a {checkpoint.config.architecture} is not supported: its experts have "
            "transforms of their own; quantize it with a recipe"
        )
    checkpoint.check_unmoved()


def _fits(
    plan: Plan,
    checkpoint: Checkpoint,
    tokens: Tokens,
    finished: Callable[[int], dict[str, Fitted] | None] = lambda _: None,
) -> Iterator[tuple[Mapping[str, Any], dict[str, Fitted]]]:
    """Parameters and fits of one layer after the other; finished ones are not fitted."""
    hidden = np.array(checkpoint.embed(tokens))
    for number in range(plan.config.num_hidden_layers):
        parameters = checkpoint.layer(number)
        what = plan.widths(number), plan.fit_needs(number)
        stats = calibrate_layer(plan.config, number, parameters, hidden, *what, after=hidden)
        yield parameters, finished(number) or fit_layer(plan, number, parameters, stats)


def _starts(
    plan: Plan, checkpoint: Checkpoint, tokens: Tokens, size: int
) -> Iterator[tuple[Mapping[str, Any], dict[str, BlockAffine]]]:
    """Parameters and starts of one layer after the other; a start must not hold weights."""
    for number, (parameters, fits) in enumerate(_fits(plan, checkpoint, tokens)):
        if any(fitted.weights is not None for fitted in fits.values()):
            raise ValueError(
                "the start has learned weights, which learning through blocks or the model would "
                "lose: start from a fit of the transform alone, or learn through the site"
            )
        widths = plan.widths(number)
        yield parameters, {s: start_of(fitted, widths[s], size) for s, fitted in fits.items()}


def _learn_sites(
    plan: Plan, checkpoint: Checkpoint, tokens: Tokens, place: Path, report: Report
) -> dict[str, Fitted]:
    """Fits of every site by itself; a layer that is finished is kept in `place`."""

    def file(number: int) -> Path:
        return place / f"layer_{number}.safetensors"

    def finished(number: int) -> Any:
        path = file(number)
        return storage.load(path, f"layer {number}") if path.is_file() else None

    found: list[dict[str, Fitted]] = []
    for number, (_, fits) in enumerate(_fits(plan, checkpoint, tokens, finished)):
        storage.save(file(number), fits, f"layer {number}")
        found.append({site: fits[site] for site in SITES})
        report("learning sites", number + 1, plan.config.num_hidden_layers)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)
