"""What `duquantpp compare` is asked."""

import dataclasses
from pathlib import Path

from duquantpp_jax.commands.options.common import (
    TARGETS,
    Flag,
    Imports,
    Plain,
    Printing,
    RotationName,
    Terminal,
)

BASELINE = "block_hadamard"
RECIPES = ("rtn", BASELINE, "random_hadamard", "smooth_hadamard", "duquantpp", "duquantpp_released")
FORMATS = ("even", "rceil")


@dataclasses.dataclass(frozen=True)
class CompareOptions(Plain):
    """Compares recipes for 4-bit weights and activations on a model, against block_hadamard.

    Without --model it is the small model inside the package, on text sampled from itself.

    Attributes:
      model: Hugging Face directory, GGUF file, hf:ORG/NAME or smollm2 (docs/models.md): a Llama,
        Mistral, Qwen2, Qwen3, Gemma 3, Mixtral, Qwen3-MoE or gpt-oss.
      text: Text to evaluate on; documents separated by <|endoftext|>, or lines of a .jsonl file.
      calibration_text: Text to calibrate on, of which the first 64 rows of 511 tokens are used; or
        model, for rows that the model writes itself, from each seed.
      tokens: Targets to evaluate on, cut down to whole rows of 511.
      recipes: Methods, by their names in duquantpp_jax.recipes.
      fits: Directories that duquantpp learn wrote for this model: a row each, under their names.
      scale_rules: Short form of --formats: floor, ceil, even, rceil, mse (MXFP4), or log256, fp32
        (not MXFP4); even and rceil where no format is given.
      formats: Of weights and activations alike: mxfp4, mxfp4:even, mxfp6, nvfp4, log256, ..
      weight_formats: Of weights alone, each with every format of activations.
      activation_formats: Of activations alone, each with every format of weights.
      rounding: How moved weights are rounded.
      pad: Widen linear inputs that blocks of 32 do not divide, with zeros (exact).
      fuse: Fold smoothing and permutations into norms, v and up before rounding, as in quantize.
      rotate_stream, rotate_values: Turn the residual stream, and value heads, before anything else,
        as in quantize; compared with the float model as it is.
      refine: Steps in which, after rounding, what moves the activations is learned once more: a
        second row of every method.
      seed: For recipes that draw random numbers, and for refining.
      seeds: Several of them in place of --seed: which (0 1 2), or how many (3).
      text_key: Of the text in .jsonl files.
      out: Directory for results.json, timings.json and compare.png.
      report: HTML page to write: the figure, a sortable table, and the configuration.
      distributed: Share the rows with other processes that run the same command, on one host or
        several (docs/many_devices.md).
      imports: Modules to import first, for transforms and formats that this package does not have.
    """

    model: Path | None = None
    text: Path | None = None
    calibration_text: Path | None = None
    tokens: int = 16 * TARGETS
    recipes: tuple[str, ...] = RECIPES
    fits: tuple[Path, ...] = ()
    scale_rules: tuple[str, ...] | None = None
    formats: tuple[str, ...] | None = None
    weight_formats: tuple[str, ...] | None = None
    activation_formats: tuple[str, ...] | None = None
    rounding: str = "rtn"
    pad: bool = False
    fuse: bool = False
    rotate_stream: RotationName | None = None
    rotate_values: RotationName | None = None
    refine: int = 0
    seed: int = 0
    seeds: tuple[int, ...] | None = None
    text_key: str = "text"
    out: Path = Path("compare-out")
    report: Path | None = None
    distributed: Flag = False
    imports: Imports = ()
    terminal: Printing = Terminal()
