"""A record that is not what was written of its cell is refused, and so is one of elsewhere."""

import functools
import json
import math
import shutil

import pytest

from duquantpp_jax.lab import records, run
from duquantpp_jax.lab.bench import Bench


def _with(place, change, *, hashed=True):
    """Another value in one place; with the hash of what it then says."""

    def edit(path, other):
        record = json.loads(path.read_text())
        *outer, last = place.split(".")
        inner = functools.reduce(dict.__getitem__, outer, record)
        inner[last] = change(inner[last]) if callable(change) else change
        if place.startswith("rows."):
            record["metrics"] |= records._metrics(record["rows"])
        wrong = record.pop("sha256")
        record["sha256"] = records._hash_of(record) if hashed else wrong
        path.write_text(json.dumps(record))

    return edit


MORE = (1 + 1e-6).__mul__
SPOILT = {
    "nothing": (lambda path, other: path.write_text("{}"), "says SHA-256 None, and has"),
    "half": (lambda path, other: path.write_bytes(path.read_bytes()[:999]), "is not JSON"),
    "brackets": (lambda path, other: path.write_text("[" * 10**5), "is not JSON"),
    "a list": (lambda path, other: path.write_text("[]"), "holds no JSON object"),
    "another cell": (lambda path, other: path.write_bytes(other.read_bytes()), "is of the cell"),
    "another schema": (_with("schema", 9, hashed=False), "says SHA-256"),
    **{
        f"another {m}, hashed": (_with(f"metrics.{m}", MORE), "are not the means of its rows")
        for m in ("kl", "excess_nll", "perplexity", "agreement", "targets")
    },
    "another schema, hashed": (_with("schema", 9), "has schema 9, and this version reads"),
    "a negative KL": (_with("rows.kl", [-1.0] * 8), "have a negative KL"),
    "fewer rows": (_with("rows.kl", [1.0] * 7), "not 8 finite numbers of each kind"),
    "documents": (_with("rows.document", [-1] * 8), "no numbers of documents"),
    "decibels": (_with("metrics.sqnr_db", math.nan), "not finite"),
    "seconds": (_with("seconds.fit", -1), "negative or not finite"),
    "a site": (_with("online", {"\x1b": {}}), "which is no site"),
}


@pytest.mark.parametrize(("spoil", "says"), SPOILT.values(), ids=SPOILT)
def test_a_record_that_is_not_what_was_written_of_its_cell_is_named(spoil, says, ran, tmp_path):
    grid, out, _ = ran
    path, other = (
        shutil.copy(records.path_of(out, cell), records.path_of(tmp_path, cell))
        for cell in grid[:2]
    )
    spoil(path, other)
    with pytest.raises(ValueError, match=rf"^[^\n]*{path.name}[^\n]*{says}[^\n]*$"):
        run(grid[:2], tmp_path)


def test_cells_of_other_threads_or_versions_are_not_mixed_with_what_is_recorded(
    ran, tmp_path, monkeypatch
):
    grid, out, _ = ran
    shutil.copy(records.path_of(out, grid[0]), tmp_path)
    monkeypatch.setattr(Bench, "run", lambda *_: pytest.fail("it ran"))
    monkeypatch.setenv("PJRT_NPROC", "99")
    assert run(grid[:1], tmp_path).records  # nothing is left to measure
    with pytest.raises(ValueError, match=r"measured with threads .*, not \{'xla': 99"):
        run(grid[:2], tmp_path)
    path = records.path_of(tmp_path, grid[1])
    record = json.loads(records.path_of(out, grid[1]).read_text())
    del record["sha256"]
    for name, says in (("cores", None), ("code", None), ("jaxlib", "measured with jaxlib")):
        record["environment"][name] = "other"
        records._write(path, record)
        if says is None:
            assert len(run(grid[:2], tmp_path).records) == 2
            continue
        with pytest.raises(ValueError, match=says):
            run(grid[:2], tmp_path)
