"""What `duquantpp kernels` is asked."""

import dataclasses
from pathlib import Path

from duquantpp_jax.commands.options.common import Plain, Printing, Terminal


@dataclasses.dataclass(frozen=True)
class Options(Plain):
    """Compile every kernel for a GPU that is not there, and read its machine code.

    Attributes:
      target: The GPU.
      only: Only cases whose kernel, shape or label contains this text.
      model: A quantized model, whose prefill and decode step are compiled whole in place of the
        cases.
      tokens: Of the prompt that is read.
    """

    target: str = "b200"
    only: str = ""
    model: Path | None = None
    tokens: int = 2048
    terminal: Printing = Terminal()
