"""What `duquantpp generate` is asked."""

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
class GenerateOptions(Plain):
    """Continues texts, token by token, with a key-value cache.

    Attributes:
      model: Hugging Face directory, GGUF file, hf:ORG/NAME or smollm2 (docs/models.md); or a
        quantized model.
      prompt: Text to continue, or several, which are continued together; the tokenizer may add
        special tokens.
      chat: Take the prompt as a message to the model, in its own chat template (extra chat), and
        print the answer alone.
      bos: Put the model's beginning-of-sequence token before the prompt.
      max_new_tokens: Tokens to generate, unless an end-of-sequence token comes first.
      temperature: 0 takes the likeliest token; 1 draws from the model's distribution.
      top_k: Draw from this many of the likeliest tokens; 0 for all.
      top_p: Draw from the fewest likeliest tokens whose probabilities add up to this much.
      seed: For drawing.
      cache: Format of the key-value cache: float32, bf16, mxfp8, mxfp4.
      rotate_keys: Rotate keys and queries by a Hadamard matrix before keys are cached.
      activation_format: Of the inputs of packed weights, which are used as they are stored; without
        it these inputs are not quantized.
      compute: Type of the products of attention, of the head and of linears left in float; what
        quantized linears are given is rounded to it (docs/performance.md).
      mesh: Cut weights over devices, as in model=4; by default one device has all of them.
      implementation: triton moves and rounds inputs in MXFP4 in one kernel, and multiplies a few
        tokens with weights in MXFP4 as they are packed; xla has no kernels and decodes weights
        before; by default the first of these that the device runs (docs/performance.md).
      imports: Modules to import first, for transforms and formats that this package does not have.
    """

    model: Path
    prompt: tuple[str, ...]
    chat: Flag = False
    bos: Flag = False
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    cache: str = "bf16"
    rotate_keys: Flag = False
    activation_format: str | None = None
    compute: Compute = "float32"
    mesh: str | None = None
    implementation: Implementation | None = None
    imports: Imports = ()
    terminal: Printing = Terminal()
