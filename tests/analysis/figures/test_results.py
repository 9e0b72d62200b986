"""What figures draw are the numbers."""

import numpy as np
import pytest

from duquantpp_jax.analysis import figures

RECIPES, RULES = ("rtn", "block_hadamard"), ("floor", "even", "log256")


def _results():
    rng = np.random.default_rng(0)
    rows = [
        {
            "recipe": recipe,
            "scale_rule": rule,
            "kl": float(rng.uniform(0.1, 0.2)),
            "kl_difference": 0.02,
            "kl_difference_ci95": [0.015, 0.03],
        }
        for recipe in RECIPES
        for rule in RULES
    ]
    options = {"recipes": list(RECIPES), "scale_rules": list(RULES)}
    return {"targets": 1022, "rows": rows, "options": options}


def test_the_comparison_draws_kl_its_intervals_and_the_sorted_channels():
    results = _results()
    maxima = {"before": np.array([1.0, 8.0, 2.0]), "rtn": np.array([4.0, 1.0, 2.0])}
    figure = figures.comparison(results, ("a site", maxima), ("row", 2))
    left, right = figure.axes
    for rule, container in zip(RULES, left.containers, strict=True):
        rows = [row for row in results["rows"] if row["scale_rule"] == rule]
        points, _, (bars,) = container.lines
        np.testing.assert_array_equal(points.get_xdata(), [row["kl"] for row in rows])
        ends = np.array([segment[:, 0] for segment in bars.get_segments()])
        wanted = [[row["kl"] - 0.005, row["kl"] + 0.01] for row in rows]
        np.testing.assert_allclose(ends, wanted)
        assert container.get_label() == rule
    assert [text.get_text() for text in left.get_yticklabels()] == list(RECIPES)
    for (name, values), line in zip(maxima.items(), right.lines, strict=True):
        np.testing.assert_array_equal(line.get_ydata(), np.sort(values)[::-1])
        assert line.get_label() == name
    assert right.get_title() == "a site"


def test_without_a_baseline_no_bar_is_drawn():
    results = _results()
    for row in results["rows"]:
        row["kl_difference"] = row["kl_difference_ci95"] = None
    figure = figures.comparison(results, ("a site", {"before": np.ones(3)}), ("row", 2))
    for container in figure.axes[0].containers:
        _, _, (bars,) = container.lines
        assert all(np.ptp(segment[:, 0]) == 0 for segment in bars.get_segments())


def test_divergences_are_drawn_where_they_are_and_left_out_where_they_are_not():
    rows = [
        {"recipe": r, "scale_rule": s, "kl": kl, "kl_difference": d, "kl_difference_ci95": ci}
        for r, s, kl, d, ci in (
            ("a", "floor", 0.2, None, None),
            ("b", "floor", 0.1, -0.1, [-0.15, -0.05]),
            ("b", "even", 0.3, None, None),
        )
    ]
    results = {
        "targets": 511,
        "options": {"recipes": ["a", "b"], "scale_rules": ["floor", "even"]},
        "rows": rows,
    }
    figure = figures.divergences(results, ("row", 1), "a", "column")
    (axes,) = figure.axes
    floor, even = (container.lines[0] for container in axes.containers)
    assert floor.get_xdata().tolist() == [0.2, 0.1]
    assert even.get_xdata().tolist() == [0.3]
    assert [round(y) for y in even.get_ydata()] == [1]
    ends = axes.containers[0].lines[2][0].get_segments()[1]
    assert ends[:, 0].tolist() == pytest.approx([0.05, 0.15])
    assert "difference to a" in axes.get_title()


def test_in_one_column_divergences_are_the_same_numbers_and_the_title_spans_the_page():
    one, two = (figures.divergences(_results(), ("row", 2), "rtn", columns=c) for c in (1, 2))
    for narrow, wide in zip(one.axes[0].containers, two.axes[0].containers, strict=True):
        np.testing.assert_array_equal(narrow.lines[0].get_xdata(), wide.lines[0].get_xdata())
    assert one.get_suptitle() == two.axes[0].get_title()
    assert one.axes[0].get_title() == ""
    assert [text.get_text() for text in one.legends[0].get_texts()] == list(RULES)


def test_channels_alone_are_the_sorted_maxima_on_log2_axes():
    maxima = {"before": np.array([1.0, 8.0, 2.0]), "rtn": np.array([4.0, 1.0, 2.0])}
    (axes,) = figures.channels(maxima, title="a site").axes
    for (name, values), line in zip(maxima.items(), axes.lines, strict=True):
        np.testing.assert_array_equal(line.get_xdata(), [1, 2, 3])
        np.testing.assert_array_equal(line.get_ydata(), np.sort(values)[::-1])
        assert line.get_label() == name
    assert axes.get_title() == "a site"
    assert [axis.get_transform().base for axis in (axes.xaxis, axes.yaxis)] == [2, 2]
