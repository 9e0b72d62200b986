"""Records: what is known of cells, one file each, in one directory.

    DIGEST.json          a finished cell: configuration, metrics, sums of every row, environment
    DIGEST.failed.json   a failed one: configuration and its error in one line

Neither says where files lie: model and texts are named as they are called, errors included.
Files are written whole or not at all. A finished cell is never measured again; a failed one is
tried again by the next run.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from duquantpp_jax import files
from duquantpp_jax.evaluation.rows import TARGETS
from duquantpp_jax.evaluation.subject import environment, model_name
from duquantpp_jax.lab.bench import Found
from duquantpp_jax.lab.cells import SCHEMA, Cell

Record = dict[str, Any]
"""The contents of one file."""


def path_of(out: Path, cell: Cell, *, failed: bool = False) -> Path:
    """Where the record of a cell is, or will be."""
    return out / f"{cell.digest}{'.failed' if failed else ''}.json"


def is_recorded(out: Path, cell: Cell) -> bool:
    """Whether the cell is finished, or failed since the last run began."""
    return path_of(out, cell).exists() or path_of(out, cell, failed=True).exists()


def read(out: Path, cell: Cell) -> Record | None:
    """The record of a finished cell.

    Raises:
      ValueError: The file is not one that `write` wrote.
    """
    return _read(path_of(out, cell))


def read_error(out: Path, cell: Cell) -> str | None:
    """Why a cell failed."""
    record = _read(path_of(out, cell, failed=True))
    return None if record is None else record["error"]


def _read(path: Path) -> Record | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        raise ValueError(f"{path} is not the record of a cell: remove it to run it anew") from None


def record_of(cell: Cell, found: Found) -> Record:
    """What is known of a finished cell.

    Sums over rows are the shortest digits that give the same float32 numbers.
    """
    kl, nll, float_nll = (
        np.mean(np.asarray(one, np.float64) / TARGETS)
        for one in (found.kl, found.nll, found.float_nll)
    )
    return _about(cell) | {
        "metrics": {
            "kl": float(kl),
            "nll": float(nll),
            "excess_nll": float(nll - float_nll),
            "perplexity": float(np.exp(nll)),
            "float_perplexity": float(np.exp(float_nll)),
            "agreement": float(np.mean(np.asarray(found.agreement, np.float64) / TARGETS)),
            "sqnr_db": found.sqnr,
            "targets": len(found.kl) * TARGETS,
        },
        **({} if found.online is None else {"online": found.online}),
        "rows": {
            "document": found.documents.tolist(),
            "kl": _digits(found.kl),
            "nll": _digits(found.nll),
            "float_nll": _digits(found.float_nll),
            "agreement": _digits(found.agreement),
        },
        "environment": environment(),
        "seconds": {name: round(value, 3) for name, value in found.seconds.items()},
    }


def write(out: Path, cell: Cell, found: Found) -> None:
    """Records a finished cell."""
    files.write_whole(path_of(out, cell), files.to_json(record_of(cell, found), indent=None))


def write_error(out: Path, cell: Cell, error: Exception) -> None:
    """Records a failed cell."""
    line = " ".join(f"{type(error).__name__}: {error}".split())
    for path in (cell.model, cell.text, cell.calibration_text, cell.fits):
        if path is not None and path.parent != Path():
            line = line.replace(str(path), path.name)
    record = _about(cell) | {"error": line[:500], "environment": environment()}
    files.write_whole(path_of(out, cell, failed=True), files.to_json(record, indent=None))


def forget_failures(out: Path, cells: list[Cell]) -> None:
    """Removes the records of failed cells, so that they are tried again."""
    for cell in cells:
        path_of(out, cell, failed=True).unlink(missing_ok=True)


def _about(cell: Cell) -> Record:
    return {
        "schema": SCHEMA,
        "cell": {
            "recipe": cell.recipe,
            "format": cell.format_label,
            "seed": cell.seed,
            "draws": cell.draws,
        },
        "configuration": cell.configuration(),
        "subject": {
            "model": model_name(cell.model),
            **{
                name: path.name if path else "tokens.npz"
                for name, path in (
                    ("text", cell.text),
                    ("calibration_text", cell.calibration_text),
                )
            },
        },
    }


def _digits(sums: np.ndarray) -> list[float]:
    return [float(str(one)) for one in sums]
