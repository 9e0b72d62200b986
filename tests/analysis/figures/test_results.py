"""What figures draw are the numbers."""

import numpy as np
import pytest

from duquantpp_jax.analysis import figures

RECIPES, RULES = ("rtn", "block_hadamard"), ("floor", "even", "log256")


def _entry(row, column, kl, difference=None, ci95=None):
    found = None if difference is None else {"kl": {"value": difference, "ci95": ci95}}
    return {"row": row, "column": column, "kl": {"value": kl}, "difference": found}


def _pivot(columns=RULES):
    rng = np.random.default_rng(0)
    entries = [
        _entry(recipe, rule, float(rng.uniform(0.1, 0.2)), 0.02, [0.015, 0.03])
        for rule in columns
        for recipe in RECIPES
    ]
    return {
        "targets": 1022,
        "rows": list(RECIPES),
        "columns": list(columns),
        "baseline": "block_hadamard",
        "clusters": {"unit": "row", "count": 2},
        "entries": entries,
    }


def test_the_comparison_draws_kl_its_intervals_and_the_sorted_channels():
    pivot = _pivot()
    maxima = {"before": np.array([1.0, 8.0, 2.0]), "rtn": np.array([4.0, 1.0, 2.0])}
    figure = figures.comparison(pivot, ("a site", maxima))
    left, right = figure.axes
    for rule, container in zip(RULES, left.containers, strict=True):
        kl = [entry["kl"]["value"] for entry in pivot["entries"] if entry["column"] == rule]
        points, _, (bars,) = container.lines
        np.testing.assert_array_equal(points.get_xdata(), kl)
        ends = np.array([segment[:, 0] for segment in bars.get_segments()])
        np.testing.assert_allclose(ends, [[value - 0.005, value + 0.01] for value in kl])
        assert container.get_label() == rule
    assert [text.get_text() for text in left.get_yticklabels()] == list(RECIPES)
    for (name, values), line in zip(maxima.items(), right.lines, strict=True):
        np.testing.assert_array_equal(line.get_xdata(), [1, 2, 3])
        np.testing.assert_array_equal(line.get_ydata(), np.sort(values)[::-1])
        assert line.get_label() == name
    assert right.get_title() == "a site"
    assert [axis.get_transform().base for axis in (right.xaxis, right.yaxis)] == [2, 2]


@pytest.mark.parametrize("columns", [RULES[:1], RULES[:2], RULES])
def test_the_points_of_a_recipe_lie_around_its_name(columns):
    (axes,) = figures.divergences(_pivot(columns)).axes
    heights = np.array([container.lines[0].get_ydata() for container in axes.containers])
    np.testing.assert_allclose(heights.mean(axis=0), range(len(RECIPES)), atol=1e-12)
    assert np.ptp(heights, axis=0).max() < 0.6


def test_without_a_baseline_no_bar_is_drawn():
    pivot = _pivot() | {"baseline": None}
    for entry in pivot["entries"]:
        entry["difference"] = None
    figure = figures.comparison(pivot, ("a site", {"before": np.ones(3)}))
    for container in figure.axes[0].containers:
        _, _, (bars,) = container.lines
        assert all(np.ptp(segment[:, 0]) == 0 for segment in bars.get_segments())
    assert "difference" not in figure.axes[0].get_title()


def test_divergences_are_drawn_where_they_are_and_left_out_where_they_are_not():
    entries = [
        _entry("a", "floor", 0.2),
        _entry("b", "floor", 0.1, -0.1, [-0.15, -0.05]),
        _entry("b", "even", 0.3),
    ]
    figure = figures.divergences(_pivot(RULES[:2]) | {"entries": entries, "rows": ["a", "b"]})
    (axes,) = figure.axes
    floor, even = (container.lines[0] for container in axes.containers)
    assert floor.get_xdata().tolist() == [0.2, 0.1]
    assert even.get_xdata().tolist() == [0.3]
    assert [round(y) for y in even.get_ydata()] == [1]
    ends = axes.containers[0].lines[2][0].get_segments()[1]
    assert ends[:, 0].tolist() == pytest.approx([0.05, 0.15])
    assert "difference to block_hadamard" in axes.get_title()


def test_in_one_column_divergences_are_the_same_numbers_and_the_title_spans_the_page():
    narrow, wide = (figures.divergences(_pivot(), columns=c) for c in (1, 2))
    for points, same in zip(narrow.axes[0].containers, wide.axes[0].containers, strict=True):
        np.testing.assert_array_equal(points.lines[0].get_xdata(), same.lines[0].get_xdata())
    assert narrow.get_suptitle() == wide.axes[0].get_title()
    assert narrow.axes[0].get_title() == ""
    assert [text.get_text() for text in narrow.legends[0].get_texts()] == list(RULES)
