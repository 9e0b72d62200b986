"""Quantizing a checkpoint: what is written is what was computed, and what is wrong is one line."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from duquantpp_jax import cli
from duquantpp_jax.checkpoints import Quantized, load, load_any, load_quantized, save
from duquantpp_jax.commands import quantize as command
from duquantpp_jax.commands.evaluate import EvaluateOptions, evaluate
from duquantpp_jax.commands.quantize import (
    QuantizeOptions,
    calibration_tokens,
    dry_run,
    job_of,
    quantize,
)
from duquantpp_jax.commands.sizes import dry_line
from duquantpp_jax.models import Decoder
from duquantpp_jax.models.parameters import LAYER
from duquantpp_jax.ptq import estimate, layout
from duquantpp_jax.ptq.walk import quantize_decoder
from tests.commands.conftest import contents, options_of
from tests.conftest import TEXT, byte_tokenizer, tiny_decoder
from tests.documented import undocumented

ROWS = ["--rows", "4", "--calibration-text", str(TEXT)]
TOKENS = np.asarray(jax.random.randint(jax.random.key(4), (2, 24), 0, 257))
RUN = jax.jit(lambda model, tokens, state, linear: model(tokens, linear, state)[0],
              static_argnames="linear")  # fmt: skip


@pytest.mark.slow
def test_a_reloaded_model_gives_the_logits_of_the_one_in_memory_bit_for_bit(three_layers, tmp_path):
    options = options_of(three_layers, tmp_path / "q", recipe="smooth_hadamard",
                         weight_formats=("mxfp4", "mlp_out=mxfp8"), exclude=("*.1.mlp.up_proj",),
                         activation_formats=("mxfp8", "attention_out=bf16"))  # fmt: skip
    quantize(options)
    tokens, source = calibration_tokens(options)
    model = load(three_layers)
    plan = job_of(options, tokens, source).plan(model.config)
    *_, state = quantize_decoder(plan, model, tokens)
    wanted = RUN(model, TOKENS, state, plan.linear)
    decoder, linear, again = load_any(tmp_path / "q")
    np.testing.assert_array_equal(RUN(decoder, TOKENS, again, linear), wanted)
    assert len(again) == 3  # runs: layer 1 differs from both its neighbours


def test_the_directory_has_what_the_float_one_has(three_layers, quantized):
    for name in ("tokenizer.json", "generation_config.json"):
        assert (quantized / name).read_bytes() == (three_layers / name).read_bytes()
    assert not (quantized / ".hidden.json").exists()
    fields = json.loads((quantized / "config.json").read_text())
    about = fields.pop("quantization_config")
    assert about["quant_method"] == fields["model_type"] == "duquantpp_jax"  # known to no other
    fields["model_type"] = about["model_type"]
    assert fields == json.loads((three_layers / "config.json").read_text())
    index = json.loads((quantized / "quantized.safetensors.index.json").read_text())
    assert not list(quantized.glob("model*"))  # transformers would draw random weights
    for name, file in index["weight_map"].items():
        assert name in load_file(quantized / file)
    assert not list(quantized.glob("hidden-*"))


def test_the_report_has_every_linear_and_the_bytes_of_both_models(three_layers, quantized):
    report = json.loads((quantized / "report.json").read_text())
    assert len(report["linears"]) == 3 * 7
    for row in report["linears"]:
        assert set(row) == {
            "linear",
            "bytes",
            "sqnr_db",
            "weight_error",
            "online_multiply_adds",
            "online_bytes",
        }
    for place, said in ((three_layers, "float_bytes"), (quantized, "bytes")):
        stored = sum(path.stat().st_size for path in place.glob("*.safetensors"))
        assert report[said] == stored
    kept = sum((quantized / f"layer-0000{n}.safetensors").stat().st_size for n in range(3))
    assert sum(row["bytes"] for row in report["linears"]) < kept


def test_quantizing_again_changes_nothing(three_layers, quantized):
    before = contents(quantized)
    quantize(options_of(three_layers, quantized, recipe="smooth_hadamard", rounding="gptq"))
    assert contents(quantized) == before


def test_another_job_is_not_mixed_into_a_directory_unless_it_is_overwritten(
    three_layers, tmp_path, capsys
):
    out = tmp_path / "q"
    quantize(options_of(three_layers, out))
    before = contents(out)
    arguments = ["quantize", "--model", str(three_layers), "--out", str(out), *ROWS]
    assert_one_line(cli.main([*arguments, "--seed", "1"]), capsys, "was begun with seed 0, not 1")
    assert contents(out) == before
    (out / "notes").write_text("mine")
    assert cli.main([*arguments, "--seed", "1", "--overwrite"]) == 0
    assert Quantized(out).job.seed == 1
    assert (out / "notes").read_text() == "mine"


def test_it_says_first_where_a_kernel_runs(three_layers, tmp_path, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "quantize", stop)
    for reason in ("why_not_nvidia", "why_not_by_default"):
        monkeypatch.setattr(layout, reason, lambda: None)
    with pytest.raises(KeyboardInterrupt):
        command.run(options_of(three_layers, tmp_path / "q"))
    assert "in kernels (triton), where there is one: attention\n" in capsys.readouterr().err


def test_a_dry_run_writes_nothing_and_knows_the_sizes(three_layers, tmp_path, capsys):
    arguments = ["quantize", "--model", str(three_layers), "--out", str(tmp_path / "q")]
    assert cli.main([*arguments, "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert undocumented(found) == set()
    assert "Nothing was written" in dry_line(found)
    assert not list(tmp_path.iterdir())


LLAMA = {
    "architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16", "hidden_act": "silu",
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "rms_norm_eps": 1e-5, "rope_theta": 5e5, "bos_token_id": 128000, "eos_token_id": 128001,
    "max_position_embeddings": 8192, "tie_word_embeddings": False,
}  # fmt: skip
GPT_OSS = {
    "architectures": ["GptOssForCausalLM"], "hidden_act": "silu", "attention_bias": True,
    "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24, "head_dim": 64,
    "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 201088,
    "num_local_experts": 32, "num_experts_per_tok": 4, "swiglu_limit": 7.0, "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 12, "rms_norm_eps": 1e-5,
    "rope_theta": 150000, "max_position_embeddings": 131072, "tie_word_embeddings": False,
    "eos_token_id": 200002, "quantization_config": {"quant_method": "mxfp4"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "fields", "more"),
    [
        ("Llama-3-8B", LLAMA, {}),
        ("gpt-oss-20b", GPT_OSS, {"requantize": True, "include": ("*.mlp.*",)}),
    ],
)
def test_a_dry_run_without_weights_predicts_what_the_page_says(
    name, fields, more, tmp_path, monkeypatch
):
    monkeypatch.setattr(estimate, "flops_per_second", lambda: 1e13)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    (tmp_path / "generation_config.json").write_text('{"bos_token_id": 199998}')
    found = dry_run(QuantizeOptions(tmp_path, rounding="gptq", out=tmp_path / "q", **more))
    of = ("device_bytes", "host_bytes", "evaluation_bytes")
    page = pathlib.Path(__file__).parents[2].joinpath("docs/models.md").read_text(encoding="utf-8")
    row = next(line for line in page.splitlines() if line.startswith(f"| {name} "))
    assert [f"{found[each] / 2**30:.1f}" for each in of] == row.strip("| ").split(" | ")[2:]
    assert not (tmp_path / "q").exists()


def assert_one_line(code, capsys, says):
    printed = capsys.readouterr()
    assert code == 2
    assert printed.out == ""
    assert printed.err.startswith("duquantpp: ")
    assert printed.err.count("\n") == 1
    assert says in printed.err


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--weight-formats", "mxfp5"), "unknown format 'mxfp5': did you mean"),
        (("--weight-formats", "bf16"), "BFloat16 stores no weights"),
        (("--activation-formats", "mlp_inn=mxfp8"), "unknown site 'mlp_inn': did you mean mlp_in?"),
        (("--weight-formats", "mxfp8", "--scale-rule", "log256"), "mxfp8 has no scale rule"),
        (("--exclude", "*.nothing"), "--exclude '*.nothing' matches no linear"),
        (("--rows", "0"), "at least one row"),
        (("--recipe", "duqantpp"), "did you mean duquantpp?"),
    ],
)
def test_a_bad_option_is_one_line(more, says, three_layers, tmp_path, capsys):
    arguments = ["quantize", "--model", str(three_layers), "--out", str(tmp_path / "q"), *more]
    assert_one_line(cli.main(arguments), capsys, says)
    assert not (tmp_path / "q").exists()


@pytest.mark.slow
def test_a_width_off_the_block_is_refused_and_padded_on_demand(tmp_path, capsys):
    odd = tiny_decoder(num_hidden_layers=3, intermediate_size=88)
    save(odd, byte_tokenizer().to_str(), tmp_path / "odd")
    arguments = ["quantize", "--model", str(tmp_path / "odd"), "--out", str(tmp_path / "q")]
    arguments += ROWS
    says = "model.layers.0.mlp.down_proj has input width 88"
    assert_one_line(cli.main(arguments), capsys, says)
    assert cli.main([*arguments, "--pad"]) == 0
    decoder, linear, state = load_quantized(tmp_path / "q")
    assert np.isfinite(RUN(decoder, TOKENS, state, linear)).all()


def test_a_quantized_model_is_refused_where_a_float_one_is_wanted(quantized, tmp_path, capsys):
    text = tmp_path / "text"
    text.write_text("a" * 9999)
    for words in (
        ["quantize", "--model", str(quantized), "--out", str(tmp_path / "q")],
        ["compare", "--model", str(quantized), "--text", str(text), "--calibration-text", str(text),
         "--out", str(tmp_path / "c")],
    ):  # fmt: skip
        assert_one_line(cli.main(words), capsys, "already quantized")


@pytest.mark.parametrize(
    ("up", "says"),
    [
        (1e30, "layers.1.mlp_out: on the calibration rows the input before it is moved"),
        (1e15, "layers.1.mlp: on the calibration rows the output is NaN or Inf in"),
    ],
)
def test_activations_that_overflow_name_the_layer_and_leave_nothing(up, says, tmp_path, capsys):
    model, times = tiny_decoder(), {"mlp.up_proj": up, "mlp.gate_proj": up, "mlp.down_proj": 1e30}
    grown = dict(model.parameters())
    for name, more in times.items():
        grown[f"{LAYER}{name}"] = grown[f"{LAYER}{name}"].at[1].multiply(more)
    save(Decoder(model.config, grown), byte_tokenizer().to_str(), tmp_path / "m")
    command = ["--model", str(tmp_path / "m")]
    more = [*ROWS, "--recipe", "identity", "--out", str(tmp_path / "q")]
    assert cli.main(["quantize", *command, *more]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "q").exists()  # nor layer 0, which was finished
    assert cli.main(["generate", *command, "--prompt", "a", "--max-new-tokens", "2"]) == 2
    assert "gave NaN for token 1" in capsys.readouterr().err


def test_a_newer_schema_is_refused(quantized, tmp_path):
    newer = tmp_path / "newer"
    shutil.copytree(quantized, newer)
    described = json.loads((newer / "quantization.json").read_text())
    (newer / "quantization.json").write_text(json.dumps(described | {"schema": 3}))
    with pytest.raises(
        ValueError, match=r"has schema 3, and this version reads 2: install a newer"
    ):
        load_any(newer)


def test_a_full_disk_is_one_line_and_the_finished_layers_are_kept(
    three_layers, quantized, tmp_path, monkeypatch, capsys
):
    arguments = ["quantize", "--model", str(three_layers), "--out", str(tmp_path / "q")]
    arguments += [*ROWS, "--recipe", "smooth_hadamard", "--rounding", "gptq"]

    def full(tensors, path, metadata):
        if "layer-00001" in str(path):
            raise OSError(28, "No space left on device", str(path))
        save_file(tensors, path, metadata)

    with monkeypatch.context() as patch:
        patch.setattr("duquantpp_jax.files.save_file", full)
        assert_one_line(cli.main(arguments), capsys, "No space left on device")
    assert sorted(path.name for path in (tmp_path / "q").iterdir()) == [
        *("hidden-00001.safetensors", "layer-00000.safetensors", "quantization.json"),
    ]
    assert cli.main(arguments) == 0
    assert contents(tmp_path / "q") == contents(quantized)


def test_files_that_are_not_ours_are_left_alone(three_layers, tmp_path, capsys):
    (tmp_path / "notes").write_text("mine")
    arguments = ["quantize", "--model", str(three_layers), "--out", str(tmp_path), "--overwrite"]
    assert_one_line(cli.main(arguments), capsys, "holds other files")
    assert (tmp_path / "notes").read_text() == "mine"


def test_a_model_with_a_zero_linear_and_a_dead_site_is_measured(directory, tmp_path):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight"][:] = 0  # so that down_proj has only zeros
    save_file(tensors, path)
    more = {"recipe": "smooth_hadamard", "rounding": "gptq"}
    report = quantize(options_of(directory, tmp_path / "q", **more))
    ratio = {row["linear"]: row["sqnr_db"] for row in report["linears"]}
    assert ratio["model.layers.0.mlp.up_proj"] is None
    assert ratio["model.layers.0.mlp.down_proj"] is None
    assert all(v > 0 for name, v in ratio.items() if "layers.0.mlp.up" not in name and v)
    found = evaluate(EvaluateOptions(tmp_path / "q", text=TEXT, reference=directory, tokens=1022))
    assert 0 < found["kl"]["value"] < 1
