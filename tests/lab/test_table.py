"""A pivot holds the numbers of its records, its intervals and its stars; a page shows them."""

import dataclasses
import html.parser
import re

import numpy as np
import pytest

from duquantpp_jax.evaluation.intervals import estimate, holm
from duquantpp_jax.evaluation.rows import TARGETS
from duquantpp_jax.lab import Cell, Outcome, report, table
from duquantpp_jax.lab.table import Layout, pivots

ROWS = 12


def _record(cell, kl):
    kl = np.asarray(kl, np.float64)
    return {
        "cell": {"recipe": cell.recipe, "format": cell.format_label, "seed": cell.seed},
        "configuration": {"fit": cell.recipe},
        "subject": {"model": "tiny", "text": "text.txt"},
        "metrics": {
            "kl": float(kl.mean()),
            "excess_nll": float(kl.mean()) / 2,
            "perplexity": 20.0,
            "float_perplexity": 19.0,
            "sqnr_db": 17.0,
            "targets": ROWS * TARGETS,
        },
        "rows": {"document": list(range(ROWS)), "kl": (kl * TARGETS).tolist()},
        "environment": {"jax": "1"},
        "seconds": {"fit": 3.0 - 2 * cell.seed, "total": 4.0},
    }


@pytest.fixture
def outcome():
    """A baseline, a method with two seeds that is ahead, one that is not, and one that failed."""
    random = np.random.default_rng(0)
    text = random.normal(size=ROWS) / 50 + 0.2
    noise = lambda: random.normal(size=ROWS) / 500  # noqa: E731
    cells = {
        Cell("block_hadamard"): text,
        Cell("ahead", seed=0): text - 0.02 + noise(),
        Cell("ahead", seed=1): text - 0.0205 + noise(),
        Cell("level"): text + noise(),
        Cell("block_hadamard", "even"): text / 2,
        Cell("level", "even"): text / 2 + noise(),
    }
    records = {cell: _record(cell, kl) for cell, kl in cells.items()}
    return Outcome(records, {Cell("broken"): "ValueError: no <luck>"})


LAYOUT = Layout(baseline="block_hadamard")


def test_a_pivot_holds_means_over_seeds_and_paired_intervals(outcome):
    (pivot,) = pivots(outcome, LAYOUT)
    assert pivot["rows"] == ["block_hadamard", "ahead", "level", "broken"]
    assert pivot["columns"] == ["mxfp4", "even"]
    entries = {(one["row"], one["column"]): one for one in pivot["entries"]}
    kl = {cell: np.asarray(r["rows"]["kl"]) / TARGETS for cell, r in outcome.records.items()}
    seeds = {seed: kl[Cell("ahead", seed=seed)] for seed in (0, 1)}
    wanted = estimate(seeds, np.arange(ROWS), {0: kl[Cell("block_hadamard")]})
    ahead = entries["ahead", "mxfp4"]
    assert ahead["seeds"] == [0, 1]
    assert ahead["kl"] == pytest.approx(np.mean([kl[Cell("ahead", seed=s)].mean() for s in (0, 1)]))
    assert (ahead["difference"], ahead["ci95"], ahead["p"]) == wanted[:3]
    assert wanted.sources == "text and seeds"
    assert entries["block_hadamard", "mxfp4"]["difference"] is None
    assert ("ahead", "even") not in entries
    (failed,) = pivot["failed"]
    assert failed == {
        "row": "broken",
        "column": "mxfp4",
        "seed": 0,
        "error": "ValueError: no <luck>",
    }


def test_stars_follow_holms_correction_within_a_column(outcome):
    (pivot,) = pivots(outcome, LAYOUT)
    entries = {(one["row"], one["column"]): one for one in pivot["entries"]}
    assert entries["ahead", "mxfp4"]["significant"]
    adjusted = holm([entries[row, "mxfp4"]["p"] for row in ("ahead", "level")])
    assert entries["level", "mxfp4"]["significant"] == (adjusted[1] <= 0.05)
    assert entries["block_hadamard", "mxfp4"]["significant"] is None


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


def test_the_table_in_markdown_shows_kl_spread_difference_star_and_the_fastest_fit(outcome):
    (pivot,) = pivots(outcome, LAYOUT)
    text = table.markdown(pivot)
    (line,) = [line for line in text.splitlines() if line.startswith("| ahead |")]
    assert re.fullmatch(
        r"\| ahead \| 0\.\d{4} \(0\.\d{4}-0\.\d{4}\) \| -0\.02\d\d ± 0\.\d{4}\* \|  \|  \| 1\.0 \|",
        line,
    )
    assert "| block_hadamard | " in text
    for entry in pivot["entries"]:
        del entry["fit_seconds"]  # as in summaries of before
    assert "fit, s" in text
    assert "fit, s" not in table.markdown(pivot)


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
    page = report.page("grid", "Is <this> a question?", found, outcome)
    parsed = _Page()
    parsed.feed(page)
    assert (parsed.tags["table"], parsed.tags["svg"]) == (1, 1)
    assert parsed.tags["tr"] == 1 + 5
    assert [link for link in parsed.links if link.startswith(("http", "//"))] == []
    for entry in found[0]["entries"]:
        assert str(entry["kl"]) in parsed.values
    assert "Is &lt;this&gt; a question?" in page
    assert "no &lt;luck&gt;" in page
    assert '"jax": "1"' in page.replace("&quot;", '"')


def test_a_page_of_a_grid_without_results_says_so():
    outcome = Outcome({}, {Cell("broken"): "ValueError: no"})
    page = report.page("grid", "", pivots(outcome, Layout()), outcome)
    assert "no cell is finished" in page
    assert "ValueError: no" in page
