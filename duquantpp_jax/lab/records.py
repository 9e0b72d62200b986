"""Records: the results of cells, a file each, in one directory.

    DIGEST.json          a finished cell: configuration, metrics, sums of every row, environment
    DIGEST.failed.json   a failed cell: configuration, and its error in one line

A record holds the names of model and texts, and no directories. Files are written whole or not at
all. A finished cell is never measured again; the next run tries a failed cell again.
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
    """The file of a cell's record, which may not exist."""
    return out / f"{cell.digest}{'.failed' if failed else ''}.json"


def is_recorded(out: Path, cell: Cell) -> bool:
    """Whether the cell is finished, or has failed since the last run began."""
    return path_of(out, cell).exists() or path_of(out, cell, failed=True).exists()


def read(out: Path, cell: Cell, *, failed: bool = False) -> Record | None:
    """The record of a finished cell, or of a failed one; None if there is none."""
    path = path_of(out, cell, failed=failed)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        raise ValueError(f"{path} is not the record of a cell: remove it to run it anew") from None


def record_of(cell: Cell, found: Found) -> Record:
    """The record of a finished cell.

    Sums over rows are written with the fewest digits that read back as the same float32.
    """
    given = {"kl": found.sums.kl, "nll": found.sums.nll, "float_nll": found.sums.reference_nll}
    given |= {"agreement": found.sums.agreement}
    sums = {name: rows.astype(np.float32) for name, rows in given.items()}
    means = (float(np.mean(rows.astype(np.float64) / TARGETS)) for rows in sums.values())
    kl, nll, float_nll, agreement = means
    return _about(cell) | {
        "metrics": {
            "kl": kl,
            "nll": nll,
            "excess_nll": nll - float_nll,
            "perplexity": float(np.exp(nll)),
            "float_perplexity": float(np.exp(float_nll)),
            "agreement": agreement,
            "sqnr_db": found.sqnr,
            "targets": len(found.documents) * TARGETS,
        },
        **({} if found.online is None else {"online": found.online}),
        "rows": {
            "document": found.documents.tolist(),
            **{name: [float(str(value)) for value in rows] for name, rows in sums.items()},
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


def _about(cell: Cell) -> Record:
    texts = {"text": cell.text, "calibration_text": cell.calibration_text}
    return {
        "schema": SCHEMA,
        "cell": {"recipe": cell.recipe, "format": cell.format_label}
        | {"seed": cell.seed, "draws": cell.draws},
        "configuration": cell.configuration(),
        "subject": {"model": model_name(cell.model)}
        | {name: path.name if path else "tokens.npz" for name, path in texts.items()},
    }
