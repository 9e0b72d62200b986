"""Every experiment's grid is well formed, and one runs from its file to its table."""

import collections
import dataclasses
import importlib
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import experiments
from duquantpp_jax import cli
from duquantpp_jax.commands.ablate import AblateOptions, cells_of, grid, layout_of, main
from duquantpp_jax.recipes import FITS, recipe
from duquantpp_jax.transforms.basic import FitInTurn
from experiments import ideas, kv_cache, outliers
from experiments.greedy import FitBestOf
from experiments.seeding import SEEDS, seeded
from tests.conftest import stats_of, tiny_decoder
from tests.documented import undocumented

PLACE = pathlib.Path(experiments.__file__).parent
QUESTIONS = (
    *("rotations", "rotation_size", "greedy", "permutation", "smoothing"),
    *("calibration", "formats", "gptq", "rounding", "kv_cache", "outliers", "stream"),
    *("where", "served", "beat_hadamard", "gathered", "paper_terms", "gptq_settings"),
)


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_grid_is_well_formed(name):
    module = importlib.import_module(f"experiments.{name}")
    assert module.__doc__.partition("\n")[0].endswith("?")
    for part in ("Hypothesis:", "Command:", "Cost:", "Last result"):
        assert part in module.__doc__
    cells = cells_of(module, AblateOptions())
    assert len(grid(cells, AblateOptions())) == len(cells), "two cells of one configuration"
    layout = layout_of(module)
    places = collections.defaultdict(list)
    for cell in cells:
        places[layout.place(cell)].append(cell.seed)
        assert cell.tokens >= 65_000
    assert all(sorted(seeds) in ([0], list(SEEDS)) for seeds in places.values())
    for _, column in places:
        assert (layout.baseline, column) in places
    said = [line for line in module.__doc__.splitlines() if line.startswith("Cost: ")]
    if name != "rotations":
        assert f"{len(cells)} cells" in said[0]


def test_options_hold_where_a_cell_leaves_them_open(tiny_directory, tiny_text, tmp_path):
    module = importlib.import_module("experiments.calibration")
    other = tmp_path / "other.txt"
    other.write_text("other", encoding="utf-8")
    options = AblateOptions(
        tiny_directory, (tiny_text,), (tiny_text, other), tokens=1022, text_key="body"
    )
    cells = grid(cells_of(module, options), options)
    assert len(cells) == 2 * len(module.CELLS)
    assert {cell.calibration_text for cell in cells} == {tiny_text, other}
    assert {(c.model, c.text, c.tokens) for c in cells} == {(tiny_directory, tiny_text, 1022)}
    assert {cell.text_key for cell in cells} == {"body"}
    given = dataclasses.replace(module.CELLS[0], calibration_text=other)
    assert [c.calibration_text for c in grid([given], options)] == [other]


def test_beat_hadamard_has_a_row_for_each_way_to_round_the_fits_that_are_there(tmp_path):
    module = importlib.import_module("experiments.beat_hadamard")
    for name in ("affine_floor", "weights_even"):
        (tmp_path / name).mkdir()
    cells = [c for c in cells_of(module, AblateOptions(data=tmp_path)) if c.fits]
    rows = {(module.ROWS(cell), cell.format, cell.fits.name) for cell in cells}
    assert len(rows) == 7
    assert ("affine, descent, refined 800 steps", "floor", "affine_floor") in rows
    assert ("weights", "even", "weights_even") in rows


@pytest.mark.parametrize("name", ["frozen", "learned_weights"])
def test_data_without_fits_of_the_grid_is_refused(name, tmp_path):
    module = importlib.import_module(f"experiments.{name}")
    for data, says in ((tmp_path / "none", "is no directory"), (tmp_path, "has no fits of this")):
        with pytest.raises(ValueError, match=says):
            cells_of(module, AblateOptions(data=data))
    known = {"frozen": "affine_even_2", "learned_weights": "affine_1600"}[name]
    (tmp_path / known).mkdir()
    cells = cells_of(module, AblateOptions(data=tmp_path))
    assert {cell.fits for cell in cells} == {None, tmp_path / known}


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n, fit in FITS.items() if not isinstance(fit, FitInTurn)])
def test_a_fit_runs_with_several_seeds_exactly_if_it_draws(name):
    x = jax.random.normal(jax.random.key(0), (2, 40, 128)) * jnp.exp(jnp.arange(128) % 7)
    w = (jax.random.normal(jax.random.key(1), (48, 128)),)
    method = recipe(name, "floor")
    moved = [
        method.fit(w, stats_of(x), method, jax.random.key(seed)).transform.activations(x)
        for seed in (0, 1)
    ]
    assert method.draws == bool(jnp.any(moved[0] != moved[1]))


def test_fits_in_turn_draw_if_one_of_them_does():
    assert recipe("duquantpp", "floor").draws
    assert not recipe("smooth_hadamard", "floor").draws


def test_cells_run_once_for_each_seed_that_matters():
    cell = importlib.import_module("experiments.gptq").CELLS[0]
    drawing = dataclasses.replace(cell, recipe="random_hadamard")
    assert [drawn.seed for drawn in seeded(cell)] == [0]
    assert [drawn.seed for drawn in seeded(drawing)] == list(SEEDS)


def test_the_best_of_n_rotations_has_the_least_maximum():
    x = jax.random.normal(jax.random.key(0), (1, 40, 64))
    fit, key = FitBestOf(5), jax.random.key(3)
    w = (jnp.ones((4, 64)),)
    best = fit(w, stats_of(x), recipe("rtn", "floor"), key).transform.matrices
    rotations = np.asarray(jax.random.orthogonal(key, 32, (5,)))
    for block in range(2):
        maxima = [
            np.abs(np.asarray(x[0, :, 32 * block : 32 * block + 32]) @ r).max() for r in rotations
        ]
        np.testing.assert_array_equal(best[block], rotations[np.argmin(maxima)])


def _site():
    """A site whose channels are unlike, with a massive token, and two linears."""
    x = jax.random.normal(jax.random.key(0), (2, 50, 64)) * jnp.exp(jnp.arange(64.0) % 7 / 2)
    w = jax.random.normal(jax.random.key(1), (40, 64))
    return stats_of(x.at[0, 0, 3].set(900.0)), (w[:24], w[24:]), jax.random.key(2)


def test_wush_with_an_exponent_of_one_is_wush():
    stats, w, key = _site()
    method = recipe("wush", "floor")
    ours, theirs = (f(w, stats, method, key).transform for f in (ideas.FitBrake(), method.fit))
    np.testing.assert_allclose(ours.matrices, theirs.matrices, rtol=1e-6)
    np.testing.assert_allclose(ours.inverses, theirs.inverses, rtol=1e-6)


def test_of_several_fits_each_block_and_the_site_take_that_of_least_error():
    stats, w, key = _site()
    method, fits = recipe("rtn", "even"), (ideas.EQUAL, ideas.WUSH, ideas.SMOOTH_HADAMARD)
    given = (stats.sample, jnp.concatenate(w))
    formats = (method.activation_format, method.weight_format)

    def error(fit, of):
        transform = ideas.block_affine(fit(w, stats, method, key).transform, 64, 32)
        return np.asarray(of(*given, transform, formats=formats))

    blocks = [error(fit, ideas.block_errors) for fit in fits]
    np.testing.assert_allclose(
        error(ideas.FitBest(fits), ideas.block_errors), np.min(blocks, axis=0), rtol=1e-5
    )
    whole = [error(fit, ideas.site_error) for fit in fits]
    best = error(ideas.FitBest(fits, per="site"), ideas.site_error)
    np.testing.assert_allclose(best, min(whole), rtol=1e-5)
    assert np.ptp(whole) > 0.1 * min(whole)


def test_gains_make_good_what_rounding_shrinks():
    stats, w, key = _site()
    method = recipe("rtn", "floor")
    fitted = ideas.FitGains(method.fit)(w, stats, method, key)
    x = np.asarray(stats.sample) / np.linalg.norm(stats.sample, axis=1, keepdims=True)
    rounded = np.asarray(method.activation_format.fake_quantize(stats.sample)) / np.linalg.norm(
        stats.sample, axis=1, keepdims=True
    )
    for given, scaled in zip(w, fitted.weights, strict=True):
        y = x @ np.asarray(given).T
        seen = rounded @ np.asarray(method.weight_format.fake_quantize(given)).T
        gains = [
            np.linalg.lstsq(s[:, None], t, rcond=None)[0][0]
            for s, t in zip(seen.T, y.T, strict=True)
        ]
        np.testing.assert_allclose(scaled, np.asarray(given) * np.array(gains)[:, None], rtol=1e-3)
    assert np.mean(gains) > 1


@pytest.mark.parametrize(("threshold", "rule"), [(6, "rceil"), (7, "even"), (8, "floor")])
def test_a_threshold_of_the_scale_is_a_rule_where_one_has_it(threshold, rule):
    x = jax.random.normal(jax.random.key(0), (400, 64)) * 3
    amax = jnp.array([5.9, 6.0, 6.1, 6.9, 7.0, 7.1, 7.9, 8.0, 8.1, 0.0])
    x = jnp.concatenate([x, amax[:, None] * jnp.linspace(-1, 0.9, 64)])
    ours = ideas.Threshold(threshold=threshold).quantize(x)
    theirs = recipe("rtn", rule).weight_format.quantize(x)
    if threshold == 7:  # at 7 itself even rounds up
        ours = ideas.Threshold(threshold=6.9999995).quantize(x)
    np.testing.assert_array_equal(ours.scale_bytes(), theirs.scale_bytes())
    np.testing.assert_array_equal(ours.codes(), theirs.codes())


def test_values_that_are_turned_come_back():
    x = jax.random.normal(jax.random.key(0), (2, 3, 4, 32))
    store = kv_cache.RotatedStore(jnp.dtype(jnp.float32))
    np.testing.assert_allclose(store.decode(store.encode(x)), x, atol=1e-5)


@pytest.fixture
def profile(tmp_path):
    """Channel maxima of a model of three layers, some large."""
    random = np.random.default_rng(0)
    place = tmp_path / "profile.npz"
    names = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    maxima = {
        f"model.layers.{layer}.{name}": np.exp(random.normal(size=48) * 2).astype(np.float32)
        for layer in range(3)
        for name in names
    }
    np.savez(place, **maxima)
    return place


@pytest.mark.parametrize("given", [True, False], ids=["profile", "spike"])
def test_imposed_outliers_are_there_and_leave_the_function_as_it_is(given, profile):
    model = tiny_decoder()
    tokens = jax.random.randint(jax.random.key(0), (2, 16), 0, 257)
    changed = outliers.Impose(1.0, profile if given else None)(model)
    run = jax.jit(lambda m, t: m(t, lambda s, x, w, _: (tuple(x @ v.T for v in w), x)))
    (logits, inputs), (same, grown) = (run(m, tokens) for m in (model, changed))
    np.testing.assert_allclose(same, logits, atol=1e-3 * np.abs(logits).max())
    for site, x in inputs.items():
        ratio = np.abs(grown[site]).max(axis=(1, 2)) / np.abs(x).max(axis=(1, 2))
        growth = ratio.max(axis=1) / np.median(ratio, axis=1)
        assert np.all(growth > 8), site


def test_no_strength_changes_nothing(profile):
    model = tiny_decoder()
    same = outliers.Impose(0.0, profile)(model).parameters()
    for name, array in model.parameters().items():
        np.testing.assert_array_equal(same[name], array)


def test_a_profile_that_is_none_is_refused_by_name(tiny_text):
    with pytest.raises(ValueError, match=r"text\.txt is no npz of channel maxima"):
        outliers.Impose(1.0, tiny_text)(tiny_decoder())


GRID = '''"""Does it run?"""

from duquantpp_jax.lab import Cell

FIELDS = {"tokens": 4 * 511, "calibration_tokens": 4 * 511, "batch_rows": 4}
CELLS = [Cell(name, **FIELDS) for name in ("rtn", "block_hadamard")]
CELLS += [Cell("random_hadamard", seed=seed, **FIELDS) for seed in (0, 1)]
CELLS.append(Cell("nothing", fit=CELLS[0].method().fit, calibration_tokens=1000, tokens=2044))
BASELINE = "block_hadamard"
'''
CLOSED = """from duquantpp_jax.lab import Cell

CELLS = [Cell("rtn", "floor"), Cell("rtn", "even")]
ROWS = lambda cell: f"{cell.recipe}, {cell.format}"
"""


@pytest.fixture
def file(tmp_path):
    place = tmp_path / "a_grid_of_a_test.py"
    place.write_text(GRID, encoding="utf-8")
    return place


def _arguments(directory, text):
    return [
        *("--model", str(directory), "--text", str(text), "--calibration-text", str(text)),
    ]


@pytest.mark.slow
def test_a_file_runs_to_its_table_its_summary_and_its_page(
    file, tiny_directory, tiny_text, tmp_path, capsys
):
    options = [*_arguments(tiny_directory, tiny_text), "--out", str(tmp_path / "out"), "--table"]
    options += ["--summary", str(tmp_path / "s.json"), "--report", str(tmp_path / "r.html")]
    assert cli.main(["ablate", str(file), *options]) == 1
    printed = capsys.readouterr()
    assert "4 of 5 cells finished, 1 failed" in printed.out
    assert "tiny, text.txt, 2,044 targets" in printed.out
    assert "failed: nothing, mxfp4, seed 0: ValueError: 1000 calibration" in printed.err
    summary = json.loads((tmp_path / "s.json").read_text())
    assert undocumented(summary) == set()
    (table,) = summary["tables"]
    assert table["rows"] == ["rtn", "block_hadamard", "random_hadamard", "nothing"]
    rows = {entry["row"]: entry for entry in table["entries"]}
    assert rows["random_hadamard"]["seeds"] == [0, 1]
    kl = {name: row["kl"]["value"] for name, row in rows.items()}
    difference = rows["rtn"]["difference"]["kl"]["value"]
    assert difference == pytest.approx(kl["rtn"] - kl["block_hadamard"])
    assert "<svg" in (tmp_path / "r.html").read_text()

    # Again, as a module, and only one row and the baseline: nothing is left to do.
    module = importlib.import_module(file.stem)
    out = ["--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop:
        main(module, [*_arguments(tiny_directory, tiny_text), *out, "--only", "rtn", "--json"])
    assert stop.value.code == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["grid"] == file.stem
    assert printed["tables"][0]["rows"] == ["rtn", "block_hadamard"]


@pytest.mark.parametrize(
    ("content", "more", "says"),
    [
        (None, (), "is no Python file"),
        ("x = 1", (), "defines no CELLS"),
        ("CELLS = (", (), "is not Python"),
        ("import nowhere_at_all", (), "raises ModuleNotFoundError"),
        (GRID, ("--only", "rnt"), "unknown row or column 'rnt': did you mean rtn?"),
        (GRID, ("--model", "nowhere"), "nowhere"),
        (GRID, ("--executor", "slurm", "--slurm", "x"), "no NAME=VALUE"),
        (GRID, ("--workers", "0"), "--workers 0: give at least 1"),
        (GRID, ("--cache-gib", "-1"), "--cache-gib -1: give 0 or more"),
        (GRID, ("--tokens", "0"), "--tokens 0: give at least 511"),
        (GRID, ("--data", "fits"), "reads no --data"),
        (CLOSED, ("--formats", "even"), "its own format: leave even out"),
        (CLOSED, ("--only", "rtn"), "did you mean 'rtn, even' or 'rtn, floor'?"),
        ("from duquantpp_jax.lab import Cell\nCELLS = [Cell('rnt')]", (), "did you mean rtn"),
    ],
)
def test_a_bad_grid_is_one_line(content, more, says, tmp_path, capsys):
    file = tmp_path / f"bad_grid_{abs(hash((content, more)))}.py"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    out = tmp_path / "out"
    assert cli.main(["ablate", str(file), "--out", str(out), *more]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("duquantpp: ")
    assert printed.err.count("\n") == 1
    assert says in printed.err
    assert not list(out.glob("*.json"))


def test_a_file_with_the_name_of_another_module_is_refused(tmp_path, capsys):
    (tmp_path / "json.py").write_text(GRID, encoding="utf-8")
    before = list(sys.path)
    assert cli.main(["ablate", str(tmp_path / "json.py")]) == 2
    assert "rename it" in capsys.readouterr().err
    assert sys.path == before  # or worker processes would import it in place of the other
