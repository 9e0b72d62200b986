"""`duquantpp inspect` as a user types it, on float and on quantized directories."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from duquantpp_jax import cli
from duquantpp_jax.analysis.look import InspectOptions, inspect
from duquantpp_jax.analysis.outliers import Thresholds
from duquantpp_jax.checkpoints import Quantized, load_any, save, testbed
from duquantpp_jax.evaluation.rows import read_text, rows_of_text
from duquantpp_jax.models import SITES
from tests.analysis.test_outliers import plainly
from tests.commands.conftest import contents
from tests.conftest import byte_tokenizer, tiny_decoder
from tests.lab.test_webpage import Read

TOKENS = 3 * 511
"""Not a whole number of batches."""


def run(directory, text, out, *more):
    arguments = ["inspect", "--model", directory, "--text", text, "--tokens", TOKENS, "--out", out]
    return cli.main([str(word) for word in (*arguments, *more)])


@pytest.fixture(scope="module")
def quantized(tiny_directory, tiny_text, tmp_path_factory):
    out = tmp_path_factory.mktemp("quantized") / "model"
    more = ("--recipe", "smooth_hadamard", "--rows", "2", "--calibration-text", str(tiny_text))
    assert cli.main(["quantize", "--model", str(tiny_directory), *more, "--out", str(out)]) == 0
    return out


def inputs_of(directory, text):
    """What every linear of a model is given, [layers, rows, length, k]."""
    model, linear, states = load_any(directory)
    rows = rows_of_text(read_text(text), byte_tokenizer(), model.config.bos_token_id)

    def keep(site, x, weights, state):
        return linear(site, x, weights, state)[0], x

    tokens = jnp.asarray(rows.tokens[:3, :-1])
    return jax.jit(lambda m, t, s: m(t, keep, s)[1])(model, tokens, states)


@pytest.mark.slow
def test_the_numbers_are_those_of_plain_numpy_and_the_bytes_those_of_another_run(
    tiny_directory, tiny_text, tmp_path, capsys
):
    out, again = tmp_path / "a", tmp_path / "b"
    page = tmp_path / "page.html"
    for place, more in ((out, ("--report", page)), (again, ())):
        assert run(tiny_directory, tiny_text, place, "--ratio", "2.5", "--share", ".1", *more) == 0
    assert contents(out) == contents(again)
    results = json.loads((out / "outliers.json").read_text())
    assert results["tokens"] == TOKENS
    assert results["quantized"] is None
    inputs = inputs_of(tiny_directory, tiny_text)
    assert [(site["layer"], site["site"]) for site in results["sites"]] == [
        (layer, site) for layer in range(2) for site in SITES
    ]
    for site in results["sites"]:
        x = np.asarray(inputs[site["site"]][site["layer"]])
        expected = plainly(x, Thresholds(ratio=2.5, share=0.1))
        for name, value in expected.items():
            assert site["input"][name] == pytest.approx(value, rel=1e-4), (site, name)
    pictures = ("surface.png", "channels.png", "blocks.png")
    assert {path.name for path in out.iterdir()} == {"outliers.json", *pictures}
    for name in pictures:
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    shown = Read(page.read_text())
    assert len(shown.sources) == len(pictures)
    assert len(shown.texts["td"]) == 8 * len(results["sites"])
    said = " ".join(capsys.readouterr().out.split())
    assert "1,533 tokens of text.txt" in said
    assert " 2.5x " in said
    assert " top 10% " in said


@pytest.mark.slow
def test_a_quantized_directory_shows_what_it_holds(quantized, tiny_text, tmp_path, capsys):
    assert run(quantized, tiny_text, tmp_path, "--site", "*.down_proj") == 0
    results = json.loads((tmp_path / "outliers.json").read_text())
    assert [site["site"] for site in results["sites"]] == ["mlp_out", "mlp_out"]
    told = results["quantized"]
    assert (told["recipe"], told["rounding"]) == ("smooth_hadamard", "rtn")
    report = json.loads((quantized / "report.json").read_text())
    assert told["bytes"] == sum(linear["bytes"] for linear in report["linears"])
    inputs = inputs_of(quantized, tiny_text)["mlp_out"]
    for layer, site in enumerate(results["sites"]):
        transform = Quantized(quantized).layer(layer)[1]["mlp_out"].transform
        for seen, x in (("input", inputs[layer]), ("moved", transform.activations(inputs[layer]))):
            for name, value in plainly(x, Thresholds()).items():
                # Computed twice, an input may cross a power of two: of 4,599 blocks here and there.
                assert site[seen][name] == pytest.approx(value, rel=1e-3), (site, name)
    names = {path.stem for path in tmp_path.iterdir()}
    assert names == {
        *("outliers", "surface", "channels", "blocks", "channels_moved", "blocks_moved"),
        *("scales", "codes", "sqnr"),
    }
    said = capsys.readouterr().out
    assert "Quantized: smooth_hadamard, rtn; weights mxfp4:floor, activations mxfp4:floor" in said


@pytest.mark.slow
def test_codes_scales_and_sqnr_are_those_of_the_files(quantized, tiny_text):
    found = inspect(InspectOptions(quantized, tiny_text, TOKENS))
    scales, codes = np.zeros(256, int), np.zeros(16, int)
    for path in sorted(quantized.glob("layer-*.safetensors")):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if name.endswith("scales"):
                scales += np.bincount(tensor.view(np.uint8).ravel(), minlength=256)
            elif name.endswith("codes"):
                codes += np.bincount(np.r_[tensor.ravel() & 15, tensor.ravel() >> 4], minlength=16)
    assert found.stored is not None
    np.testing.assert_array_equal(np.bincount(found.stored[0], minlength=256), scales)
    np.testing.assert_array_equal(np.bincount(found.stored[1], minlength=16), codes)
    told = found.results["quantized"]
    assert told["codes"] == codes.tolist()
    assert told["scale_exponents"] == {str(b - 127): n for b, n in enumerate(scales) if n}
    report = json.loads((quantized / "report.json").read_text())["linears"]
    assert found.sqnr is not None
    assert {x for values in found.sqnr.values() for x in values.ravel()} == {
        linear["sqnr_db"] for linear in report
    }


@pytest.mark.slow
def test_layers_left_in_float_beside_padded_ones_have_nothing_moved(tiny_text, tmp_path):
    model, out, width = tmp_path / "model", tmp_path / "q", 72
    save(tiny_decoder(intermediate_size=width), byte_tokenizer().to_str(), model)
    more = ("--pad", "--recipe", "rtn", "--rows", "2", "--exclude", "*.0.mlp.down_proj")
    more = (*more, "--calibration-text", str(tiny_text), "--out", str(out))
    assert cli.main(["quantize", "--model", str(model), *more]) == 0
    assert run(out, tiny_text, tmp_path / "i", "--site", "mlp_out") == 0
    first, second = json.loads((tmp_path / "i" / "outliers.json").read_text())["sites"]
    assert "moved" not in first
    # The identity appends 24 zeros to 72 channels: means are over so many more.
    assert second["moved"]["kurtosis"] == pytest.approx(second["input"]["kurtosis"] * 96 / width)
    assert second["moved"]["set_by_one"] == second["input"]["set_by_one"]


def test_a_site_is_named_by_its_linears_or_by_itself(tiny_directory, tiny_text):
    def chosen(*names):
        found = inspect(InspectOptions(tiny_directory, tiny_text, TOKENS, site=names))
        return [(site["layer"], site["site"]) for site in found.results["sites"]]

    assert chosen("mlp_in", "model.layers.1.self_attn.k_proj") == [
        *((0, "mlp_in"), (1, "attention_in"), (1, "mlp_in")),
    ]


def test_a_text_alone_is_run_through_the_embedded_model(
    tiny_directory, tiny_text, tmp_path, monkeypatch
):
    monkeypatch.setattr(testbed, "directory", lambda: tiny_directory)
    more = ("--tokens", str(TOKENS), "--out", str(tmp_path))
    assert cli.main(["inspect", "--text", str(tiny_text), *more]) == 0
    results = json.loads((tmp_path / "outliers.json").read_text())
    assert results["model"]["name"] == "testbed"
    assert (
        results["sites"]
        == inspect(InspectOptions(tiny_directory, tiny_text, TOKENS)).results["sites"]
    )


BAD = {
    "a site that is not there": (("--site", "*.router"), "--site *.router names no linear"),
    "no share": (("--share", "0"), "give one in (0, 1]"),
    "too many tokens": (("--tokens", "99999999"), "whole rows"),
    "a text that is not there": (("--text", "nowhere.txt"), "No such file"),
    "a model that is not there": (("--model", "nowhere"), "nowhere is not a directory"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name, tiny_directory, tiny_text, tmp_path, capsys):
    more, says = BAD[name]
    assert run(tiny_directory, tiny_text, tmp_path / "out", *more) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert says in said.err
    assert not (tmp_path / "out").exists()


def test_a_model_without_text_bos_or_positions_is_refused(
    tiny_directory, tiny_text, tmp_path, capsys
):
    assert cli.main(["inspect", "--model", str(tiny_directory)]) == 2
    assert "--model needs --text" in capsys.readouterr().err
    save(tiny_decoder(bos_token_id=None), byte_tokenizer().to_str(), tmp_path / "other")
    assert run(tmp_path / "other", tiny_text, tmp_path / "out") == 2
    assert "names no bos_token_id" in capsys.readouterr().err
    short = tiny_decoder(max_position_embeddings=256)
    save(short, byte_tokenizer().to_str(), tmp_path / "short")
    assert run(tmp_path / "short", tiny_text, tmp_path / "out") == 2
    assert "has 256 positions" in capsys.readouterr().err
