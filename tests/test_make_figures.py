"""The figures of the README are made by their script, of the numbers that it says."""

import sys
from pathlib import Path

import numpy as np
import pytest

import experiments
from duquantpp_jax.checkpoints import testbed
from duquantpp_jax.formats import MXFP4
from experiments import make_figures


@pytest.fixture
def few_rows(shallow, tmp_path, monkeypatch):
    """Four calibration rows of a shallow model, and a directory in place of the project's."""
    rows = testbed.calibration_rows()[:4]
    monkeypatch.setattr(testbed, "calibration_rows", lambda: rows)
    monkeypatch.setattr(make_figures, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    caches = (make_figures._stats, make_figures._fits)
    for cached in caches:
        cached.cache_clear()
    yield tmp_path / "docs"
    for cached in caches:
        cached.cache_clear()


@pytest.mark.slow
def test_the_script_draws_the_worst_site_and_the_errors_of_all_blocks(few_rows, monkeypatch):
    drawn = {}

    def keep(name, make, dpi):
        return lambda: drawn.setdefault(name, make()), dpi

    kept = {name: keep(name, *figure) for name, figure in make_figures.FIGURES.items()}
    monkeypatch.setattr(make_figures, "FIGURES", kept)
    monkeypatch.setattr(sys, "argv", ["make_figures", "surface", "blocks"])
    make_figures.main()
    files = {path.name: path.read_bytes() for path in few_rows.iterdir()}
    assert set(files) == {"surface.png", "blocks.png"}
    assert all(picture.startswith(b"\x89PNG") for picture in files.values())

    before = drawn["surface"].axes[0]
    assert drawn["surface"].get_suptitle().startswith("model.layers.0.mlp.down_proj input")
    x = make_figures._stats(rows=1, length=64)["mlp_out"].sample[0]
    largest = np.abs(np.asarray(x, np.float64)).max()
    assert before.zz_dataLim.intervalx[1] == np.log2(largest)

    errors = []
    for stats in make_figures._stats().values():
        x = np.asarray(stats.sample[:, :: make_figures.EVERY])
        error = np.asarray(MXFP4().quantize(x).dequantize()) - x
        energies = [np.sum(np.square(a).reshape(-1, 32), axis=-1) for a in (error, x)]
        errors.append(energies[0] / energies[1])
    ecdf, scatter = drawn["blocks"].axes
    rtn, *others = ecdf.lines
    rtol = 4 * 32 * 2.0**-24  # two sums of 32 squares, each done twice
    np.testing.assert_allclose(rtn.get_xdata(), np.sort(np.concatenate(errors)), rtol=rtol)
    pairs = np.asarray(scatter.collections[0].get_offsets())
    for line, points in zip(others, pairs.T, strict=True):
        np.testing.assert_array_equal(np.sort(points), line.get_xdata())
    assert [line.get_label() for line in others] == ["block_hadamard", "duquantpp"]


@pytest.mark.slow
def test_the_comparison_shows_every_recipe_of_the_committed_results(few_rows):
    (few_rows.parent / "experiments").symlink_to(Path(experiments.__file__).parent)
    results, channels = make_figures.comparison().axes
    recipes = [text.get_text() for text in results.get_yticklabels()]
    assert [line.get_label() for line in channels.lines] == ["before", *recipes]


def test_a_figure_that_is_not_made_here_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["make_figures", "pie"])
    with pytest.raises(SystemExit, match="2"):
        make_figures.main()
    assert "choose from compare, surface, blocks" in capsys.readouterr().err
