"""A grid runs once, whatever was finished, failed or compiled before."""

import dataclasses
import gc
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duquantpp_jax.commands.compare import CompareOptions, compare
from duquantpp_jax.core import Needs
from duquantpp_jax.evaluation import predict
from duquantpp_jax.evaluation.rows import TARGETS
from duquantpp_jax.lab import bench, records, run, running
from duquantpp_jax.lab.bench import Bench
from duquantpp_jax.ptq.stores import HeadStore
from duquantpp_jax.transforms.basic import FitInTurn, FitSmooth
from duquantpp_jax.transforms.hadamard import FitHadamard
from tests.lab.conftest import TOKENS


def _smoothed(alpha):
    return FitInTurn((FitSmooth(alpha=alpha), FitHadamard()))


def test_every_cell_has_its_record(ran):
    grid, out, outcome = ran
    assert list(outcome.records) == grid
    assert not outcome.errors
    assert sorted(path.name for path in out.glob("*.json")) == sorted(
        f"{cell.digest}.json" for cell in grid
    )
    for cell in grid:
        record = outcome.records[cell]
        assert record["configuration"] == cell.configuration()
        assert record["cell"]["recipe"] == cell.recipe
        assert record["environment"]["jax"] == jax.__version__
        assert len(record["environment"]["code"]) == 16
        assert len(record["rows"]["kl"]) == 8
        kl = np.float32(record["rows"]["kl"])
        assert record["metrics"]["kl"] == np.mean(kl.astype(np.float64) / TARGETS)
        same = record["rows"]["agreement"]
        assert all(count in range(TARGETS + 1) for count in same)
        assert record["metrics"]["agreement"] == pytest.approx(np.mean(same) / TARGETS)


def test_finished_cells_are_never_run_again(ran, monkeypatch):
    grid, out, outcome = ran
    monkeypatch.setattr(Bench, "run", lambda *_: pytest.fail("it ran"))
    assert run(grid, out) == outcome


def test_a_cell_that_is_measured_again_gives_the_same_record_but_for_the_seconds(ran, tmp_path):
    grid, _, outcome = ran
    again = run(grid[:1], tmp_path).records[grid[0]]
    first = dict(outcome.records[grid[0]])
    for record in (first, again):
        del record["seconds"], record["sha256"]  # the latter is of the former, too
    assert json.dumps(first) == json.dumps(again)


def test_a_text_that_is_changed_while_a_cell_is_measured_gives_no_record(tiny, tiny_text, tmp_path):
    text, nothing = shutil.copy(tiny_text, tmp_path / "text.txt"), bench.Found(*[None] * 5)
    cell = dataclasses.replace(tiny("rtn"), text=text)
    assert cell.digest
    text.write_text(text.read_text() + "more")
    with pytest.raises(ValueError, match="rtn, floor, seed 0: model, texts or fits were changed"):
        records.record_of(cell, nothing)
    text.unlink()
    with pytest.raises(ValueError, match=r"give a model and texts that stay|give a text file"):
        records.record_of(cell, nothing)


def test_cells_of_one_configuration_run_once(tiny, tmp_path):
    ticks = []
    grid = [tiny("rtn"), tiny("identity")]
    run(grid, tmp_path, lambda cells, *_: ticks.append(cells))
    assert ticks == [[grid[1]]] or ticks == [[grid[0]]]


def test_no_claim_is_left(tiny, tmp_path):
    run([tiny("rtn", change=Breaks("no luck"))], tmp_path)
    assert list((tmp_path / running.CLAIMS).iterdir()) == []


@pytest.mark.slow
def test_a_cell_gives_what_compare_gives(ran, tiny_directory, tiny_text, monkeypatch):
    grid, _, outcome = ran
    monkeypatch.setattr("duquantpp_jax.commands.compare.CALIBRATION_ROWS", 8)
    monkeypatch.setattr("duquantpp_jax.commands.compare.BATCH_ROWS", 4)
    options = CompareOptions(
        tiny_directory,
        tiny_text,
        tiny_text,
        TOKENS,
        recipes=("block_hadamard",),
        scale_rules=("floor", "even"),
    )
    entries = {(e["row"], e["column"]): e for e in compare(options).results["entries"]}
    for cell in grid[:2]:
        entry = entries[cell.recipe, cell.format_label]
        for name in ("kl", "perplexity", "sqnr_db"):
            assert outcome.records[cell]["metrics"][name] == entry[name]["value"]


@pytest.mark.slow
def test_what_a_cell_gives_does_not_depend_on_what_ran_before(ran, tiny):
    grid, _, outcome = ran
    other = Bench()
    other.run(tiny("wush", "even"))
    for cell in reversed(grid):
        found = other.run(cell)
        assert records.record_of(cell, found)["rows"] == outcome.records[cell]["rows"]


@pytest.mark.slow
def test_cells_that_are_measured_leave_no_arrays_and_no_objects_behind(tiny):
    kept, counts = Bench(), []
    for seed in (1, 2, 3, 4):
        kept.run(tiny("random_hadamard", seed=seed))
        gc.collect()
        counts.append((len(jax.live_arrays()), len(gc.get_objects())))
    arrays, objects = zip(*counts[1:], strict=True)
    assert len({*arrays}) == 1
    assert objects[-1] - objects[1] < 100


@dataclasses.dataclass(frozen=True)
class Breaks:
    """A change of the model that cannot be made."""

    line: str

    def __call__(self, model):
        raise RuntimeError(self.line)


def test_a_failed_cell_is_recorded_the_sweep_goes_on_and_the_next_run_tries_again(tiny, tmp_path):
    bad, good = (tiny("block_hadamard", change=c) for c in (Breaks("no\nluck"), None))
    seen = []
    outcome = run([bad, good], tmp_path, progress=lambda *counts: seen.append(counts))
    assert list(outcome.records) == [good]
    assert outcome.errors == {bad: "RuntimeError: no luck"}
    assert seen[0] == (0, 0, 2)
    assert seen[-1] == (1, 1, 2)
    path = tmp_path / f"{bad.digest}.failed.json"
    assert json.loads(path.read_text())["configuration"] == bad.configuration()
    again = run([bad], tmp_path, lambda *_: None)
    assert not again.errors
    assert not path.exists()


def test_a_failure_names_files_and_not_where_they_lie(tiny, tmp_path):
    cell = tiny("rtn")
    bad = tiny("rtn", change=Breaks(f"{cell.text} does not fit {cell.model}"))
    outcome = run([bad], tmp_path)
    assert outcome.errors == {bad: f"RuntimeError: {cell.text.name} does not fit {cell.model.name}"}
    assert len(cell.text.parts) > 1


def test_a_result_that_is_nan_is_a_failure(tiny, tmp_path):
    cell = tiny("x", fit=FitSmooth(alpha=float("1e9")))
    assert "NaN" in run([cell], tmp_path).errors[cell]


def test_a_record_that_is_none_is_refused_by_name(tiny, tmp_path):
    cell = tiny("rtn")
    records.path_of(tmp_path, cell).write_text("{")
    with pytest.raises(ValueError, match=r"\.json is not JSON .*: remove it to measure its cell"):
        run([cell], tmp_path)


@pytest.mark.slow
def test_cells_that_differ_only_in_arrays_share_one_compilation(tiny):
    compiled = []

    def listen(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    shared = Bench()
    shared.run(tiny("random_hadamard", seed=0))
    programs = predict._compared._cache_size()
    for cell in (
        tiny("duquantpp", seed=0),
        tiny("smoothed", fit=_smoothed(0.25)),
    ):
        shared.run(cell)
    assert len(compiled) > 0  # the fits of new kinds, and so the event is heard
    # A vector of scales and matrices of side 32: one program evaluates them all.
    assert predict._compared._cache_size() == programs
    del compiled[:]
    for cell in (
        tiny("random_hadamard", seed=1),
        tiny("duquantpp", seed=2),
        tiny("smoothed", fit=_smoothed(0.75)),
    ):
        shared.run(cell)
    assert compiled == []


@pytest.mark.parametrize("tokens", [0, 512, 1000])
def test_calibration_tokens_that_are_no_whole_rows_are_refused(tokens, tiny, tmp_path):
    cell = tiny("rtn", calibration_tokens=tokens)
    assert "multiple of 511" in run([cell], tmp_path).errors[cell]


def test_a_calibration_may_be_the_start_of_a_row(tiny):
    assert bench._calibration(tiny("rtn", calibration_tokens=128)).shape == (1, 128)
    assert bench._calibration(tiny("rtn", calibration_tokens=1022)).shape == (2, 511)


def test_neighbours_share_the_fit(tiny):
    grid = [tiny(r, s) for s in ("floor", "even") for r in ("duquantpp", "rtn")]
    ordered = running.order(grid)
    assert [c.recipe for c in ordered] in (
        ["duquantpp"] * 2 + ["rtn"] * 2,
        ["rtn"] * 2 + ["duquantpp"] * 2,
    )


def test_a_model_is_refined_once_for_all_texts(tiny, tiny_text, tmp_path, monkeypatch):
    other, refined = tmp_path / "other.txt", []
    other.write_text(tiny_text.read_text(encoding="utf-8")[::-1], encoding="utf-8")
    monkeypatch.setattr(bench.refining, "refine", lambda *given: refined.append(given[-1]))
    monkeypatch.setattr(bench.refining, "refitted", lambda state, moves: state)
    cells = [
        dataclasses.replace(tiny("rtn", rule, refine=steps), text=text)
        for text in (tiny_text, other)
        for rule, steps in (("floor", 0), ("even", 3), ("floor", 2))
    ]
    shared, grid = Bench(), running.order(cells)
    assert [cell.refine for cell in grid] == [0, 0, 3, 3, 2, 2]
    found = {(cell.refine, cell.text): shared.run(cell).sums.kl for cell in grid}
    assert refined == [3, 2]
    for text in (tiny_text, other):
        np.testing.assert_array_equal(found[2, text], found[0, text])  # nothing was moved
    assert np.all(found[2, tiny_text] != found[2, other])


@pytest.mark.slow
def test_one_calibration_serves_the_fits_that_need_less(ran, tiny, monkeypatch):
    measured, _, outcome = ran
    calibrate, needs = bench.calibrate, []

    def counted(*given, **more):
        needs.append(more["needs"])
        return calibrate(*given, **more)

    monkeypatch.setattr(bench, "calibrate", counted)
    shared, grid = Bench(), running.order([tiny("block_hadamard"), tiny("wush")])
    last = [shared.run(cell) for cell in grid][-1]
    assert [cell.recipe for cell in grid] == ["wush", "block_hadamard"]
    assert needs == [Needs.GRAM]
    assert records.record_of(grid[1], last)["rows"] == outcome.records[measured[0]]["rows"]


def test_a_store_alone_is_measured_with_all_linears_in_float(tiny):
    shared = Bench()
    same, rounded = (
        shared.run(tiny("float", "float", store=HeadStore(jnp.dtype(dtype))))
        for dtype in ("float32", "bfloat16")
    )
    np.testing.assert_allclose(same.sums.kl, 0, atol=1e-3)  # 511 errors of float32
    assert rounded.sums.kl.min() > 10 * np.abs(same.sums.kl).max()
    assert same.sqnr is None
