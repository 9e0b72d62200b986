"""`duquantpp learn`: fits for other commands; killed, resumed, and refused where they differ."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from duquantpp_jax.checkpoints import fits, load, load_any, sha256
from duquantpp_jax.checkpoints.directory import layer_file
from duquantpp_jax.checkpoints.fits import load_fits, other_formats, read_about, save_fits
from duquantpp_jax.checkpoints.lazy import Checkpoint
from duquantpp_jax.cli import main
from duquantpp_jax.commands import learn
from duquantpp_jax.commands.learn import LearnOptions, learn_fits, split
from duquantpp_jax.commands.quantize import QuantizeOptions, calibration_tokens, quantize
from duquantpp_jax.evaluation.rows import Rows
from duquantpp_jax.files import read_json
from duquantpp_jax.files.processes import only_process
from duquantpp_jax.learning import named
from duquantpp_jax.learning.moves import PRESETS, moves_named
from duquantpp_jax.models import decoder
from duquantpp_jax.ptq.calibration import calibrate
from duquantpp_jax.ptq.plan import Plan
from duquantpp_jax.ptq.walk import fit_decoder
from duquantpp_jax.recipes import recipe
from duquantpp_jax.transforms import storage
from tests.commands.conftest import contents
from tests.lab.test_webpage import Read


@pytest.fixture
def options(tiny_directory, tiny_text, tmp_path):
    """Two steps on the tiny model, of both the transform and the weights."""
    return LearnOptions(
        model=tiny_directory,
        text=(tiny_text,),
        rows=6,
        held_out=2.0,
        start="block_hadamard",
        moves=("weights",),
        steps=2,
        batch_rows=2,
        check_every=1,
        formats="even",
        out=tmp_path / "fits",
    )


class Killed(Exception):
    """Stands for whatever ends a run."""


def killing(after):
    """A report that kills the run at its `after`-th call."""
    seen = []

    def report(*said):
        seen.append(said)
        if len(seen) == after:
            raise Killed

    return report


@pytest.mark.slow
@pytest.mark.parametrize("through", ["site", "block", "model"])
def test_killed_and_resumed_it_writes_the_same_fits(options, tmp_path, through):
    options = dataclasses.replace(options, through=through, measure=False)
    if through == "block":  # where one layer may learn and another not
        options = dataclasses.replace(options, moves=("smooth_rotation", "weights_moved"))
    learn_fits(options)
    again = dataclasses.replace(options, out=tmp_path / "again")
    with pytest.raises(Killed):
        learn_fits(again, killing(1))
    with pytest.raises(ValueError, match=r"begun with --rate 0\.001, not 0\.5: .*--overwrite"):
        learn_fits(dataclasses.replace(again, rate=0.5))
    with pytest.raises(ValueError, match="no finished fits"):
        read_about(again.out)
    with only_process(again.out), pytest.raises(ValueError, match="by another process: wait"):
        learn_fits(again)
    if through == "site":  # progress that is taken without the command, which refuses by itself
        rows, place = np.zeros((2, 9), np.int32), again.out / learn.PROGRESS
        other = Checkpoint(again.model), recipe("block_hadamard", "even"), rows, rows
        with pytest.raises(ValueError, match=r"layer_0.*'layer 0, learned as \w{16}', not of"):
            named.learn(again, *other, place=place)
    learn_fits(again)
    assert contents(again.out) == contents(options.out)
    assert sorted(contents(again.out)) == ["fits.json", "fits.safetensors"]
    learn_fits(again, killing(1))  # finished: nothing is done
    fits, _ = load_fits(again.out, sha256(options.model))
    for fitted in fits.values():
        assert fitted.weights is not None
        assert {leaf.shape[0] for leaf in jax.tree.leaves(fitted)} == {2}


def test_logs_may_be_inside_out_and_not_among_the_files_of_learning(options, tmp_path):
    inside = dataclasses.replace(options, tensorboard=options.out / "logs" / "a")
    (options.out / "logs" / "a").mkdir(parents=True)
    assert not learn._begin(inside, {})
    with pytest.raises(ValueError, match="holds other files"):
        learn._begin(dataclasses.replace(options, overwrite=True), {})
    for wrong in (options.out, options.out / "progress", options.out / "progress" / "logs"):
        with pytest.raises(ValueError, match=r"has files of learning: give .*fits/logs"):
            learn._begin(dataclasses.replace(options, tensorboard=wrong), {})


def test_a_model_that_is_changed_while_it_is_learned_from_gives_no_fits(
    options, directory, monkeypatch
):
    def learn(*_, **__):
        path = directory / "config.json"
        path.write_text(path.read_text() + " ")

    monkeypatch.setattr("duquantpp_jax.commands.learn.learn", learn)
    options = dataclasses.replace(options, model=directory, measure=False)
    with pytest.raises(ValueError, match="model was changed while it was read"):
        learn_fits(options)
    assert not (options.out / "fits.json").exists()


def test_killed_at_its_first_or_its_last_step_it_leaves_nothing_that_stops_the_next(
    options, monkeypatch
):
    place, learned = options.out / learn.PROGRESS, []
    place.mkdir(parents=True)
    left = place / ".begun.json.another-1-1-01234567"
    left.touch()  # killed while it wrote what it was asked

    def no_steps(*_, **__):
        learned.append(1)
        raise Killed

    monkeypatch.setattr(learn, "learn", no_steps)
    with pytest.raises(Killed):
        learn_fits(options)
    asked = read_json(place / learn.BEGUN)
    about = asked | {"schema": fits.SCHEMA, "sha256": "", "held_out_kl": {}}
    (options.out / fits.ABOUT).write_text(json.dumps(about))  # killed before it tidied up
    assert learn_fits(options) == about
    assert [path.name for path in options.out.iterdir()] == [fits.ABOUT]
    assert learned == [1]


@pytest.mark.parametrize("through", ["model", "block"])
def test_it_says_first_where_a_kernel_runs(options, through, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(learn, "learn_fits", stop)
    monkeypatch.setattr(decoder, "fused_attention_runs", lambda _: True)
    with pytest.raises(KeyboardInterrupt):
        learn.run(dataclasses.replace(options, through=through))
    assert ("attention runs in cuDNN's kernels" in capsys.readouterr().err) == (through == "model")


def test_rows_that_fill_no_batch_are_refused_before_anything_is_written(options):
    with pytest.raises(ValueError, match="4 rows are less than a batch of 9: give more --rows"):
        learn_fits(dataclasses.replace(options, batch_rows=9))
    assert not options.out.exists()


@pytest.mark.slow
def test_it_prints_the_held_out_kl_of_the_start_and_the_end(options, capsys):
    words = [
        *("learn", "--model", options.model, "--text", *options.text, "--rows", "6"),
        *("--held-out", "2", "--start", "block_hadamard", "--steps", "2", "--batch-rows", "2"),
        *("--moves", "weights", "--check-every", "1"),
        *("--formats", "even", "--out", options.out),
    ]
    assert main([*map(str, words)]) == 0
    said = capsys.readouterr().out
    about = read_about(options.out)
    assert list(about["text"])[:2] == ["name", "sha256"]  # the same bytes in every process
    kl = about["held_out_kl"]
    assert 0 < kl["end"] != kl["start"] > 0
    assert f"{kl['start']:.5f} at the start, {kl['end']:.5f} at the end" in said
    assert about["formats"] == {"weight": "mxfp4:even", "activation": "mxfp4:even"}
    assert "weights mxfp4:even" in other_formats(about, "mxfp4:floor", "mxfp4:even")
    assert other_formats(about, "mxfp4:even", "mxfp4:even") is None
    with pytest.raises(ValueError, match=r"are of another model \(tiny\)"):
        load_fits(options.out, "0")
    storage.save(options.out / "fits.safetensors", {})
    with pytest.raises(ValueError, match=r"other fits than fits\.json names"):
        load_fits(options.out, sha256(options.model))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"text": ()}, "--model needs --text"),
        ({"text": tuple(map(Path, "abcd"))}, "--rows 6 are not the same number of each of 4 texts"),
        ({"text": (Path("a"),) * 2}, "--text names a text twice: a a"),
        ({"start": "wuhs"}, "did you mean wush"),
        ({"moves": ("afine",)}, "unknown move 'afine'"),
        ({"moves": ()}, "nothing moves"),
        ({"moves": ("affine", "rotation")}, "another transform"),
        ({"optimizer": "adm"}, "did you mean adam"),
        ({"held_out": 6.0}, "leaves rows on both sides"),
        ({"rows": 3, "held_out": 0.125}, r"--held-out 0\.125 of --rows 3 is 0: give more --rows"),
        ({"seed": 2**32}, "--seed 4294967296: give a whole number from 0 to 4294967295"),
        ({"imports": ("nowhere.at_all",)}, "--import nowhere.at_all: cannot import"),
        ({"steps": 0}, "steps = 0"),
        ({"rate": 0.0}, "positive"),
        ({"formats": "mxfp4:evn"}, "scale rule"),
        ({"weight_formats": "bf16"}, "stores no weights"),
        ({"start": "full_hadamard"}, "not made of matrices of side 32"),
        ({"rows": 10**6}, "whole rows"),
    ],
)
def test_bad_input_is_refused_in_a_line(options, changes, says):
    with pytest.raises(ValueError, match=says):
        learn_fits(dataclasses.replace(options, **changes))


def test_a_share_or_a_number_of_rows_is_held_out():
    tokens = np.arange(16).reshape(8, 2)
    for given in (0.25, 2.0):
        rows, held_out = split(tokens, given)
        np.testing.assert_array_equal(np.concatenate([rows, held_out]), tokens)
        assert len(held_out) == 2
    with pytest.raises(ValueError, match=r"held-out 2\.5"):
        split(tokens, 2.5)


def test_of_several_texts_rows_are_taken_by_turns(options, monkeypatch):
    given = {"a": np.full((3, 512), 1), "b": np.full((3, 512), 2)}
    monkeypatch.setattr(learn, "load_rows", lambda _, t, *__: Rows(given[t.name], t))
    rows = learn._tokens(dataclasses.replace(options, text=(Path("a"), Path("b"))))
    assert rows[:, 0].tolist() == [1, 2, 1, 2, 1, 2]


def test_every_preset_moves_what_it_says_and_they_add_up():
    for name, (field, value) in PRESETS.items():
        assert getattr(moves_named([name]), field) == value
    moves = moves_named(["rotation", "weights", "clip_site"])
    assert (moves.weights, moves.clip, moves.transform is None) == ("given", "site", False)


@pytest.mark.slow
def test_fits_that_are_given_write_what_the_recipe_writes_that_made_them(
    tiny_directory, tiny_text, tmp_path, capsys, monkeypatch
):
    given = {"model": tiny_directory, "calibration_text": tiny_text, "rows": 2, "rounding": "gptq"}
    by_recipe = QuantizeOptions(recipe="smooth_hadamard", out=tmp_path / "recipe", **given)
    quantize(by_recipe)
    checkpoint, (tokens, _) = Checkpoint(tiny_directory), calibration_tokens(by_recipe)
    model = load(tiny_directory)
    plan = Plan.of(checkpoint.config, recipe("smooth_hadamard"))
    fits = fit_decoder(plan, model, calibrate(model, tokens, plan.widths(0)))
    formats = {"weight": "mxfp4:floor", "activation": "mxfp4:floor"}
    about = {"model": {"name": "tiny", "sha256": sha256(tiny_directory)}, "formats": formats}
    save_fits(tmp_path / "fits", fits, about)

    by_fits = QuantizeOptions(fits=tmp_path / "fits", out=tmp_path / "given", **given)
    report = quantize(by_fits)
    assert report["job"]["recipe"] == "fits"
    for number in range(checkpoint.config.num_hidden_layers):
        layers = [load_file(o.out / layer_file(number)) for o in (by_recipe, by_fits)]
        assert layers[0].keys() == layers[1].keys()
        for name, array in layers[0].items():
            np.testing.assert_array_equal(array, layers[1][name])
    assert load_any(by_fits.out)[0].config == checkpoint.config

    # In a comparison they are a row of their directory's name, with the numbers of that recipe.
    monkeypatch.setattr("duquantpp_jax.commands.compare.CALIBRATION_ROWS", 2)
    words = ["compare", "--model", tiny_directory, "--text", tiny_text, "--tokens", "511"]
    words += ["--calibration-text", tiny_text, "--recipes", "smooth_hadamard", "--fits"]
    words += [tmp_path / "fits"]
    more = ["--formats", "even", "--out", tmp_path / "compared", "--report", tmp_path / "page.html"]
    assert main([*map(str, words + more)]) == 0
    said = capsys.readouterr()
    assert "Without a baseline" in said.out
    assert said.err.count("warning: the fits were learned for weights mxfp4:floor") == 1
    page = Read((tmp_path / "page.html").read_text())
    assert page.texts["th"][:3] == ["row", "column", "KL"]
    assert len(page.sources) == 1
    results = read_json(tmp_path / "compared" / "results.json")
    assert results["rows"] == ["smooth_hadamard", "fits"]
    assert (results["baseline"], results["options"]["fits"]) == (None, ["fits"])
    of_recipe, of_fits = results["entries"][:2]
    assert (of_recipe["column"], of_recipe["difference"]) == ("even", None)
    assert of_recipe["kl"] == of_fits["kl"]
    assert main([*map(str, words + words[-1:])]) == 2
    assert "rename the directory" in capsys.readouterr().err

    arguments = ["quantize", "--model", str(tiny_directory), "--fits", str(tmp_path / "fits")]
    arguments += ["--calibration-text", str(tiny_text), "--rows", "2", "--out"]
    assert main([*arguments, str(tmp_path / "both"), "--recipe", "rtn"]) == 2
    assert "give one of them" in capsys.readouterr().err

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # it is said before the work begins
        patch.setattr("duquantpp_jax.commands.quantize.quantize", stop)
        assert main([*arguments, str(tmp_path / "even"), "--scale-rule", "even"]) == 130
    assert "warning: the fits were learned for weights mxfp4:floor" in capsys.readouterr().err
    embedded = ["quantize", "--fits", str(tmp_path / "fits"), "--out", str(tmp_path / "other")]
    assert main(embedded) == 2
    assert "another model" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
