"""Experiments of the main job run at toy size, and their tables hold what their results say."""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duquantpp_jax.checkpoints import load, testbed
from duquantpp_jax.evaluation.rows import Rows
from duquantpp_jax.lab.cells import SCHEMA
from duquantpp_jax.lab.table import markdown
from experiments import (
    architecture,
    bench_devices,
    bench_gpu,
    bench_kernels,
    bench_learning,
    cloze,
    compute,
    cut_texts,
    health,
    position_zero,
    rotations,
    synthetic_checkpoint,
    tables,
)

RESULTS = Path(rotations.__file__).parent / "results"


@pytest.mark.slow
def test_position_zero_prints_both_numbers_of_every_case(shallow, monkeypatch, capsys):
    few = testbed.calibration_rows()[:1]
    monkeypatch.setattr(testbed, "calibration_rows", lambda: few)
    monkeypatch.setattr(sys, "argv", ["position_zero", "--tokens", "511"])
    monkeypatch.setattr(position_zero, "CASES", (("block_hadamard", 0),))
    position_zero.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all(" -> " in line for line in lines)


def test_a_synthetic_checkpoint_is_one_that_can_be_read(tmp_path):
    small = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    small |= {"num_key_value_heads": 2, "vocab_size": 300, "bos_token_id": 1}
    shapes = synthetic_checkpoint.SHAPES | small
    synthetic_checkpoint.write(tmp_path / "a", layers=2, seed=0, shapes=shapes)
    model = load(tmp_path / "a")
    assert model.config.num_hidden_layers == 2
    w = np.asarray(model.weights("mlp_in")[0], np.float32)
    assert np.std(w) == pytest.approx(0.02, rel=0.05)
    assert np.any(w[0] != w[1])
    assert np.all(np.asarray(model.norm[...]) == 1)


@pytest.mark.slow
def test_the_bench_of_a_gpu_checks_first_and_gives_ratios_of_one_run(tmp_path, monkeypatch, capsys):
    out, parts = tmp_path / "out.json", ["limits", "linear"]
    monkeypatch.setattr(sys, "argv", ["bench", "--tiny", "--parts", *parts, "--out", str(out)])
    bench_gpu.main()
    rows = json.loads(out.read_text())["rows"]
    assert [row["part"] for row in rows] == ["limits"] * 2 + ["linear"] * 3
    rival, *others = rows[2:]
    assert all(row["ratio"] == row["seconds"] / rival["seconds"] for row in others)
    assert len(capsys.readouterr().out.splitlines()) == 6
    wrong = lambda self, site, x, weights, state: ((x @ x.T,), None)  # noqa: E731
    monkeypatch.setattr(bench_kernels.QuantizedLinear, "__call__", wrong)
    with pytest.raises(ValueError, match="further off"):
        list(bench_gpu.linear(dataclasses.replace(bench_gpu.TINY, linear=(48, 64, 48))))


@pytest.mark.slow
def test_massive_outliers_break_no_fit(shallow, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out.json"
    names = ["rtn", "block_hadamard", "smooth_hadamard", "wush_conditioned"]
    options = ["--rows", "2", "--recipes", *names, "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["health", *options])
    health.main()
    found = json.loads(out.read_text())["recipes"]
    assert list(found) == names
    decibel = {
        name: [rows[case]["sqnr_db"] for case in health.CASES] for name, rows in found.items()
    }
    assert decibel["block_hadamard"][1] < decibel["rtn"][1] < decibel["smooth_hadamard"][1]
    assert decibel["smooth_hadamard"][2] < decibel["block_hadamard"][2] - 3
    for rows in found["wush_conditioned"].values():
        assert rows["condition"] <= 10 * (1 + 1e-4)
    assert health.table({"recipes": found}) in capsys.readouterr().out


def test_an_item_of_a_cloze_goes_on_as_its_row_does_and_the_others_do_not():
    tokens = np.arange(5 * 200).reshape(5, 200) % 997
    tokens[:, 0] = 0  # BOS; row 4 is alone in its document
    items = cloze.items_of(Rows(tokens, np.array([0, 1, 0, 1, 2])), 40, seed=3)
    assert items.tokens.shape == (40, cloze.CHOICES, 1 + cloze.CONTEXT + cloze.CONTINUATION)
    assert set(items.documents) == {0, 1}
    for choices, document in zip(items.tokens, items.documents, strict=True):
        own, *others = choices
        assert own[0] == 0
        assert np.all(np.diff(own[1:]) % 997 == 1)
        assert np.all(choices[:, : -cloze.CONTINUATION] == own[: -cloze.CONTINUATION])
        row = np.flatnonzero(np.any(tokens == own[-1], axis=1))
        for other in others:
            there = np.flatnonzero(np.any(tokens == other[-1], axis=1))
            assert there % 2 == document
            assert there != row
    with pytest.raises(ValueError, match="no document has two rows"):
        cloze.items_of(Rows(tokens, np.arange(5)), 4)


@pytest.mark.slow
def test_a_cloze_scores_by_the_continuation(tiny_directory, tiny_text, tmp_path, monkeypatch):
    out = tmp_path / "out.json"
    options = ["--model", str(tiny_directory), "--text", str(tiny_text), "--items", "40"]
    options += ["--calibration-text", str(tiny_text), "--rows", "1", "--recipes", "rtn"]
    monkeypatch.setattr(sys, "argv", ["cloze", *options, "--roundings", "rtn", "--out", str(out)])
    cloze.main()
    found = json.loads(out.read_text())["entries"]
    assert [e["method"] for e in found] == ["float", "rtn"]
    assert found[0]["recovery"] == 1
    model = load(tiny_directory)
    items = cloze.items_of(cloze._rows(tiny_directory, model, tiny_text), 40)
    logits, _ = model(jnp.asarray(items.tokens[7, :, :-1]))
    log_q = np.asarray(logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True))[:, -8:]
    by_hand = [sum(log_q[c, i, t] for i, t in enumerate(items.tokens[7, c, -8:])) for c in range(4)]
    scores = cloze.scores(cloze.Predictor(model), jnp.asarray(items.tokens[7:8]))
    np.testing.assert_allclose(scores[0], by_hand, rtol=1e-4)


@pytest.mark.slow
def test_what_bfloat16_moves_stands_beside_what_last_bits_move(shallow, tmp_path, monkeypatch):
    out = tmp_path / "out.json"
    options = ["--tokens", "1022", "--rows", "1", "--recipes", "rtn", "--rules", "even"]
    monkeypatch.setattr(sys, "argv", ["compute", *options, "--out", str(out)])
    compute.main()
    entries = {(e["recipe"], e["way"]): e for e in json.loads(out.read_text())["entries"]}
    assert len(entries) == 2 + 7
    assert entries["float", "float32"]["kl"] == pytest.approx(0, abs=1e-6)
    assert 1e-6 < entries["float", "bf16, model alone"]["kl"] < 1e-2
    base = entries.pop(("rtn", "float32"))
    assert base["kl"] > 0.05
    for (name, way), entry in entries.items():
        if name == "rtn":
            moved = entry["difference"]["kl"]["value"]
            assert moved == pytest.approx(entry["kl"] - base["kl"])
            assert (moved == 0) == (way == "calibrated on the next rows")  # it reads none


def test_what_is_not_finite_is_an_error():
    x, w = jnp.ones((2, 4, 32)).at[0, 1, 3].set(jnp.nan), jnp.ones((8, 32))
    with pytest.raises(ValueError, match="block_hadamard under floor is not finite"):
        health.measure("block_hadamard", "floor", x.at[1, 1, 3].set(jnp.nan), w)


def test_the_table_of_massive_outliers_is_that_of_its_results():
    results = json.loads((RESULTS / "health_testbed.json").read_text(encoding="utf-8"))
    readme = (RESULTS / "gutenberg27m.md").read_text(encoding="utf-8")
    assert health.table(results) in readme


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*_*rows.json")), ids=lambda p: p.stem)
def test_committed_summaries_are_of_the_schema_that_is_written_now(path):
    content = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(content, list) or ("tables" not in content and "entries" not in content):
        return  # of an experiment with a table of its own
    assert content["schema"] == SCHEMA
    for pivot in tables.read(path):
        assert tables.long(pivot).startswith(f"{pivot['model']['name']}, ")
        for entry in pivot["entries"]:
            assert entry["interval"] in ("text", "text and seeds")


ROTATIONS = [
    RESULTS / f"grid_rotations_{name}.json" for name in ("testbed", "gutenberg27m_128rows")
]


def test_the_short_form_of_rotations_is_that_of_the_results():
    pivots = [pivot for path in ROTATIONS for pivot in tables.read(path)]
    assert tables.beside(pivots) in (RESULTS / "rotations.md").read_text(encoding="utf-8")


HEADLINES = [RESULTS / f"grid_headline_{name}_128rows.json" for name in ("smollm2", "gemma3_270m")]


@pytest.mark.parametrize(
    ("path", "measure"),
    [(HEADLINES[0], "kl"), (HEADLINES[0], "excess_nll"), (HEADLINES[1], "kl")],
    ids=["smollm2, kl", "smollm2, excess_nll", "gemma3, kl"],
)
def test_the_readmes_tables_are_those_of_the_results(path, measure):
    (pivot,) = tables.read(path)
    rows = ("rtn", "block_hadamard", "smooth_hadamard", "duquantpp", "wush")
    columns = ("rtn, floor", "rtn, even", "gptq, even")
    readme = (RESULTS.parent.parent / "README.md").read_text(encoding="utf-8")
    assert markdown(tables.chosen(pivot, rows, columns), measure) in readme


@pytest.mark.parametrize(
    ("name", "paths"), [("rotations.md", ROTATIONS), ("headline.md", HEADLINES)]
)
def test_long_tables_are_those_of_the_results(name, paths, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tables", *map(str, paths)])
    tables.main()
    assert (RESULTS / name).read_text(encoding="utf-8").endswith(capsys.readouterr().out)


def test_the_short_form_of_a_grid_leaves_out_what_was_not_run():
    entry = {"row": "r", "column": "even", "kl": {"value": 0.1}, "difference": None}
    pivot = {"rows": ["r"], "columns": ["even"], "entries": [entry | {"fit_seconds": 2.0}]}
    pivot |= {"model": {"name": "m"}, "text": {"name": "t.txt"}}
    said = tables.beside([pivot, pivot | {"columns": ["floor", "fp32"], "entries": []}])
    assert said.splitlines()[0] == "| | m on t, even | m on t, floor | fit, s |"
    assert said.splitlines()[2] == "| r | 0.1000 |  | 2.0 |"


@pytest.mark.parametrize("path", sorted(RESULTS.glob("rounding_*.json")), ids=lambda p: p.stem)
def test_the_tables_of_roundings_are_those_of_the_results(path):
    readme = (RESULTS / "gutenberg27m.md").read_text(encoding="utf-8")
    (pivot,) = tables.read(path)
    assert markdown(pivot) in readme


def test_gptq_lowers_kl_in_every_recipe_as_the_table_says():
    path = RESULTS / "grid_rounding_gutenberg27m_128rows.json"
    (pivot,) = json.loads(path.read_text(encoding="utf-8"))["tables"]
    assert tables.gains(pivot) in (RESULTS / "gutenberg27m.md").read_text(encoding="utf-8")
    differences = [
        entry["difference"]["kl"] for entry in pivot["entries"] if entry["row"] == "gptq"
    ]
    gained = [difference["ci95"][1] for difference in differences]
    assert len(gained) == 10
    assert max(gained) < 0


@pytest.mark.parametrize(
    "path",
    sorted([*RESULTS.glob("rotations_*.json"), *RESULTS.glob("gptq_*.json")]),
    ids=lambda p: p.stem,
)
def test_the_tables_of_experiments_are_those_of_the_results(path):
    readme = (RESULTS / "gutenberg27m.md").read_text(encoding="utf-8")
    (pivot,) = tables.read(path)
    assert markdown(pivot) in readme


def test_the_table_of_beat_hadamard_has_the_numbers_of_its_results():
    results = (RESULTS / "beat_hadamard_gutenberg27m_512rows.json").read_text(encoding="utf-8")
    readme = (RESULTS / "gutenberg27m.md").read_text(encoding="utf-8")
    for entry in json.loads(results):
        (row,) = (r for r in readme.splitlines() if r.startswith(f"| {entry['attempt']} |"))
        home, away = entry["texts"]["text"], entry["texts"]["transfer"]
        assert f" {home['kl']:.4f}" in row
        assert f" {away['kl']:.4f} " in row
        for mean, low, high in home["differences"].values():
            assert f" {mean:+.4f} ± {(high - low) / 2:.4f} " in row


@pytest.mark.slow
def test_a_newcomer_passes_at_most_seven_files_on_each_walk(shallow):
    walks = architecture.walks()
    assert max(len(steps) - 1 for steps in walks.values()) <= 7
    page = (RESULTS.parents[1] / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert page.endswith(architecture.page(walks) + "\n")


def test_texts_are_cut_at_whole_documents_and_a_file_that_is_missing_is_said(tmp_path, capsys):
    books = [f"book {n} " * 3 for n in range(20)]
    (tmp_path / "gutenberg_valid.txt").write_text("<|endoftext|>".join(books))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["", "--data", str(tmp_path), "--out", str(tmp_path / "out")])
        cut_texts.main()
    parts = [
        (tmp_path / "out" / f"{n}.txt").read_text().split("<|endoftext|>") for n in ("dev", "books")
    ]
    assert parts == [books[:8], books[-8:]]
    assert "train.txt: left out" in capsys.readouterr().err
    assert cut_texts.cut("abc<|endoftext|>defg", slice(None), 2) == "ab<|endoftext|>de"


@pytest.mark.slow
def test_the_bench_of_learning_times_steps_through_a_block_and_a_model(monkeypatch):
    monkeypatch.setattr(bench_learning, "STEPS", 1)
    monkeypatch.setattr(bench_learning, "CHECKS", 1)
    for name in ("block_8b", "model_1b_in_4"):
        part = bench_learning.tiny(bench_learning.PARTS[name])
        found = bench_learning.measured(part, 4, 16)
        assert found["seconds"] > 0
        assert found["tokens"] == 60
        assert found["kept GiB"] > 0
        assert not found["layers run again"]


@pytest.mark.slow
def test_the_bench_of_devices_refuses_those_that_do_not_agree(monkeypatch):
    (found,) = bench_devices.evaluation(True, [1])
    assert found[0] == 1
    assert found[1] > 0
    nlls = iter([np.ones(3), np.ones(3) * (1 + 2 * bench_devices.TOLERANCE)])
    monkeypatch.setattr(bench_devices.Reference, "nll", lambda self: next(nlls))
    monkeypatch.setattr(bench_devices, "least", lambda call, times: (0, 1))
    with pytest.raises(ValueError, match="on 1 devices NLL is 2e-05 of itself away"):
        list(bench_devices.evaluation(True, [1, 1]))
