"""`duquantpp export`: writes a quantized checkpoint in a layout that other programs read."""

import dataclasses
from pathlib import Path

from duquantpp_jax.checkpoints import readers
from duquantpp_jax.checkpoints.layouts import Layout, write_export
from duquantpp_jax.checkpoints.readers import Serve
from duquantpp_jax.commands.evaluate import Imports
from duquantpp_jax.commands.progress import Step, progress_bar
from duquantpp_jax.recipes import import_modules


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """Writes a quantized model for other programs.

    Attributes:
      model: Directory that `duquantpp quantize` wrote.
      format: compressed-tensors (MXFP4, with at most one matrix for each site's input; what vLLM
        and transformers make of it is printed, docs/serving.md), dequantized (plain bfloat16,
        activations not quantized), or gpt-oss (its own layout of MXFP4 experts).
      serve: The program that is to read it: refuses what that would compute otherwise, which
        quantize --serve prevents.
      out: New directory.
      imports: Modules to import first, for transforms and formats that this package does not have.
    """

    model: Path
    format: Layout = "compressed-tensors"
    serve: Serve | None = None
    out: Path = Path("exported")
    imports: Imports = ()


def export(options: ExportOptions, progress: Step = lambda *_: None) -> list[str]:
    """Writes the directory; returns notes for the user.

    Raises:
      ValueError: The format cannot express the model; one line that says why.
    """
    import_modules(options.imports)
    return write_export(options.model, options.format, options.out, progress, options.serve)


def run(options: ExportOptions) -> int:
    """Runs the command and prints the notes; returns the exit code."""
    with progress_bar() as progress:
        notes = export(options, progress)
    print("\n".join([*notes, f"Written to {options.out}."]))
    if options.format == "compressed-tensors":
        print(readers.SNIPPET.replace("DIRECTORY", repr(str(options.out))))
    return 0
