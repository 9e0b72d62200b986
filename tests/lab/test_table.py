"""A pivot holds the numbers of its records, its intervals and its stars; tables and a page show
them."""

import dataclasses
import html.parser
import re

import numpy as np
import pytest

from duquantpp_jax.evaluation.intervals import estimate, holm
from duquantpp_jax.evaluation.rows import TARGETS
from duquantpp_jax.lab import Cell, Outcome, table
from duquantpp_jax.lab.pivot import Layout, pivots
from duquantpp_jax.lab.webpage import webpage

ROWS = 12


def _record(cell, kl):
    kl = np.asarray(kl, np.float64)
    return {
        "cell": {"recipe": cell.recipe, "seed": cell.seed, "draws": cell.recipe == "ahead"},
        "configuration": {"fit": cell.recipe, "model": "a" * 64, "text": "b" * 64},
        "subject": {"model": "tiny", "text": "text.txt"},
        "metrics": {
            "kl": float(kl.mean()),
            "nll": 3.0,
            "excess_nll": float(kl.mean()) / 2,
            "perplexity": 20.0,
            "float_perplexity": 19.0,
            "sqnr_db": 17.0,
            "targets": ROWS * TARGETS,
        },
        "rows": {
            "document": list(range(ROWS)),
            "kl": (kl * TARGETS).tolist(),
            "nll": ((3 + kl / 2) * TARGETS).tolist(),
            "float_nll": [3 * TARGETS] * ROWS,
        },
        "environment": {"jax": "1", "cores": 2},
        "seconds": {"fit": 3.0 - 2 * cell.seed, "total": 4.0},
    }


@pytest.fixture
def outcome():
    """A baseline, a method with two seeds that is ahead, one that is not, and one that failed."""
    random = np.random.default_rng(0)
    text = random.normal(size=ROWS) / 50 + 0.2
    noise = lambda: random.normal(size=ROWS) / 500  # noqa: E731
    cells = {
        Cell("block_hadamard", "floor"): text,
        Cell("ahead", "floor", seed=0): text - 0.02 + noise(),
        Cell("ahead", "floor", seed=1): text - 0.0201 + noise(),
        Cell("level", "floor"): text + noise(),
        Cell("block_hadamard", "even"): text / 2,
        Cell("level", "even"): text / 2 + noise(),
    }
    records = {cell: _record(cell, kl) for cell, kl in cells.items()}
    return Outcome(records, {Cell("broken", "floor"): "ValueError: no <luck>"})


LAYOUT = Layout(baseline="block_hadamard")


def _entries(pivot):
    return {(entry["row"], entry["column"]): entry for entry in pivot["entries"]}


def test_a_pivot_holds_means_over_seeds_and_paired_intervals(outcome):
    (pivot,) = pivots(outcome, LAYOUT)
    assert pivot["rows"] == ["block_hadamard", "ahead", "level", "broken"]
    assert pivot["columns"] == ["floor", "even"]
    entries = _entries(pivot)
    rows = {c: np.asarray(r["rows"]["kl"]) / TARGETS for c, r in outcome.records.items()}
    seeds = {seed: rows[Cell("ahead", "floor", seed=seed)] for seed in (0, 1)}
    ahead = entries["ahead", "floor"]
    for measure, factor in (("kl", 1), ("excess_nll", 0.5)):
        values = {seed: factor * of for seed, of in seeds.items()}
        base = {0: factor * rows[Cell("block_hadamard", "floor")]}
        wanted = estimate(values, np.arange(ROWS), base)
        found = ahead["difference"][measure]
        assert found["value"] == pytest.approx(wanted.mean)
        assert found["ci95"] == pytest.approx(wanted.ci95)
        assert found["p"] == pytest.approx(wanted.p)
        alone = estimate(values, np.arange(ROWS))
        assert ahead[measure]["value"] == pytest.approx(alone.mean)
        assert ahead[measure]["ci95"] == pytest.approx(alone.ci95)
        assert ahead[measure]["range"] == pytest.approx(sorted(v.mean() for v in values.values()))
    assert ahead["seeds"] == [0, 1]
    assert ahead["difference"]["interval"] == "text and seeds"
    assert entries["level", "floor"]["difference"]["interval"] == "text"
    assert entries["block_hadamard", "floor"]["difference"] is None
    assert ("ahead", "even") not in entries
    (failed,) = pivot["failed"]
    assert failed == {
        "row": "broken",
        "column": "floor",
        "seed": 0,
        "error": "ValueError: no <luck>",
    }


def test_a_difference_is_to_the_baseline_of_its_own_column(outcome):
    entries = _entries(pivots(outcome, LAYOUT)[0])
    for column in ("floor", "even"):
        level, base = (entries[row, column]["kl"]["value"] for row in ("level", "block_hadamard"))
        found = entries["level", column]["difference"]["kl"]["value"]
        assert found == pytest.approx(level - base)


def test_stars_follow_holms_correction_over_the_table(outcome):
    entries = _entries(pivots(outcome, LAYOUT)[0])
    judged = [e["difference"]["kl"] for e in entries.values() if e["difference"]]
    assert len(judged) == 3
    for found, p in zip(judged, holm([each["p"] for each in judged]), strict=True):
        assert found["significant"] == (p <= 0.05)
    assert entries["ahead", "floor"]["difference"]["kl"]["significant"]


def test_each_model_and_text_has_its_table(outcome, tmp_path):
    moved = {dataclasses.replace(c, text=tmp_path / "other"): r for c, r in outcome.records.items()}
    both = Outcome(outcome.records | moved, {})
    assert [len(pivot["entries"]) for pivot in pivots(both, LAYOUT)] == [5, 5]


def test_two_cells_in_one_place_are_refused(outcome):
    with pytest.raises(ValueError, match=r"row block_hadamard, column x.*ROWS or COLUMNS"):
        pivots(outcome, Layout(columns=lambda _: "x"))


def test_a_baseline_that_is_no_row_is_refused(outcome):
    with pytest.raises(
        ValueError, match=r"baseline nobody is no row.*choose one of block_hadamard"
    ):
        pivots(outcome, Layout(baseline="nobody"))


@pytest.mark.parametrize("measure", ["kl", "excess_nll"])
def test_markdown_shows_the_spread_the_difference_its_star_and_the_fastest_fit(outcome, measure):
    (pivot,) = pivots(outcome, LAYOUT)
    text = table.markdown(pivot, measure)
    (line,) = [line for line in text.splitlines() if line.startswith("| ahead |")]
    number = r"0\.\d{4}"
    assert re.fullmatch(
        rf"\| ahead \| {number} \({number}-{number}\) \| -{number} ± {number}\* \|  \|  \| 1\.0 \|",
        line,
    )
    assert f"{_entries(pivot)['ahead', 'floor'][measure]['value']:.4f} (" in line
    assert "| block_hadamard | " in text
    for entry in pivot["entries"]:
        del entry["fit_seconds"]  # as in summaries of before
    assert "fit, s" in text
    assert "fit, s" not in table.markdown(pivot)


def test_a_recipe_that_draws_and_has_one_seed_says_so_and_gets_no_star(outcome):
    assert table.difference(_entries(pivots(outcome, LAYOUT)[0])["ahead", "floor"]).endswith("*")
    del outcome.records[Cell("ahead", "floor", seed=1)]
    entries = _entries(pivots(outcome, LAYOUT)[0])
    assert table.value(entries["ahead", "floor"]).endswith(" (1 seed)")
    assert "seed" not in table.value(entries["level", "floor"])
    assert entries["ahead", "floor"]["difference"]["kl"]["significant"]
    assert not table.difference(entries["ahead", "floor"]).endswith("*")


def test_cells_of_different_machines_or_code_are_not_tabled_without_a_word(outcome):
    assert "environments" not in table.legend(pivots(outcome, LAYOUT)[0])
    other = {"jax": "1", "cores": 16, "code": "1d"}
    outcome.records[Cell("level", "even")]["environment"] = other
    (pivot,) = pivots(outcome, LAYOUT)
    assert "measured in 2 environments: cores 2 | 16, code ? | 1d" in table.legend(pivot)
    assert _entries(pivot)["level", "even"]["environments"] == [1]


def _judged(row, kl, low, high, significant=True, **fields):
    difference = {"value": (low + high) / 2, "ci95": [low, high], "significant": significant}
    entry = {"row": row, "column": "floor", "kl": {"value": kl}, "draws": False, "seeds": [0]}
    return entry | {"difference": {"kl": difference}} | fields


BASE = _judged("block_hadamard", 0.2, 0, 0) | {"difference": None}
AHEAD = _judged("x", 0.1, -0.2, -0.05)
DRAWN = _judged("y", 0.05, -0.3, -0.2, draws=True)


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ([AHEAD], "under floor x is ahead (-0.1250, 95 % interval -0.2000 to -0.0500)."),
        ([AHEAD | {"row": "x, refined"}], "floor x, refined is ahead (-0.1250, 95 % interval"),
        ([_judged("x", 0.1, -0.2, -0.05, False)], "no recipe is shown to be ahead (nearest x"),
        ([_judged("x", 0.1, -0.2, 0.05, False)], "not significant among all differences shown"),
        ([_judged("x", 0.3, 0.05, 0.2)], "block_hadamard is ahead (next x"),
        ([_judged("x", 0.3, -0.05, 0.2, False)], "no recipe is shown to be ahead"),
        ([DRAWN], "no recipe is shown to be ahead (nearest y"),
        ([DRAWN], "over text alone: one seed of a recipe that draws"),
        ([DRAWN | {"seeds": [0, 1]}], "under floor y is ahead"),
        ([AHEAD, DRAWN], "x is ahead (-0.1250, 95 % interval -0.2000 to -0.0500), and of less KL"),
    ],
)
def test_the_verdict_follows_the_corrected_interval_and_asks_for_seeds(entries, says):
    pivot = {"entries": [BASE, *entries], "columns": ["floor"], "baseline": "block_hadamard"}
    assert says in table.verdict(pivot)


def test_without_a_baseline_the_verdict_names_the_least_kl():
    pivot = {"entries": [AHEAD, DRAWN], "columns": ["floor"], "baseline": None}
    assert table.verdict(pivot) == (
        "Without a baseline to compare with: under floor y has the least KL (0.0500)."
    )


def test_a_row_without_a_finished_cell_has_no_time_of_a_fit(outcome):
    (pivot,) = pivots(outcome, LAYOUT)
    assert "| broken |  |  |  |  |  |" in table.markdown(pivot)
    assert table.fit_seconds(pivot, "broken") == ""


class _Page(html.parser.HTMLParser):
    """Counts tags and collects the sortable values of cells."""

    def __init__(self):
        super().__init__()
        self.tags, self.values, self.links = {}, [], []

    def handle_starttag(self, tag, attrs):
        self.tags[tag] = self.tags.get(tag, 0) + 1
        given = dict(attrs)
        if "data-value" in given:
            self.values.append(given["data-value"])
        self.links += [v for k, v in attrs if k in ("href", "src") and not str(v).startswith("#")]


def test_a_page_stands_alone_and_shows_every_entry(outcome):
    found = pivots(outcome, LAYOUT)
    page = webpage("grid", "Is <this> a question?", found, outcome)
    parsed = _Page()
    parsed.feed(page)
    assert (parsed.tags["table"], parsed.tags["svg"]) == (1, 1)
    assert parsed.tags["tr"] == 1 + 5
    assert [link for link in parsed.links if link.startswith(("http", "//"))] == []
    for entry in found[0]["entries"]:
        assert str(entry["kl"]["value"]) in parsed.values
    assert "Is &lt;this&gt; a question?" in page
    assert "no &lt;luck&gt;" in page
    assert '"jax": "1"' in page.replace("&quot;", '"')


def test_a_page_of_a_grid_without_results_says_so():
    outcome = Outcome({}, {Cell("broken", "floor"): "ValueError: no"})
    page = webpage("grid", "", pivots(outcome, Layout()), outcome)
    assert "no cell is finished" in page
    assert "ValueError: no" in page
