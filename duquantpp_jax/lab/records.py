"""Records: the results of cells, a file each, in one directory.

    DIGEST.json          a finished cell: configuration, metrics, sums of every row, environment
    DIGEST.failed.json   a failed cell: configuration, and its error in one line

A record holds the names of model and texts, and no directories. Files are written whole or not at
all, with a hash of what they say. A finished cell is never measured again; the next run tries a
failed cell again. A file that is not what was written of its cell is refused.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from duquantpp_jax import files
from duquantpp_jax.evaluation.rows import TARGETS
from duquantpp_jax.evaluation.subject import difference, environment, model_name
from duquantpp_jax.lab.bench import Found
from duquantpp_jax.lab.cells import RECORDS, Cell, digest_of
from duquantpp_jax.models import SITES

Record = dict[str, Any]
"""The contents of one file."""
ANEW = "remove it to measure its cell again"
LEAST_KL = -0.01
"""Of the sum over a row, in nats: what rounding may leave of zero."""
_ROWS = {"document", "kl", "nll", "float_nll", "agreement"}
_TEXTS = {"model": str, "text": str}
_FIELDS = {
    "cell": {"seed": int, "draws": bool},
    "subject": _TEXTS,
    "configuration": _TEXTS,
    "environment": dict,
    "metrics": {"sqnr_db": int | float | None},
    "seconds": {"fit": int | float, "total": int | float},
}
"""What tables read of a finished cell, besides what follows from its rows."""


def path_of(out: Path, cell: Cell, *, failed: bool = False) -> Path:
    """The file of a cell's record, which may not exist."""
    return out / f"{cell.digest}{'.failed' if failed else ''}.json"


def is_recorded(out: Path, cell: Cell) -> bool:
    """Whether the cell is finished, or has failed since the last run began."""
    return path_of(out, cell).exists() or path_of(out, cell, failed=True).exists()


def read(out: Path, cell: Cell, *, failed: bool = False) -> Record | None:
    """The record of a finished cell, or of a failed one; None if there is none."""
    path = path_of(out, cell, failed=failed)
    if not path.exists():
        return None
    try:
        record = files.read_json(path, ANEW)
    except ValueError:
        if path.exists():
            raise
        return None  # another run has just removed it, to try the cell again
    with files.refusing(path, ANEW):
        about = {n: value for n, value in record.items() if n != "sha256"}
        if record.get("sha256") != (found := _hash_of(about)):
            raise ValueError(f"says SHA-256 {record.get('sha256')!s:.16}, and has {found[:16]}")
        if (schema := record.get("schema")) != RECORDS:
            raise ValueError(f"has schema {schema!r:.20}, and this version reads {RECORDS}")
        if (other := digest_of(record["configuration"])) != cell.digest:
            raise ValueError(f"is of the cell {other}, and not of {cell.labels()}")
        if failed:
            record["error"] = files.printable(record["error"])
            return record
        files.check_fields(record, _FIELDS)
        _check_costs(record)
        _check_rows(record["rows"], record["configuration"]["rows"])
        if not all(
            math.isclose(record["metrics"][n], v, rel_tol=1e-9, abs_tol=1e-12)
            for n, v in _metrics(record["rows"]).items()
        ):
            raise ValueError("its metrics are not the means of its rows")
    return record


def _check_costs(record: Record) -> None:
    """Raises ValueError unless decibels, costs and seconds can be what was measured."""
    counts = [*record["seconds"].values()]
    for site, cost in record.get("online", {}).items():
        if site not in SITES:
            raise ValueError(f"has costs of {site!r:.40}, which is no site")
        files.check_fields(cost, {"multiply_adds": int | float, "bytes": int | float})
        counts += cost.values()
    if not math.isfinite(record["metrics"]["sqnr_db"] or 0.0):
        raise ValueError("has an sqnr_db that is not finite")
    if not all(0 <= count < math.inf for count in counts):
        raise ValueError("has seconds or costs that are negative or not finite")


def _check_rows(sums: Mapping[str, Any], count: int) -> None:
    """Raises ValueError unless the sums over rows are numbers that such sums can be."""
    rows = {name: np.asarray(values) for name, values in sums.items()}
    if {*rows} != _ROWS or any(
        array.shape != (count,) or array.dtype.kind not in "if" or not np.isfinite(array).all()
        for array in rows.values()
    ):
        raise ValueError(f"its rows are not {count} finite numbers of each kind")
    document, agreement = rows["document"], rows["agreement"]
    if document.dtype.kind != "i" or np.any(document < 0):
        raise ValueError("the documents of its rows are no numbers of documents")
    if np.any(rows["kl"] < LEAST_KL) or np.any((agreement < 0) | (agreement > TARGETS)):
        raise ValueError("its rows have a negative KL, or agree in more targets than there are")


def mixed(records: Iterable[Record]) -> str | None:
    """Where records were measured in environments whose numbers differ, in words; else None."""
    every = [record["environment"] for record in records]
    return next(filter(None, (difference(every[0], other) for other in every)), None)


def record_of(cell: Cell, found: Found) -> Record:
    """The record of a finished cell.

    Sums over rows are written with the fewest digits that read back as the same float32.
    """
    cell.check_unchanged()
    given = {"kl": found.sums.kl, "nll": found.sums.nll, "float_nll": found.sums.reference_nll}
    given |= {"agreement": found.sums.agreement}
    rows: dict[str, Any] = {"document": found.documents.tolist()}
    rows |= {n: [float(str(v)) for v in sums.astype(np.float32)] for n, sums in given.items()}
    return _about(cell) | {
        "metrics": _metrics(rows) | {"sqnr_db": found.sqnr},
        **({} if found.online is None else {"online": found.online}),
        "rows": rows,
        "environment": environment(),
        "seconds": {name: round(value, 3) for name, value in found.seconds.items()},
    }


def _metrics(rows: Mapping[str, Any]) -> dict[str, float]:
    """The means over targets that follow from the sums over rows."""
    names = ("kl", "nll", "float_nll", "agreement")
    sums = (np.asarray(rows[name], np.float32).astype(np.float64) for name in names)
    kl, nll, float_nll, agreement = (float(np.mean(each / TARGETS)) for each in sums)
    return {
        "kl": kl,
        "nll": nll,
        "excess_nll": nll - float_nll,
        "perplexity": float(np.exp(nll)),
        "float_perplexity": float(np.exp(float_nll)),
        "agreement": agreement,
        "targets": len(rows["document"]) * TARGETS,
    }


def write(out: Path, cell: Cell, found: Found) -> None:
    """Records a finished cell; raises ValueError if its model or texts were changed meanwhile."""
    _write(path_of(out, cell), record_of(cell, found))


def write_error(out: Path, cell: Cell, error: Exception) -> None:
    """Records a failed cell."""
    line = " ".join(f"{type(error).__name__}: {error}".split())
    for path in (cell.model, cell.text, cell.calibration_text, cell.fits):
        if path is not None and path.parent != Path():
            line = line.replace(str(path), path.name)
    if "RESOURCE_EXHAUSTED" in line:
        line = f"out of memory: lower batch_rows ({cell.batch_rows}) or --cache-gib; {line}"
    record = _about(cell) | {"error": line[:500], "environment": environment()}
    _write(path_of(out, cell, failed=True), record)


def _write(path: Path, record: Record) -> None:
    files.write_whole(path, files.to_json(record | {"sha256": _hash_of(record)}, indent=None))


def _hash_of(record: Record) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _about(cell: Cell) -> Record:
    texts = {"text": cell.text, "calibration_text": cell.calibration_text}
    return {
        "schema": RECORDS,
        "cell": {"recipe": cell.recipe, "format": cell.format_label}
        | {"seed": cell.seed, "draws": cell.draws},
        "configuration": cell.configuration(),
        "subject": {"model": model_name(cell.model)}
        | {name: path.name if path else "tokens.npz" for name, path in texts.items()},
    }
