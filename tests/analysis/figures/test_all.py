"""What holds for every figure: it fits its page, can be read, and is the same each time."""

import re

import numpy as np
import pytest
from matplotlib.text import Text

from duquantpp_jax.analysis import figures
from duquantpp_jax.analysis.figures import style
from experiments import figures as studies

RNG = np.random.default_rng(0)
X = RNG.standard_normal((40, 64))
SITE = "model.layers.0.mlp.down_proj input"
ERRORS = {name: RNG.lognormal(size=200) for name in ("block_hadamard", "duquantpp_released")}
BYTES = {name: RNG.integers(110, 130, 100).astype(np.uint8) for name in ERRORS}
CODES = {name: RNG.integers(0, 16, 100).astype(np.uint8) for name in ERRORS}
STEPS = np.arange(5)
PIVOT = {
    "targets": 65408,
    "rows": [*ERRORS],
    "columns": ["floor", "even"],
    "baseline": "block_hadamard",
    "clusters": {"unit": "document", "count": 16},
    "entries": [
        {
            **{"row": recipe, "column": rule, "kl": {"value": RNG.uniform(0.1, 0.2)}},
            "difference": {"kl": {"value": 0.02, "ci95": [0.015, 0.03]}},
        }
        for recipe in ERRORS
        for rule in ("floor", "even")
    ],
}
SITES = {site: np.abs(RNG.standard_normal((4, 64))) for site in ("attention_in", "mlp_out")}

EXAMPLES = {
    "surface": lambda c: figures.surface({"before": 90 * X, "after": X}, title=SITE, columns=c),
    "log2 surface": lambda c: figures.surface(
        dict.fromkeys(("before", *ERRORS)[: c + 1], X), log2=True, title=SITE, columns=c
    ),
    "amax_map": lambda c: figures.amax_map(SITES, title="a model", columns=c),
    "sqnr": lambda c: figures.sqnr(dict.fromkeys(ERRORS, SITES), title="a model", columns=c),
    "error_ecdf": lambda c: studies.error_ecdf(ERRORS, title=SITE, columns=c),
    "scale_occupancy": lambda c: figures.scale_occupancy(BYTES, title=SITE, columns=c),
    "code_occupancy": lambda c: figures.code_occupancy(CODES, title=SITE, columns=c),
    "divergences": lambda c: figures.divergences(PIVOT, columns=c),
    "rotation": lambda c: studies.rotation(
        dict.fromkeys(ERRORS, X[:32, :32] / 17), title=SITE, columns=c
    ),
    "loss_curves": lambda c: studies.loss_curves(
        STEPS, {"held out": X[0, :5] ** 2}, {"R": 1e-7 + X[1, :5] ** 2}, title=SITE, columns=c
    ),
    "roofline": lambda c: studies.roofline(
        {"MXFP4": 9e15, "bfloat16": 2.25e15},
        8e12,
        {"rotate_quantize, 16384 x 8192": (24.0, 1.6e14)},
        title="B200, predicted",
        columns=c,
    ),
}
TWO_COLUMNS_ONLY = {
    "comparison": lambda _: figures.comparison(PIVOT, (SITE, {"before": X[0] ** 2})),
    "block_errors": lambda _: studies.block_errors(ERRORS, tuple(ERRORS), title=SITE),
}
CASES = [(name, columns) for name in EXAMPLES for columns in (1, 2)]
CASES += [(name, 2) for name in TWO_COLUMNS_ONLY]


@pytest.mark.parametrize(("name", "columns"), CASES)
def test_all_that_is_drawn_is_on_the_page_and_large_enough_to_read(name, columns):
    figure = (EXAMPLES | TWO_COLUMNS_ONLY)[name](columns)
    figure.draw_without_rendering()
    width, height = figure.get_size_inches()
    assert width == {1: 3.5, 2: 7.2}[columns]
    drawn = figure.get_tightbbox()
    assert drawn.x0 >= 0
    assert drawn.y0 >= 0
    assert drawn.x1 <= width
    assert drawn.y1 <= height
    texts = [t for t in figure.findobj(Text) if t.get_text() and t.get_visible()]
    assert min(t.get_fontsize() for t in texts) >= style.TICK_SIZE


@pytest.mark.parametrize("format", ["png", "svg", "pdf"])
def test_the_same_figure_is_the_same_file(format):
    first, second = (figures.picture(TWO_COLUMNS_ONLY["block_errors"](2), format) for _ in range(2))
    assert first == second


def test_text_in_an_svg_is_text():
    svg = figures.picture(EXAMPLES["error_ecdf"](1), "svg").decode()
    assert re.search(r"<text[^>]*>share of blocks</text>", svg)


@pytest.mark.parametrize(
    "draw",
    [
        figures.surface,
        figures.amax_map,
        lambda named: figures.sqnr({"m": named}),
        studies.error_ecdf,
        studies.rotation,
    ],
)
@pytest.mark.parametrize(
    ("named", "said"),
    [({}, "at least one"), ({"a": np.array([[1.0, np.nan]])}, "NaN or Inf")],
    ids=["nothing", "NaN"],
)
def test_what_cannot_be_drawn_is_refused(draw, named, said):
    if draw is studies.error_ecdf:
        named = {name: array[0] for name, array in named.items()}
    if draw is studies.rotation:
        named = {name: np.vstack([array, array]) for name, array in named.items()}
    with pytest.raises(ValueError, match=said):
        draw(named)
