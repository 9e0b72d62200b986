"""What `duquantpp serve` is asked."""

import dataclasses
from pathlib import Path

import tyro

from duquantpp_jax.commands.options.common import Implementation, Imports, Plain, Printing, Terminal


@dataclasses.dataclass(frozen=True)
class ServeOptions(Plain):
    """Serves a model: /v1/completions and /v1/chat/completions, as OpenAI's interface has them.

    Attributes:
      model: Hugging Face directory, GGUF file, hf:ORG/NAME or smollm2 (docs/models.md); or a
        quantized model.
      host: Address to listen on; the default takes requests of this machine alone, and there is no
        password.
      port: To listen on; 0 takes a free one.
      name: Of the model in requests; by default the directory's.
      rows: Most texts that are written together; others wait.
      waiting: Most texts that wait; more are refused.
      max_new_tokens: Most new tokens of a text.
      cache: Format of the key-value cache: float32, bf16, mxfp8, mxfp4.
      activation_format: Of the inputs of packed weights, which are used as they are stored; without
        it these inputs are not quantized.
      implementation: triton moves and rounds inputs in MXFP4 in one kernel, and multiplies a few
        tokens with weights in MXFP4 as they are packed; xla has no kernels and decodes weights
        before; by default the first of these that the device runs (docs/performance.md).
      imports: Modules to import first, for transforms and formats that this package does not have.
    """

    model: tyro.conf.Positional[Path]
    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None
    rows: int = 8
    waiting: int = 256
    max_new_tokens: int = 1024
    cache: str = "bf16"
    activation_format: str | None = None
    implementation: Implementation | None = None
    imports: Imports = ()
    terminal: Printing = Terminal()
