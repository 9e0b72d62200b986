"""`duquantpp learn`: learns the fits of a model with gradients, for `duquantpp quantize --fits`.

A run keeps its progress in the output directory. After a kill the same command resumes and gives
the same bits; another command is refused in that directory.
"""

import dataclasses
import hashlib
import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Integer

from duquantpp_jax import files
from duquantpp_jax.checkpoints import load, sha256, testbed
from duquantpp_jax.checkpoints.fits import ABOUT, ARRAYS, read_about, save_fits
from duquantpp_jax.checkpoints.lazy import Checkpoint
from duquantpp_jax.checkpoints.shards import read_json
from duquantpp_jax.commands.progress import progress_bar
from duquantpp_jax.core import Fitted, Recipe
from duquantpp_jax.evaluation.predict import Predictor, Reference
from duquantpp_jax.evaluation.rows import TARGETS
from duquantpp_jax.evaluation.subject import environment, load_rows, model_name, name_and_hash
from duquantpp_jax.learning.named import CALIBRATION_ROWS, LearnSettings, Report, learn
from duquantpp_jax.models import Decoder
from duquantpp_jax.ptq.plan import Plan
from duquantpp_jax.ptq.walk import quantize_decoder
from duquantpp_jax.recipes import format_name, recipe, under_rule

PROGRESS, BEGUN = "progress", "begun.json"
"""The directory of an unfinished run inside --out, and its file that holds the command."""


@dataclasses.dataclass(frozen=True)
class LearnOptions:
    """Learns how linear inputs are moved; after a kill, the same command resumes.

    Attributes:
      model: Hugging Face directory, GGUF file or smollm2; without it, the embedded model.
      text: UTF-8 text to learn from, documents separated by <|endoftext|>; without --model and
        --text, the embedded calibration rows.
      rows: Rows of 511 targets to take from the text.
      held_out: Rows that choose the best step and are not learned from: a share or a number.
        Through a site, an eighth of its token sample from the other rows chooses instead.
      start: What learning starts from, by its name in duquantpp_jax.recipes.
      moves: What moves: rotation, affine (or expm, cayley, affine_expm, affine_lu), weights or
        weights_moved, scale_offset, clip or clip_site, weight_clip or weight_clip_site.
      through: What the loss is taken through: each site alone, one block after the other (only one
        is in memory), or the whole model.
      steps: Updates; through site or block, of each of them.
      batch_rows: Rows of a batch.
      rate: Peak learning rate of the transform; weights learn at a tenth of it, clips and scale
        offsets at ten times.
      optimizer: adam, adan, amsgrad, lion, rms or sgd, of optax.
      check_every: Steps between checks, at which progress is kept.
      formats: Of weights and activations, by the names of duquantpp quantize.
      weight_formats: Of weights alone, over --formats.
      activation_formats: Of activations alone, over --formats.
      scale_rule: For formats with a scale rule whose name gives none.
      seed: For starts that draw random numbers, and for the order of batches.
      measure: Print the held-out KL at the start and at the end, with the whole model in memory.
      overwrite: Start anew if --out holds other fits.
      out: Directory for the fits.
    """

    model: Path | None = None
    text: Path | None = None
    rows: int = 64
    held_out: float = 0.125
    start: str = "wush_conditioned"
    moves: tuple[str, ...] = ("affine",)
    through: Literal["site", "block", "model"] = "model"
    steps: int = 400
    batch_rows: int = 16
    rate: float = 1e-3
    optimizer: str = "adam"
    check_every: int = 50
    formats: str = "mxfp4"
    weight_formats: str | None = None
    activation_formats: str | None = None
    scale_rule: str = "floor"
    seed: int = 0
    measure: bool = True
    overwrite: bool = False
    out: Path = Path("fits")

    @property
    def how(self) -> LearnSettings:
        """The options of learning itself."""
        names = [field.name for field in dataclasses.fields(LearnSettings)]
        return LearnSettings(**{name: getattr(self, name) for name in names})

    def format_names(self) -> dict[str, str]:
        """The full name of each side's format."""
        sides = {"weight": self.weight_formats, "activation": self.activation_formats}
        return {
            side: format_name(under_rule(name or self.formats, self.scale_rule))
            for side, name in sides.items()
        }


def learn_fits(options: LearnOptions, report: Report = lambda *_: None) -> dict[str, Any]:
    """Learns fits, or resumes learning, and writes them; returns the contents of fits.json.

    Raises:
      OSError: A file cannot be written; progress is kept.
    """
    if options.model is not None and options.text is None:
        raise ValueError("--model needs --text: text of the kind that the model was trained on")
    files.check_writable(options.out)
    how, names = options.how, options.format_names()
    how.check()
    method = recipe(how.start, weight_format=names["weight"], activation_format=names["activation"])
    tokens = load_rows(options.model, options.text, options.rows * TARGETS, "calibration").tokens
    rows, held_out = split(np.asarray(tokens, np.int32), options.held_out)
    directory = options.model or testbed.directory()
    ids = hashlib.sha256(np.asarray(tokens, np.int32).tobytes()).hexdigest()
    asked = {
        "model": {"name": model_name(options.model), "sha256": sha256(directory)},
        "formats": names,
        "learn": dataclasses.asdict(how) | {"moves": list(how.moves)},
        "text": name_and_hash(options.text)
        | {"rows": len(rows), "held_out": len(held_out), "tokens": ids},
        "environment": environment(),
    }
    place = options.out / PROGRESS
    if _begin(options, asked):
        return read_about(options.out)
    found = learn(how, Checkpoint(directory), method, rows, held_out, place=place, report=report)
    kl = {}
    if options.measure:
        report("measuring", how.steps, how.steps)
        kl = held_out_kl(load(directory), method, found.fits, rows, held_out, how.seed)
    about = asked | {"start_loss": found.start_loss, "history": found.history, "held_out_kl": kl}
    save_fits(options.out, found.fits, about)
    shutil.rmtree(place)
    return read_about(options.out)


def split(
    tokens: Integer[np.ndarray, "rows length"], held_out: float
) -> tuple[Integer[np.ndarray, "_ length"], Integer[np.ndarray, "_ length"]]:
    """Splits rows into those to learn from and the last ones, which are held out.

    Args:
      held_out: A share below 1, or a number of rows.

    Raises:
      ValueError: One part would be empty, or the number is not whole.
    """
    count = round(held_out * len(tokens)) if held_out < 1 else held_out
    if count != int(count) or not 0 < count < len(tokens):
        raise ValueError(
            f"--held-out {held_out:g} of {len(tokens)} rows: give a share between 0 and 1, or a "
            "number of rows that leaves some to learn from"
        )
    return tokens[: -int(count)], tokens[-int(count) :]


def held_out_kl(
    model: Decoder,
    method: Recipe,
    fits: dict[str, Fitted],
    rows: Integer[np.ndarray, "rows length"],
    held_out: Integer[np.ndarray, "held length"],
    seed: int,
) -> dict[str, float]:
    """KL to the float model in nats per target, before and after learning, rounded to nearest."""
    reference = Reference(Predictor(model), held_out)
    targets = held_out.shape[0] * (held_out.shape[1] - 1)
    start = Plan.of(model.config, method, seed=seed)
    kl = {}
    for name, plan in {"start": start, "end": dataclasses.replace(start, fits=fits)}.items():
        predictor = Predictor(*quantize_decoder(plan, model, rows[:CALIBRATION_ROWS, :-1]))
        sums = reference.row_sums(predictor)
        kl[name] = float(np.sum(sums.kl)) / targets
    if not np.isfinite([*kl.values()]).all():
        raise ValueError("learning gave NaN or Inf: give a lower --rate")
    return kl


def _begin(options: LearnOptions, asked: dict[str, Any]) -> bool:
    """Prepares --out for this run; returns whether it already holds the finished fits."""
    out, place = options.out, options.out / PROGRESS
    if options.overwrite:
        shutil.rmtree(place, ignore_errors=True)
        for name in (ABOUT, ARRAYS):
            (out / name).unlink(missing_ok=True)
    finished = (out / ABOUT).is_file()
    if finished:
        begun = read_about(out)
    elif (place / BEGUN).is_file():
        begun = read_json(place / BEGUN)
    elif out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} holds other files: give an empty or new directory")
    else:
        place.mkdir(parents=True, exist_ok=True)
        files.write_whole(place / BEGUN, files.to_json(asked))
        return False
    for name, value in asked.items():
        if begun.get(name) != value:
            raise ValueError(
                f"{out} was begun with another {name}: give another --out, or --overwrite to "
                "start anew"
            )
    return finished


def run(options: LearnOptions) -> int:
    """Runs the command and prints the held-out KL; returns the exit code."""
    with progress_bar() as progress:
        about = learn_fits(options, progress)
    how = about["learn"]
    what = f"{' and '.join(how['moves'])} from {how['start']}, through the {how['through']}"
    print(f"{about['model']['name']}: {what}, {how['steps']} steps")
    if kl := about["held_out_kl"]:
        print(f"held-out KL: {kl['start']:.5f} at the start, {kl['end']:.5f} at the end")
    print(f"Written to {options.out}; give it to duquantpp quantize --fits.")
    return 0
