"""What `duquantpp ablate` is asked."""

import dataclasses
from pathlib import Path
from typing import Literal

import tyro

from duquantpp_jax.commands.options.common import Imports, Plain, Printing, Terminal


@dataclasses.dataclass(frozen=True)
class AblateOptions(Plain):
    """Measures the grid of a Python file; cells that are finished are not measured again.

    Attributes:
      model: Hugging Face directory, GGUF file, hf:ORG/NAME or smollm2; without it, the embedded
        model.
      text: Texts to evaluate on (docs/evaluate.md), each with its own table.
      calibration_text: Texts to calibrate on; every cell that names none runs with each. model is
        rows that the model writes itself.
      data: Further data, for files that read some.
      tokens: Targets to evaluate on, over what the cells say.
      formats: Of weights and activations, by the names of duquantpp quantize; every cell that
        leaves its format open runs with each.
      weight_formats: Of weights alone.
      activation_formats: Of activations alone.
      scale_rules: Short for --formats mxfp4:RULE.
      only: Rows (the baseline runs too) and columns of the table to run, by name; by default all.
      workers: Processes, GPUs or jobs that measure at the same time.
      executor: processes (this one, or with several workers processes that share its cores), gpus
        (a process for each GPU), or slurm (jobs; needs the extra slurm).
      slurm: Parameters of the jobs as NAME=VALUE, e.g. slurm_partition=gpu gpus_per_node=1.
      cache_gib: Bound on the float model's log-probabilities that each process keeps, in GiB.
      out: Directory of the records, a JSON file for each cell; by default ablate-out/NAME of FILE.
      text_key: Of the text in .jsonl files, over what the cells say.
      table: Print the table, with differences to the file's baseline.
      summary: JSON file to write the table to, small enough to commit.
      report: HTML page to write.
      imports: Modules to import first, in all processes, for transforms and formats that this
        package does not have.
    """

    model: Path | None = None
    text: tuple[Path, ...] = ()
    calibration_text: tuple[Path, ...] = ()
    data: Path | None = None
    tokens: int | None = None
    formats: tuple[str, ...] = ()
    weight_formats: tuple[str, ...] = ()
    activation_formats: tuple[str, ...] = ()
    scale_rules: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    workers: int = 1
    executor: Literal["processes", "gpus", "slurm"] = "processes"
    slurm: tuple[str, ...] = ()
    cache_gib: float = 2.0
    out: Path | None = None
    text_key: str | None = None
    table: bool = False
    summary: Path | None = None
    report: Path | None = None
    imports: Imports = ()
    terminal: Printing = Terminal()


@dataclasses.dataclass(frozen=True)
class AblateFile(AblateOptions):
    __doc__ = AblateOptions.__doc__
    _: dataclasses.KW_ONLY
    file: tyro.conf.Positional[Path]
    """Python file that defines CELLS, and optionally ROWS, COLUMNS and BASELINE."""
