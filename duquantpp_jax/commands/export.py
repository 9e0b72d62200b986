"""`duquantpp export`: writes a quantized checkpoint in a layout that other programs read."""

from duquantpp_jax.checkpoints.layouts import write_export
from duquantpp_jax.checkpoints.readers import READERS, SNIPPETS
from duquantpp_jax.checkpoints.reread import read_again
from duquantpp_jax.commands.options.export import ExportOptions, Layout
from duquantpp_jax.commands.progress import Step, progress_bar
from duquantpp_jax.recipes import import_modules


def export(options: ExportOptions, progress: Step = lambda *_: None) -> list[str]:
    """Writes the directory; returns notes for the user.

    Raises:
      ValueError: The format cannot express the model; one line that says why.
    """
    import_modules(options.imports)
    notes = write_export(options.model, layout(options), options.out, progress, options.serve)
    return [*notes, read_again(options.out, options.model)] if options.check else notes


def layout(options: ExportOptions) -> Layout:
    """The layout that is asked for, or that the program reads which is to serve the export."""
    asked = READERS[options.serve].layout if options.serve else "compressed-tensors"
    return options.format or asked


def run(options: ExportOptions) -> int:
    """Runs the command and prints the notes; returns the exit code."""
    with progress_bar(options.terminal) as progress:
        notes = export(options, progress)
    said, written = [*notes, f"Written to {options.out}."], layout(options)
    if written in ("compressed-tensors", "fp-quant"):
        said.append(SNIPPETS[written].replace("DIRECTORY", repr(str(options.out))))
    result = {"out": str(options.out), "format": written, "notes": notes}
    options.terminal.give(result, lambda: print("\n".join(said)))
    return 0
