"""What `duquantpp quantize` is asked."""

import dataclasses
from pathlib import Path

from duquantpp_jax.commands.options.common import (
    MODEL,
    Imports,
    Plain,
    Printing,
    RotationName,
    Serve,
    Terminal,
)


@dataclasses.dataclass(frozen=True)
class QuantizeOptions(Plain):
    """Quantizes a Hugging Face model layer by layer; after a kill, the same command resumes.

    Without --model it is the small model inside the package.

    Attributes:
      model: Hugging Face directory, GGUF file, hf:ORG/NAME or smollm2 (docs/models.md).
      recipe: How linear inputs are moved, by its name in duquantpp_jax.recipes; block_hadamard
        where neither this nor --fits is given.
      fits: Directory that duquantpp learn wrote for this model: what moves the inputs, in place of
        a recipe.
      rounding: How moved weights are rounded.
      serve: The program that is to run the model as export --serve gives it:
        takes its scale rule for activations and the recipe's shared form, folds smoothing, and
        refuses what it would compute otherwise (docs/serving.md).
      scale_rule: How a block's scale is chosen where a format has scale rules and its name says
        none: floor, ceil, even, rceil, mse; for mxfp4 also log256, fp32. With --serve of weights
        alone. Without it floor; with --serve mse, which costs nothing to serve.
      calibration_text: Text to calibrate on, documents separated by <|endoftext|> or lines of a
        .jsonl file; without it model: rows that the model writes itself, with all of it in memory
        (or, without --model, the embedded rows).
      seed: For rows that the model writes, and for recipes that draw.
      rows: Rows of 511 tokens to calibrate on.
      include: Linears to quantize, by name, as in '*.mlp.*'.
      exclude: Linears among them to leave in float.
      formats: Of weights and activations: mxfp4, mxfp6, mxfp8, nvfp4, .. of duquantpp_jax.recipes,
        a scale rule with it (mxfp4:even) or alone (even), or module:NAME; SITE=FORMAT for one of
        the sites attention_in, attention_out, mlp_in, mlp_out.
      weight_formats: Of weights alone, over --formats.
      activation_formats: Of activations alone, over --formats; also bf16 (W4A16).
      sequential: Calibrate each layer on the output of the quantized layers before it.
      fuse: Fold smoothing and permutations into norms, v and up before rounding; smoothing before
        o_proj becomes the same in the query heads that share a value head.
      rotate_stream: Turn the residual stream by a rotation that costs nothing online; a tied head
        becomes a matrix of its own.
      rotate_values: Turn value heads by such rotations.
      pad: Widen linear inputs that blocks do not divide, with zeros (exact).
      refine: Steps of learning, after rounding, of what moves the activations; through the whole
        model in memory, on the calibration text. Weights stay as they are.
      requantize: Quantize a model whose weights are packed already: they are decoded, which is
        exact, and rounded again; those that are excluded keep their bits.
      dry_run: Print sizes, memory and time; write nothing. Weights are not needed.
      overwrite: Start anew if --out holds another quantized model.
      text_key: Of the text in a .jsonl file.
      out: Directory for the quantized model.
      imports: Modules to import first, for transforms and formats that this package does not have.
    """

    model: Path | None = None
    recipe: str | None = None
    fits: Path | None = None
    rounding: str = "rtn"
    serve: Serve | None = None
    scale_rule: str | None = None
    calibration_text: Path | None = None
    seed: int = 0
    rows: int = 64
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    formats: tuple[str, ...] = ("mxfp4",)
    weight_formats: tuple[str, ...] = ()
    activation_formats: tuple[str, ...] = ()
    sequential: bool = False
    fuse: bool = False
    rotate_stream: RotationName | None = None
    rotate_values: RotationName | None = None
    pad: bool = False
    refine: int = 0
    requantize: bool = False
    dry_run: bool = False
    overwrite: bool = False
    text_key: str = "text"
    out: Path = Path("quantized")
    imports: Imports = ()
    terminal: Printing = Terminal()

    @property
    def text(self) -> Path | None:
        """The text to calibrate on; None is the embedded one."""
        return self.calibration_text or (self.model and MODEL)
