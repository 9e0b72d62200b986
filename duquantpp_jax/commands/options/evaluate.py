"""What `duquantpp evaluate` is asked."""

import dataclasses
from pathlib import Path

from duquantpp_jax.commands.options.common import (
    Compute,
    Flag,
    Implementation,
    Imports,
    Plain,
    Printing,
    Terminal,
)


@dataclasses.dataclass(frozen=True)
class EvaluateOptions(Plain):
    """Perplexity of a model on a text, KL and agreement with a reference; or scores on tasks.

    Attributes:
      model: Hugging Face directory, GGUF file, hf:ORG/NAME or smollm2 (docs/models.md); or a
        quantized model.
      text: Text to evaluate on, or .jsonl file, each line a document.
      tasks: In place of a text, tasks of lm-eval (extra eval) by their names; gutenberg for five
        small ones that are in the package (docs/scoring.md).
      limit: Items of each task; all by default.
      download: Let tasks fetch their data; without it nothing is downloaded.
      reference: Directory of the model to compare with, usually the float one; it may be the same
        directory, to see what --cache costs.
      protocol: documents (as in compare: documents separated by <|endoftext|>, each cut into rows
        by itself, the rows of all documents taken in turn) or stream (as in papers: one stream cut
        into rows).
      window: Token ids of text in a row; by default 511 for documents and 2048 for stream, or fewer
        if the model has fewer positions.
      bos: Put the model's beginning-of-sequence token before every row; default for documents.
      no_bos: Leave it out; default for stream.
      tokens: Targets to evaluate on, cut down to whole rows; by default all.
      cache: Format of the key-value cache: float32, bf16, mxfp8, mxfp4; by default there is none.
      rotate_keys: Rotate keys and queries by a Hadamard matrix before keys are cached.
      text_key: Of the text in a .jsonl file.
      activation_format: Of the inputs of packed weights, which are used as they are stored; without
        it these inputs are not quantized.
      compute: Type of the products of attention, of the head and of linears left in float; what
        quantized linears are given is rounded to it (docs/performance.md).
      mesh: Cut weights over devices, as in data=2,model=4: two groups of four devices share the
        rows, and the devices of a group the weights; by default each device has all of them.
      implementation: How inputs in MXFP4 are moved and rounded: triton in one kernel, xla without;
        by default the first of these that the device runs (docs/performance.md).
      attention: triton takes it in one kernel that never has all pairs of positions in memory, xla
        without; by default triton on a Hopper GPU, where it was measured (docs/performance.md).
      out: File for the results, as JSON.
      distributed: Share the rows with other processes that run the same command, on one host or
        several (docs/many_devices.md).
      imports: Modules to import first, for transforms and formats that this package does not have.
    """

    model: Path
    text: Path | None = None
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    download: Flag = False
    reference: Path | None = None
    protocol: str = "documents"
    window: int | None = None
    bos: Flag = False
    no_bos: Flag = False
    tokens: int | None = None
    cache: str | None = None
    rotate_keys: Flag = False
    text_key: str = "text"
    activation_format: str | None = None
    compute: Compute = "float32"
    mesh: str | None = None
    implementation: Implementation | None = None
    attention: Implementation | None = None
    out: Path | None = None
    distributed: Flag = False
    imports: Imports = ()
    terminal: Printing = Terminal()
