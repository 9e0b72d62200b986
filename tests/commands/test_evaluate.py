"""`duquantpp evaluate` as a user types it: its results, its protocols, bad input in one line."""

import contextlib
import dataclasses
import io
import json
import pathlib
import re
import shlex

import numpy as np
import pytest
from tokenizers import processors

from duquantpp_jax import cli
from duquantpp_jax.checkpoints import save
from duquantpp_jax.commands.evaluate import _measures, run
from duquantpp_jax.commands.options.evaluate import EvaluateOptions
from duquantpp_jax.evaluation import RowSums
from duquantpp_jax.evaluation.rows import PROTOCOLS, Rows, read_text, rows_of_text
from tests.conftest import byte_tokenizer, tiny_decoder
from tests.documented import undocumented


def arguments(directory, text, *more):
    return ["evaluate", "--model", str(directory), "--text", str(text), *map(str, more)]


@pytest.fixture(scope="module")
def results(tiny_directory, tiny_text, tmp_path_factory):
    """The results of a model whose cache is in bf16 against itself, and what is printed."""
    out = tmp_path_factory.mktemp("evaluated") / "new" / "results.json"
    more = ("--reference", tiny_directory, "--cache", "bf16", "--window", 60, "--tokens", 1200)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert cli.main(arguments(tiny_directory, tiny_text, *more, "--out", out, "--json")) == 0
    assert printed.getvalue() == out.read_text()
    return json.loads(out.read_text())


def test_results_keep_their_contract(results):
    assert list(results) == [
        *("schema", "targets", "perplexity", "nll", "kl", "excess_nll", "agreement"),
        *(
            "reference_perplexity",
            "clusters",
            "interval",
            "environment",
            "options",
            "model",
            "reference",
        ),
    ]
    assert undocumented(results) == set()
    assert results["schema"] == 2
    assert results["targets"] == 1200
    assert results["clusters"] == {"unit": "document", "count": 10}
    assert results["options"] | {"text": None} == {
        "text": None,
        "text_key": "text",
        "protocol": "documents",
        "window": 60,
        "bos": True,
        "cache": "bf16",
        "rotate_keys": False,
        "compute": "float32",
        "implementation": None,
        "attention": None,
        "packed": None,
    }
    assert results["model"] == results["reference"]
    assert results["model"]["name"] == "tiny"
    for name in ("perplexity", "nll", "kl", "excess_nll", "agreement"):
        low, high = results[name]["ci95"]
        assert low < results[name]["value"] < high
    assert results["perplexity"]["value"] == pytest.approx(np.exp(results["nll"]["value"]))
    excess = results["perplexity"]["value"] / results["reference_perplexity"]["value"]
    assert results["excess_nll"]["value"] == pytest.approx(np.log(excess), abs=1e-9)
    assert 0 < results["kl"]["value"] < 0.01
    assert 0.9 < results["agreement"]["value"] < 1


def test_the_table_says_what_was_measured(tiny_directory, tiny_text, capsys):
    more = ("--protocol", "stream", "--window", 50, "--tokens", 490)
    assert cli.main(arguments(tiny_directory, tiny_text, *more)) == 0
    said = capsys.readouterr().out
    assert "490 targets of text.txt, stream, windows of 50 without BOS" in " ".join(said.split())
    assert "clustered by row (10)" in said
    assert "KL" not in said


def test_bos_decides_how_many_targets_a_row_has(tiny_text):
    """With a BOS all ids are targets; without, the first of a row is not."""
    text, tokenizer = read_text(tiny_text), byte_tokenizer()
    ids = tokenizer.encode(text).ids
    stream = rows_of_text(text, tokenizer, None, PROTOCOLS["stream"])
    assert stream.targets == 2047
    np.testing.assert_array_equal(stream.tokens.ravel(), ids[: len(ids) // 2048 * 2048])
    documents = rows_of_text(text, tokenizer, 256)
    assert documents.targets == 511
    assert (documents.tokens[:, 0] == 256).all()


BAD = {
    "two protocols": (("--bos", "--no-bos"), "--bos and --no-bos were both given"),
    "unknown protocol": (("--protocol", "steam"), "did you mean stream?"),
    "window too long": (("--window", "2048"), "--window 2048 is out of range"),
    "window of nothing": (("--no-bos", "--window", "1"), "2 to 2048 ids"),
    "window of zero": (("--window", "0"), "1 to 2047 ids"),
    "no tokens": (("--tokens", "0"), "0 targets are less than one row"),
    "unknown cache": (("--cache", "fp8"), "unknown cache format 'fp8'"),
    "heads that blocks do not divide": (("--cache", "mxfp8"), "head_dim 16"),
    "rotation without a cache": (("--rotate-keys",), "give --cache too"),
    "too many": (("--tokens", "999999"), "whole rows"),
    "a text that is not there": (("--text", "nowhere.txt"), "No such file"),
    "a reference that is not there": (("--reference", "nowhere"), "nowhere is not a directory"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name, tiny_directory, tiny_text, capsys):
    more, says = BAD[name]
    assert cli.main(arguments(tiny_directory, tiny_text, *more)) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert says in said.err


def test_a_reference_of_another_vocabulary_and_a_missing_bos_are_refused(
    tiny_directory, tiny_text, tmp_path, capsys
):
    other = tiny_decoder(vocab_size=300, bos_token_id=None)
    save(other, byte_tokenizer().to_str(), tmp_path / "other")
    reference = ("--reference", tmp_path / "other")
    assert cli.main(arguments(tiny_directory, tiny_text, *reference)) == 2
    assert "has 300 tokens" in capsys.readouterr().err
    assert cli.main(arguments(tmp_path / "other", tiny_text)) == 2
    assert "give --no-bos" in capsys.readouterr().err


@pytest.mark.slow
def test_a_quantized_directory_is_taken_like_a_float_one(
    tiny_directory, tiny_text, tmp_path, capsys
):
    quantized, out = tmp_path / "quantized", tmp_path / "results.json"
    model = ("--model", str(tiny_directory), "--recipe", "block_hadamard", "--out", str(quantized))
    assert cli.main(["quantize", *model, "--rows", "4", "--calibration-text", str(tiny_text)]) == 0
    more = ("--reference", tiny_directory, "--cache", "bf16", "--window", 60, "--tokens", 600)
    assert cli.main(arguments(quantized, tiny_text, *more, "--out", out)) == 0
    results = json.loads(out.read_text())
    assert results["kl"]["value"] > 0.01
    assert results["model"]["sha256"] != results["reference"]["sha256"]
    capsys.readouterr()
    command = ["generate", "--model", str(quantized), "--prompt", "ab", "--max-new-tokens", "3"]
    assert cli.main(command) == 0
    assert capsys.readouterr().out.startswith("ab")


PAGE = pathlib.Path(__file__).parents[2] / "docs" / "evaluate.md"


def test_the_documented_costs_of_a_cache_are_the_recorded_ones():
    place = PAGE.parent.parent / "experiments" / "results" / "kv_cache_gutenberg27m_128rows.json"
    recorded = json.loads(place.read_text())
    assert len(recorded) == 5
    for result in recorded:
        assert result["targets"] == 65_408
        name = result["options"]["cache"] + ", keys rotated" * result["options"]["rotate_keys"]
        kl, (low, high) = result["kl"]["value"], result["kl"]["ci95"]
        assert f"| {name} | {kl:.5f} ± {(high - low) / 2:.5f} |" in PAGE.read_text()
        if result["options"]["cache"] == "mxfp8":
            assert high < 0.002


def test_the_documented_commands_are_what_the_command_line_takes():
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("duquantpp ")]
    commands = [shlex.split(command)[1:] for line in lines for command in line.split(" && ")]
    assert [command[0] for command in commands] == ["evaluate", "generate", "quantize", "evaluate"]
    for command in commands:
        cli._parse(command)
    assert cli._parse(commands[-1]).protocol == "stream"


# duquantpp generate.


@pytest.mark.slow
def test_generate_prints_the_prompt_and_goes_on_as_beside_others(tiny_directory, capsys):
    more = ("--max-new-tokens", "8", "--cache", "bf16", "--temperature", "1", "--seed", "2")
    command = ["generate", "--model", str(tiny_directory), *more, "--prompt"]
    said = []
    for prompts in (["once upon"], ["a", "once upon"], ["a", "once upon"]):
        assert cli.main([*command, *prompts]) == 0
        printed = capsys.readouterr()
        said.append(printed.out)
        note, time = printed.err.splitlines()
        assert "give --bos" in note
        assert re.fullmatch(r"[\d.]+ s for programs.*, then [\d.]+ tokens a second", time)
    assert said[1] == said[2]
    assert said[0].startswith("once upon")
    assert len(said[0]) > len("once upon\n")
    assert said[1].endswith(f"\n----\n{said[0]}")
    assert cli.main([*command, "a", "once upon", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["prompt"] == ["a", "once upon"]
    assert "\n----\n".join(found["text"]) + "\n" == said[1]


def test_a_chat_prints_the_answer_alone(directory, capsys):
    """Of the same tokens: the template adds the letter w, and the tokenizer nothing to a chat."""
    template = {"chat_template": "{{ messages[0].content }}w"}
    (directory / "tokenizer_config.json").write_text(json.dumps(template))
    command = ["generate", "--model", str(directory), "--max-new-tokens", "8", "--prompt"]
    assert cli.main([*command, "once upon w", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert undocumented(found) == set()
    plain = found["text"] + "\n"
    tokenizer = byte_tokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 256)]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    assert cli.main([*command, "once upon ", "--chat"]) == 0
    answer = capsys.readouterr()
    assert f"once upon w{answer.out}" == plain
    assert cli.main([*command, "once upon w"]) == 0  # after the token that the tokenizer puts there
    beside = capsys.readouterr()
    assert beside.out.partition("once upon w")[2] not in plain
    assert "--bos" not in answer.err + beside.err


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--prompt", "a", "--chat"), "give plain text"),
        (("--prompt", ""), "--prompt is empty"),
        (("--prompt", "a", "--max-new-tokens", "4000"), "has 2047 of its 2048 positions left"),
        (("--prompt", "a", "--temperature", "-1"), "temperature of -1"),
        (("--prompt", "a", "--cache", "mxfp4"), "head_dim 16"),
        (
            ("--prompt", "a", "--implementation", "triton"),
            "needs an NVIDIA GPU, and this is cpu",
        ),
        ((), "--prompt"),
    ],
)
def test_generate_refuses_bad_input_in_one_line(more, says, tiny_directory, capsys):
    assert cli.main(["generate", "--model", str(tiny_directory), *more]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert says in said.err


# The real one.


@pytest.mark.slow
def test_gutenberg_27m_has_its_known_perplexity_and_a_cache_in_mxfp8_costs_little(data, tmp_path):
    """Four rows of 128; test_hugging_face.py has their perplexity, and that of 16."""
    model, out = data / "models/gutenberg-27m", tmp_path / "out.json"
    more = ("--reference", model, "--cache", "mxfp8", "--tokens", 4 * 511, "--out", out)
    assert cli.main(arguments(model, data / "text/gutenberg_valid.txt", *more)) == 0
    results = json.loads(out.read_text())
    assert results["reference_perplexity"]["value"] == pytest.approx(24.510, abs=0.005)
    assert 0.001 < results["kl"]["value"] < 0.002


def test_intervals_of_two_rows_leave_out_what_no_text_can_have():
    rows = Rows(np.zeros((2, 11), np.int32), np.arange(2))
    sums = RowSums(*map(np.array, ([1.0, 30.0], [2.0, 20.0], [0.0, 1.0], [4.0, 10.0])))
    found = _measures(sums.nll, sums, rows, np.arange(2))
    assert (found["nll"]["ci95"][0], found["kl"]["ci95"][0]) == (0, 0)
    assert found["perplexity"]["ci95"][0] == 1
    assert found["agreement"]["ci95"] == (0, 1)
    low, high = found["excess_nll"]["ci95"]
    assert low < 0 < found["excess_nll"]["value"] < high


def test_attention_in_a_kernel_needs_a_gpu(tiny_directory, tiny_text):
    asked = EvaluateOptions(tiny_directory, tiny_text, attention="triton")
    with pytest.raises(ValueError, match="--attention triton cannot run: it needs an NVIDIA GPU"):
        run(asked)


def test_an_implementation_that_would_not_run_is_refused(tmp_path):
    asked = EvaluateOptions(tmp_path, tmp_path / "t", implementation="triton", mesh="model=2")
    with pytest.raises(ValueError, match="kernels are not cut"):
        run(asked)
    asked = dataclasses.replace(asked, implementation=None, attention="triton")
    with pytest.raises(ValueError, match="kernels are not cut"):
        run(asked)
    with pytest.raises(ValueError, match="--implementation is about --text"):
        run(EvaluateOptions(tmp_path, tasks=("cloze",), implementation="xla"))
    with pytest.raises(ValueError, match="--attention is about --text"):
        run(EvaluateOptions(tmp_path, tasks=("cloze",), attention="xla"))
