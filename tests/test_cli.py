"""The command line as a user types it: the contract of results.json, and bad input in one line."""

import contextlib
import importlib.metadata
import io
import json
import shutil
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from duquantpp_jax import __version__, cli
from duquantpp_jax.checkpoints import save
from duquantpp_jax.commands.compare import CompareOptions, cells
from experiments import bench_start
from tests.conftest import TEXT, byte_tokenizer, tiny_decoder
from tests.documented import undocumented

ENTRY = [
    *("row", "column", "seeds", "draws", "kl", "excess_nll", "nll", "perplexity", "agreement"),
    *("sqnr_db", "online", "interval", "environments", "difference"),
]


def _arguments(directory, text, out, *more):
    return [
        "compare",
        *("--model", str(directory), "--text", str(text), "--calibration-text", str(text)),
        *("--tokens", "2044", "--out", str(out)),
        *more,
    ]


@pytest.fixture(scope="module", autouse=True)
def _few_rows():
    """Shapes of lab/test_running.py, whose programs are found."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("duquantpp_jax.commands.compare.CALIBRATION_ROWS", 8)
        patch.setattr("duquantpp_jax.commands.compare.BATCH_ROWS", 4)
        yield


@pytest.fixture(scope="module")
def compared(tiny_directory, tiny_text, tmp_path_factory):
    """The output directory of one run, and what it printed."""
    out = tmp_path_factory.mktemp("compared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("duquantpp_jax.evaluation.intervals.LEAST_DOCUMENTS", 4)
        recipes = ("--recipes", "rtn", "block_hadamard", "random_hadamard")
        recipes += ("--scale-rules", "floor", "even", "--seeds", "2")
        assert cli.main(_arguments(tiny_directory, tiny_text, out / "a", *recipes)) == 0
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            again = _arguments(tiny_directory, tiny_text, out / "b", *recipes, "--json")
            assert cli.main(again) == 0
        (out / "printed").write_text(printed.getvalue())
    return out


def test_the_same_seed_gives_the_same_bytes(compared):
    for name in ("results.json", "compare.png"):
        assert (compared / "a" / name).read_bytes() == (compared / "b" / name).read_bytes()


def test_json_on_stdout_is_what_is_written(compared):
    assert (compared / "printed").read_text() == (compared / "a" / "results.json").read_text()


def test_results_keep_their_contract(compared):
    results = json.loads((compared / "a" / "results.json").read_text())
    assert list(results) == [
        *("schema", "model", "text", "targets", "float_perplexity", "clusters", "rows", "columns"),
        *("baseline", "corrected_over", "entries", "failed", "environments", "options"),
    ]
    timings = json.loads((compared / "a" / "timings.json").read_text())
    assert undocumented([results, timings]) == set()
    assert results["schema"] == 2
    assert results["targets"] == 2044
    assert results["clusters"] == {"unit": "document", "count": 4}
    assert results["model"]["name"] == "tiny"
    assert results["text"]["name"] == "text.txt"
    assert {len(results[name]["sha256"]) for name in ("model", "text")} == {64}
    assert "out" not in results["options"]
    assert results["environments"][0]["cores"] >= 1
    names, rules = ("rtn", "block_hadamard", "random_hadamard"), ("floor", "even")
    cells = [(entry["row"], entry["column"]) for entry in results["entries"]]
    assert cells == [(name, rule) for rule in rules for name in names]
    entries = dict(zip(cells, results["entries"], strict=True))
    for (row, column), entry in entries.items():
        assert sorted(entry) == sorted(ENTRY)
        assert entry["seeds"] == ([0, 1] if row == "random_hadamard" else [0])
        excess = np.log(entry["perplexity"]["range"][0] / results["float_perplexity"])
        assert entry["excess_nll"]["range"][0] == pytest.approx(excess, abs=1e-9)
        if row == "block_hadamard":
            assert entry["difference"] is None
            continue
        sources = "text and seeds" if row == "random_hadamard" else "text"
        assert entry["difference"]["interval"] == sources
        for measure in ("kl", "excess_nll"):
            found, base = entry["difference"][measure], entries["block_hadamard", column][measure]
            low, high = found["ci95"]
            assert low <= found["value"] <= high
            difference = entry[measure]["value"] - base["value"]
            assert difference == pytest.approx(found["value"], abs=1e-7)  # digits of float32


@pytest.mark.slow
def test_a_single_row_has_no_interval(tiny_directory, tiny_text, tmp_path, capsys):
    more = ("--recipes", "rtn", "block_hadamard", "--scale-rules", "floor", "--tokens", "511")
    assert cli.main(_arguments(tiny_directory, tiny_text, tmp_path / "out", *more)) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    rtn, base = results["entries"]
    found = rtn["difference"]["kl"]
    assert found["value"] == pytest.approx(rtn["kl"]["value"] - base["kl"]["value"])
    assert (found["ci95"], found["p"], found["significant"]) == (None, None, None)
    assert "one row gives no interval" in capsys.readouterr().out


def test_refined_is_a_second_row_of_every_method_with_every_seed():
    grid = cells(CompareOptions(recipes=("rtn",), formats=("even",), refine=5, seeds=(0, 1)))
    refined = "rtn, refined 5 steps"
    assert [(cell.row, cell.seed) for cell in grid] == [("rtn", 0), (refined, 0), (refined, 1)]


def _columns(**options):
    return list(dict.fromkeys(cell.format_label for cell in cells(CompareOptions(**options))))


def test_formats_of_both_sides_are_columns_one_of_each_pair():
    assert _columns() == ["even", "rceil"]
    assert _columns(scale_rules=("mse",), formats=("nvfp4", "mxfp6:even")) == [
        *("mse", "nvfp4", "mxfp6:even")
    ]
    assert _columns(weight_formats=("floor", "even"), activation_formats=("even",)) == [
        *("floor weights, even activations", "even")
    ]
    assert len(_columns(weight_formats=("mse",))) == 2


@pytest.mark.parametrize(
    ("chosen", "drawn"), [({}, [0]), ({"seed": 5}, [5]), ({"seeds": (3,)}, [0, 1, 2])]
)
def test_recipes_that_draw_run_with_every_seed_and_the_others_once(chosen, drawn):
    recipes = ("rtn", "random_hadamard")
    grid = cells(CompareOptions(recipes=recipes, scale_rules=("floor",), **chosen))
    seeds = {name: [cell.seed for cell in grid if cell.recipe == name] for name in recipes}
    assert seeds == {"rtn": drawn[:1], "random_hadamard": drawn}


def _damaged(directory, tmp_path, damage):
    copy = tmp_path / "model"
    shutil.copytree(directory, copy)
    damage(copy)
    return copy


def _config(**changes):
    def damage(copy):
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(config | changes))

    return damage


def _tensor(change):
    def damage(copy):
        tensors = load_file(copy / "model.safetensors")
        name = "model.layers.1.mlp.up_proj.weight"
        tensors[name] = change(tensors[name])
        save_file(tensors, copy / "model.safetensors")

    return damage


def _nan(tensor):
    tensor[0, 0] = ml_dtypes.bfloat16("nan")
    return tensor


def _index(file):
    def damage(copy):
        names = load_file(copy / "model.safetensors")
        (copy / "model.safetensors").unlink()
        index = {"weight_map": dict.fromkeys(names, file)}
        (copy / "model.safetensors.index.json").write_text(json.dumps(index))

    return damage


def _truncate(copy):
    whole = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(whole[: len(whole) // 2])


DAMAGES = {
    "no config.json": (lambda copy: (copy / "config.json").unlink(), "no config.json"),
    "another architecture": (_config(architectures=["GPT2LMHeadModel"]), "GPT2LMHeadModel"),
    "missing shard": (_index("model-00001-of-00001.safetensors"), "is missing"),
    "truncated shard": (_truncate, "truncated"),
    "index that leaves the directory": (_index("../elsewhere.safetensors"), "outside"),
    "tensor of another shape": (_tensor(lambda t: t[:-1].copy()), "model.layers.1.mlp.up_proj"),
    "NaN in weights": (_tensor(_nan), "model.layers.1.mlp.up_proj"),
    "no bos token": (_config(bos_token_id=None), "bos_token_id"),
    "too few positions": (_config(max_position_embeddings=510), "has 510 positions, and rows"),
}


def _assert_one_line(code, capsys, says, out):
    printed = capsys.readouterr()
    assert code == 2
    assert printed.out == ""
    assert printed.err.startswith("duquantpp: ")
    assert printed.err.count("\n") == 1
    assert says in printed.err
    assert not out.exists()


@pytest.mark.parametrize("name", sorted(DAMAGES))
def test_a_bad_model_is_one_line(name, tiny_directory, tiny_text, tmp_path, capsys):
    damage, says = DAMAGES[name]
    copy, out = _damaged(tiny_directory, tmp_path, damage), tmp_path / "out"
    _assert_one_line(cli.main(_arguments(copy, tiny_text, out)), capsys, says, out)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--recipes", "duqantpp"), "unknown recipe 'duqantpp': did you mean duquantpp?"),
        (("--scale-rules", "flor"), "unknown format 'flor': did you mean floor?"),
        (("--rounding", "gtpq"), "unknown rounding 'gtpq'"),
        (("--tokens", "999999"), "whole rows"),
        (("--tokens", "100"), "at least 511"),
        (("--tokens", "many"), "--tokens"),
        (("--nonsense",), "compare has no option --nonsense: see duquantpp compare --help"),
        (("--recipez", "rtn"), "compare has no option --recipez: did you mean --recipes?"),
        (("--recipe", "rtn"), "compare has no option --recipe: did you mean --recipes?"),
        (("--prompt", "x"), "compare has no option --prompt: that is an option of generate"),
        (("--recipes",), "--recipes is empty"),
        (("--seeds", "0"), "--seeds 0: give each once (0 1 2), or how many (--seeds 3)"),
        (("--seeds", "0", "-1"), "--seed -1: give a whole number from 0 to 4294967295"),
        (("--seed", str(10**30)), f"--seed {10**30}: give a whole number from 0 to 4294967295"),
        (("--formats", "float"), "float quantizes nothing"),
    ],
)
def test_a_bad_option_is_one_line(more, says, tiny_directory, tiny_text, tmp_path, capsys):
    out = tmp_path / "out"
    code = cli.main(_arguments(tiny_directory, tiny_text, out, *more))
    _assert_one_line(code, capsys, says, out)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "compare"),
        (["compair"], "unknown command 'compair': did you mean compare?"),
        (["Quantise", "--help"], "unknown command 'Quantise': did you mean quantize?"),
        (["xyzzy"], "unknown command 'xyzzy': choose one of compare, ablate,"),
        (["kernels", "--target", "b2000"], "b2000"),
        (["compare", "--model", "somewhere"], "--model needs --text and --calibration-text"),
    ],
)
def test_a_bad_command_is_one_line(arguments, says, tmp_path, capsys):
    _assert_one_line(cli.main(arguments), capsys, says, tmp_path / "out")


def test_text_that_is_not_utf8_is_one_line(tiny_directory, tmp_path, capsys):
    text, out = tmp_path / "text", tmp_path / "out"
    text.write_bytes(b"\xff" * 9999)
    code = cli.main(_arguments(tiny_directory, text, out))
    _assert_one_line(code, capsys, "not UTF-8", out)


def test_an_out_that_cannot_be_written_is_one_line(tiny_directory, tiny_text, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "out"
    code = cli.main(_arguments(tiny_directory, tiny_text, out))
    _assert_one_line(code, capsys, "give another --out", out)


@pytest.mark.slow
def test_a_width_off_the_block_is_refused_by_name_and_padded_on_demand(tiny_text, tmp_path, capsys):
    save(tiny_decoder(intermediate_size=88), byte_tokenizer().to_str(), tmp_path / "odd")
    out = tmp_path / "out"
    more = ("--recipes", "block_hadamard", "--scale-rules", "floor", "--tokens", "511")
    arguments = _arguments(tmp_path / "odd", tiny_text, out, *more)
    says = "model.layers.0.mlp.down_proj has input width 88"
    _assert_one_line(cli.main(arguments), capsys, says, out)
    assert cli.main([*arguments, "--pad"]) == 0
    assert "--pad" in capsys.readouterr().out


def test_help_is_no_error(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["compare", "--help"])
    assert not stop.value.code
    assert "--scale-rules" in capsys.readouterr().out


ANSWERS = """
import sys
from duquantpp_jax import cli
for words in (
    ["--help"], ["compare", "--help"], ["--version"], ["quantize", "--rows", "x"], ["compair"]
):
    try:
        code = cli.main(words)
    except SystemExit as stop:
        code = stop.code
    print(words, code, "jax" in sys.modules, "numpy" in sys.modules)
"""


def test_help_and_what_the_parser_refuses_do_not_wait_for_jax():
    done = subprocess.run([sys.executable, "-c", ANSWERS], capture_output=True, text=True)
    assert bench_start.seconds(["--help"], 1)["user_seconds"] > 0
    said = [line for line in done.stdout.splitlines() if line.startswith("['")]
    assert [line.split("] ")[1] for line in said] == ["0 False False"] * 3 + ["2 False False"] * 2


def test_the_package_runs_as_a_module_and_says_versions():
    command = [sys.executable, "-m", "duquantpp_jax", "--version"]
    done = subprocess.run(command, capture_output=True, text=True)
    ours, *others = done.stdout.strip().split(", ")
    assert (done.returncode, done.stderr, ours) == (0, "", f"duquantpp_jax {__version__}")
    assert f"jax {importlib.metadata.version('jax')}" in others


def test_an_error_shows_control_characters_and_does_not_send_them(capsys):
    assert cli.main(["evaluate", "--model", "a\x1b]0;b\x07", "--text", str(TEXT)]) == 2
    said = capsys.readouterr().err
    assert "\\x1b]0;b\\x07" in said
    assert "\x1b" not in said
