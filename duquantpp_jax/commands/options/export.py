"""What `duquantpp export` is asked."""

import dataclasses
from pathlib import Path
from typing import Literal

from duquantpp_jax.commands.options.common import Imports, Plain, Printing, Serve, Terminal

Layout = Literal["compressed-tensors", "fp-quant", "dequantized", "gpt-oss"]


@dataclasses.dataclass(frozen=True)
class ExportOptions(Plain):
    """Writes a quantized model for other programs.

    Attributes:
      model: Directory that `duquantpp quantize` wrote.
      format: compressed-tensors (MXFP4, or NVFP4 of nvfp4_calibrated, with at most one matrix for
        each site's input; what vLLM and transformers make of it is printed, docs/serving.md),
        fp-quant (MXFP4 for QuTLASS), dequantized (plain bfloat16, activations not quantized), or
        gpt-oss (its own layout of MXFP4 experts); without it what the program of --serve reads, or
        compressed-tensors.
      out: New directory.
      serve: The program that is to read it: refuses what that would compute otherwise, which
        quantize --serve prevents.
      check: Read what was written again, and compare every bit of packed linears.
      imports: Modules to import first, for transforms and formats that this package does not have.
    """

    model: Path
    format: Layout | None = None
    out: Path = Path("exported")
    serve: Serve | None = None
    check: bool = False
    imports: Imports = ()
    terminal: Printing = Terminal()
