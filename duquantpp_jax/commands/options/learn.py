"""What `duquantpp learn` is asked, and of it what says how fits are learned."""

import dataclasses
from pathlib import Path
from typing import Literal

from duquantpp_jax.commands.options.common import Flag, Imports, Plain, Printing, Terminal


@dataclasses.dataclass(frozen=True)
class LearnSettings(Plain):
    """How fits are learned.

    Attributes:
      start: What learning starts from, by its name in duquantpp_jax.recipes.
      moves: What moves: rotation, smooth_rotation (and scales, which fold if it starts from a
        rotation, smoothed or not), affine (or expm, cayley, affine_expm, affine_lu), weights or
        weights_moved, scale_offset, clip or clip_site, weight_clip or weight_clip_site.
      through: What the loss is taken through: each site alone, one block after the other (only one
        is in memory), or the whole model.
      steps: Updates; through site or block, of each of them.
      rate: Peak learning rate of the transform; weights learn at a tenth of it, clips and scale
        offsets at ten times.
      optimizer: One of optax, by its name there: adam, adamw, lion, lamb, rmsprop, sgd, ..
      batch_rows: Rows of a batch; of a site, batches of 16 times as many tokens.
      accumulate: Parts that a batch is taken in, one after the other, for less memory; through
        block or model.
      check_every: Steps between checks, at which progress is kept.
      seed: For starts that draw random numbers, and for the order of batches.
    """

    start: str = "wush_conditioned"
    moves: tuple[str, ...] = ("affine",)
    through: Literal["site", "block", "model"] = "model"
    steps: int = 400
    rate: float = 1e-3
    optimizer: str = "adam"
    batch_rows: int = 16
    accumulate: int = 1
    check_every: int = 50
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class LearnOptions(LearnSettings):
    """Learns how linear inputs are moved; after a kill, the same command resumes.

    Attributes:
      model: Hugging Face directory, GGUF file, hf:ORG/NAME or smollm2; without it, the embedded
        model.
      text: Texts to learn from, documents separated by <|endoftext|> or lines of a .jsonl file; or
        model, for rows that the model writes itself; without --model and --text, the embedded
        calibration rows.
      rows: Rows of 511 targets to take; of several texts as many of each, and by turns.
      held_out: Rows that choose the best step and are not learned from: a share or a number.
        Through a site, an eighth of its token sample from the other rows chooses instead.
      formats: Of weights and activations, by the names of duquantpp quantize.
      weight_formats: Of weights alone, over --formats.
      activation_formats: Of activations alone, over --formats.
      scale_rule: For formats with a scale rule whose name gives none.
      measure: Print the held-out KL at the start and at the end, with the whole model in memory.
      tensorboard: Directory for TensorBoard's files of the losses at every check (extra
        tensorboard).
      wandb: Project of wandb to log them to (extra wandb).
      overwrite: Start anew if --out holds other fits.
      text_key: Of the text in a .jsonl file.
      out: Directory for the fits.
      distributed: Share the rows with other processes that run the same command, on one host or
        several (docs/many_devices.md).
      imports: Modules to import first, for transforms and formats that this package does not have.
    """

    model: Path | None = None
    text: tuple[Path, ...] = ()
    rows: int = 64
    held_out: float = 0.125
    formats: str = "mxfp4"
    weight_formats: str | None = None
    activation_formats: str | None = None
    scale_rule: str = "floor"
    measure: bool = True
    tensorboard: Path | None = None
    wandb: str | None = None
    overwrite: bool = False
    text_key: str = "text"
    out: Path = Path("fits")
    distributed: Flag = False
    imports: Imports = ()
    terminal: Printing = Terminal()
