"""Learning by names and numbers, as `duquantpp learn` has it: start, moves, loss, steps.

    site     each site alone, the loss of `learning/site.py` on its calibration tokens
    block    one decoder block after the other, `learning/blocks.py`; one block is in memory
    model    through the whole model, `learning/model.py`

All give {site: Fitted}, stacked over layers. The transform learns at `rate`, weights, which are
small, at a tenth of it, clips and scale offsets, which are logarithms of order one, at ten times.
"""

import contextlib
import dataclasses
import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Integer

from duquantpp_jax import files
from duquantpp_jax.checkpoints import load
from duquantpp_jax.checkpoints.lazy import Checkpoint
from duquantpp_jax.commands.options.learn import LearnSettings
from duquantpp_jax.core import Fitted, Recipe
from duquantpp_jax.learning import state as states
from duquantpp_jax.learning.blocks import learn_blocks, stack_blocks
from duquantpp_jax.learning.callbacks import Callback, each
from duquantpp_jax.learning.model import by_parts, learn_model
from duquantpp_jax.learning.moves import PARTS, Learned, moves_named
from duquantpp_jax.learning.sharing import Sharing
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

_NO_SCHEDULE = ("lbfgs", "noisy_sgd", "optimistic_adam", "rprop", "sm3")
"""Optimisers of optax that want more than a schedule, or a rate that stays."""


def _optimizers() -> Iterator[str]:
    for name in sorted(vars(optax)):
        value = getattr(optax, name)
        if name.startswith(("_", "scale_by_")) or name in _NO_SCHEDULE or isinstance(value, type):
            continue
        with contextlib.suppress(TypeError, ValueError):  # no function
            if next(iter(inspect.signature(value).parameters), None) == "learning_rate":
                yield name


OPTIMIZERS = tuple(_optimizers())
"""Names of the optimisers of optax that a schedule of learning rates is enough for."""

MakeOptimizer = Callable[[optax.Schedule], optax.GradientTransformation]

FACTORS = dict.fromkeys(PARTS, 10.0) | {"transform": 1.0, "weights": 0.1}
"""Of the rate, what each part moves at."""

Report = Callable[[str, int, int], None]
"""Called with what is being done, steps done, steps in all."""

Tokens = Integer[np.ndarray, "_ length"]
"""Rows of token ids."""


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """Makes an optimiser, by a name of OPTIMIZERS, from a schedule of learning rates.

    Each part has an optimiser of its own, which is given the schedule times the part's FACTORS.
    What optax decays goes to its start: parameters are differences from there.
    """

    name: str

    def __call__(self, schedule: optax.Schedule) -> optax.GradientTransformation:
        make = getattr(optax, self.name)
        rates = {p: lambda count, factor=f: factor * schedule(count) for p, f in FACTORS.items()}
        return by_parts({part: make(rate) for part, rate in rates.items()})


def optimizer_of(
    how: LearnSettings, given: MakeOptimizer | optax.GradientTransformation | None
) -> MakeOptimizer:
    """What makes the optimiser: `given`, or one that is the same at every rate, or how.optimizer.

    Raises:
      ValueError: There is no such name.
    """
    if given is None:
        known("optimizer", how.optimizer, OPTIMIZERS)
        return Optimizer(how.optimizer)
    return (lambda _: given) if isinstance(given, optax.GradientTransformation) else given


def fingerprint(make: MakeOptimizer, how: LearnSettings) -> str:
    """A hash of an optimiser, by what it does to parameters of every part."""
    flat, matrix = jnp.zeros(1), jnp.zeros((2, 2))
    learned = Learned({"matrix": matrix[None]}, (matrix,), flat, flat, flat)
    return states.describe(make(warmed_cosine(how.rate, how.steps)), learned)


def check_settings(how: LearnSettings) -> None:
    """Raises ValueError where a name is not known or a number is none of its kind."""
    find_fit(how.start)
    checked_seed(how.seed)
    moves_named(how.moves)
    for name in ("steps", "batch_rows", "accumulate", "check_every"):
        if getattr(how, name) < 1:
            raise ValueError(f"{name} = {getattr(how, name)}: give at least 1")
    if how.through == "site" and how.accumulate > 1:
        raise ValueError(
            f"accumulate = {how.accumulate}: batches of a site are small, leave it out, or learn "
            "through block or model"
        )
    Sharing.of(how.batch_rows, how.accumulate)
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
    callback: Callback = lambda *_: None,
    optimizer: MakeOptimizer | optax.GradientTransformation | None = None,
    unchanged: Callable[[], None] = lambda: None,
) -> Trained:
    """Learns fits for a model.

    Args:
      checkpoint: The float model, read a layer at a time unless learning goes through all of it.
      recipe: The formats; `how.start` goes over its fit.
      rows: Token ids to learn from; the last of each row is a target and not an input.
      held_out: Token ids to choose by. A site holds out a part of its sample instead.
      place: A directory for progress: a run that was killed goes on from there to the same bits.
      callback: Called at every check with losses; block by block with the number of the `block`
        too, and with steps that count on; site by site not at all.
      optimizer: Of optax, in place of how.optimizer: an object with rates of its own, or a function
        from the schedule of rates to one.
      unchanged: Called when a part of the model has been read, before progress that follows from it
        is kept; raises ValueError if the files are others than before.

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
    calibration, make = rows[:CALIBRATION_ROWS, :-1], optimizer_of(how, optimizer)
    settings: dict[str, Any] = {"steps": count, "check_every": how.check_every}
    fit, asked = find_fit(how.start), dict[str, Any]()
    if how.through == "site":
        asked = {f.name: getattr(how, f.name) for f in dataclasses.fields(LearnSettings)}
        asked |= {"optimizer": fingerprint(make, how), "code": files.module_hashes(fit.__module__)}
        asked |= {"formats": (recipe.weight_format, recipe.activation_format)}
        settings |= {"optimizer": make, "rate": how.rate, "batch_tokens": 16 * how.batch_rows}
        fit = FitLearned(moves, fit, **settings)
    plan = Plan.of(checkpoint.config, dataclasses.replace(recipe, fit=fit), seed=how.seed)
    if how.through == "site":
        kept = place, str(asked), unchanged
        return Trained(None, 0.0, [], _learn_sites(plan, checkpoint, calibration, report, *kept))
    settings |= {"optimizer": make(warmed_cosine(how.rate, count))}
    settings |= {"batch_rows": how.batch_rows, "accumulate": how.accumulate}
    formats = (recipe.activation_format, recipe.weight_format)
    size = max(format.block_size for format in formats)
    starts = _starts(plan, checkpoint, calibration, size, unchanged)
    key = jax.random.fold_in(jax.random.key(how.seed), 1)
    if how.through == "model":
        start = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(start for _, start in starts))

        def say_kl(step: int, numbers: Mapping[str, float]) -> None:
            report(f"held-out KL {numbers['held_out_loss']:.5f}", step, count)

        model = load(checkpoint.directory)
        unchanged()
        return learn_model(
            model, start, moves, formats, rows, held_out, key,
            checkpoint=place / "model.safetensors",
            callback=each(callback, say_kl), **settings,
        )  # fmt: skip
    done: list[Trained] = []

    def say(step: int, numbers: Mapping[str, float]) -> None:
        total, block = len(done) * count + step, len(done) + 1
        callback(total, {"block": block, **numbers})
        what = f"block {block} of {layers}: held-out {numbers['held_out_loss']:.5f}"
        report(what, total, layers * count)

    inputs, choosing = (checkpoint.embed(part[:, :-1]) for part in (rows, held_out))
    for block in learn_blocks(
        checkpoint.config, starts, moves, formats, inputs, choosing, key,
        checkpoint=place, callback=say, **settings,
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
    unchanged: Callable[[], None],
    finished: Callable[[int, Any], dict[str, Fitted] | None] = lambda *_: None,
) -> Iterator[tuple[Mapping[str, Any], dict[str, Fitted]]]:
    """Parameters and fits of one layer after the other; finished ones, which are asked for with
    all that a fit sees, are not fitted."""
    hidden = np.array(checkpoint.embed(tokens))
    for number in range(plan.config.num_hidden_layers):
        parameters = checkpoint.layer(number)
        unchanged()
        what = plan.widths(number), plan.fit_needs(number)
        stats = calibrate_layer(plan.config, number, parameters, hidden, *what, after=hidden)
        seen = dict(parameters), stats
        yield parameters, finished(number, seen) or fit_layer(plan, number, parameters, stats)


def _starts(
    plan: Plan, checkpoint: Checkpoint, tokens: Tokens, size: int, unchanged: Callable[[], None]
) -> Iterator[tuple[Mapping[str, Any], dict[str, BlockAffine]]]:
    """Parameters and starts of one layer after the other; a start must not hold weights."""
    for number, (parameters, fits) in enumerate(_fits(plan, checkpoint, tokens, unchanged)):
        if any(fitted.weights is not None for fitted in fits.values()):
            raise ValueError(
                "the start has learned weights, which learning through blocks or the model would "
                "lose: start from a fit of the transform alone, or learn through the site"
            )
        widths = plan.widths(number)
        yield parameters, {s: start_of(fitted, widths[s], size) for s, fitted in fits.items()}


def _learn_sites(
    plan: Plan,
    checkpoint: Checkpoint,
    tokens: Tokens,
    report: Report,
    place: Path,
    asked: str,
    unchanged: Callable[[], None],
) -> dict[str, Fitted]:
    """Fits of every site by itself; a layer that is finished is kept in `place`, with a hash of
    what is asked and of what its fits have seen."""
    of: list[str] = []

    def file(number: int) -> Path:
        return place / f"layer_{number}.safetensors"

    def finished(number: int, seen: Any) -> Any:
        hashed = hashlib.sha256(f"{asked} {states.digest(seen)}".encode()).hexdigest()
        of.append(f"layer {number}, learned as {hashed[:16]}")
        return storage.load(file(number), of[-1]) if file(number).is_file() else None

    found: list[dict[str, Fitted]] = []
    every = _fits(plan, checkpoint, tokens, unchanged, finished)
    for number, (_, fits) in enumerate(every):
        storage.save(file(number), fits, of[number])
        found.append({site: fits[site] for site in SITES})
        report("learning sites", number + 1, plan.config.num_hidden_layers)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)
