"""What `duquantpp inspect` is asked."""

import dataclasses
from pathlib import Path

from duquantpp_jax.commands.options.common import TARGETS, Imports, Plain, Printing, Terminal


@dataclasses.dataclass(frozen=True)
class InspectOptions(Plain):
    """Where the outliers of a model sit, in numbers and figures; of a quantized one, what it holds.

    Without --model it is the small model inside the package.

    Attributes:
      model: Hugging Face directory, GGUF file, hf:ORG/NAME or smollm2 (docs/models.md); or a
        quantized model.
      text: Text that the model runs on, documents separated by <|endoftext|> or lines of a .jsonl
        file; without --model, the embedded rows.
      tokens: Tokens of the text, cut down to whole rows of 511.
      site: Inputs to show, by the names of their linears, as in 'model.layers.1.*' or
        '*.down_proj', or by attention_in, attention_out, mlp_in, mlp_out; all by default.
      block_size: Elements that share a scale.
      ratio: A channel above this many times the median channel is an outlier.
      share: Share of the channels whose energy is added up, the strongest first.
      drop: One element sets a block's scale if the scale would be at least 2^drop times smaller
        without it.
      activation_format: Of the inputs of packed weights, which are used as they are stored; without
        it these inputs are not quantized.
      out: Directory for outliers.json and the figures.
      report: HTML page to write: a sortable table, the figures, and the configuration.
      text_key: Of the text in a .jsonl file.
      imports: Modules to import first: those of a quantized model's transforms and formats that are
        not of this package.
    """

    model: Path | None = None
    text: Path | None = None
    tokens: int = 16 * TARGETS
    site: tuple[str, ...] = ("*",)
    block_size: int = 32
    ratio: float = 10.0
    share: float = 0.01
    drop: int = 1
    activation_format: str | None = None
    out: Path = Path("inspect-out")
    report: Path | None = None
    text_key: str = "text"
    imports: Imports = ()
    terminal: Printing = Terminal()
