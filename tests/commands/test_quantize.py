"""Quantizing a checkpoint: what is written is what was computed, killed or not."""

import contextlib
import dataclasses
import importlib.util
import json
import multiprocessing
import os
import random
import shutil
import signal
import time

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from duquantpp_jax import cli, files
from duquantpp_jax.checkpoints import Quantized, load, load_any, load_quantized, save, writer
from duquantpp_jax.checkpoints.directory import layer_file
from duquantpp_jax.commands.export import ExportOptions, export
from duquantpp_jax.commands.quantize import QuantizeOptions, calibration_tokens, job_of, quantize
from duquantpp_jax.models import Decoder
from duquantpp_jax.ptq.walk import quantize_decoder
from tests import quantize_worker
from tests.conftest import byte_tokenizer, tiny_decoder
from tests.decompress import assert_equal, by_library, by_numpy, dequantized

TOKENS = np.asarray(jax.random.randint(jax.random.key(4), (2, 24), 0, 257))
RUN = jax.jit(lambda model, tokens, state, linear: model(tokens, linear, state)[0],
              static_argnames="linear")  # fmt: skip


def options_of(model, out, **more):
    return QuantizeOptions(**{"model": model, "out": out, "rows": 4, **more})


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def three_layers(tmp_path_factory):
    """A tiny model of three layers, with a generation config and a hidden file beside it."""
    directory = tmp_path_factory.mktemp("models") / "three"
    save(tiny_decoder(num_hidden_layers=3), byte_tokenizer().to_str(), directory)
    (directory / "generation_config.json").write_text('{"temperature": 0.6}')
    (directory / ".hidden.json").write_text("{}")
    return directory


@pytest.fixture(scope="module")
def quantized(three_layers, tmp_path_factory):
    """It, quantized without interruption."""
    out = tmp_path_factory.mktemp("quantized") / "whole"
    quantize(options_of(three_layers, out, recipe="smooth_hadamard", rounding="gptq"))
    return out


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
    assert fields.pop("quantization_config")["quant_method"] == "duquantpp_jax"
    assert fields == json.loads((three_layers / "config.json").read_text())
    index = json.loads((quantized / "model.safetensors.index.json").read_text())
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


@pytest.mark.parametrize(
    ("layers", "hidden", "first"),
    [
        ((), (), 0),
        ((0, 1), (), 0),  # layer 2 has nothing to read
        ((0, 1), (1,), 1),
        ((0, 1), (1, 2), 2),
        ((0,), (2,), 0),
        ((1,), (2,), 0),  # layer 0 is missing
        ((0, 1, 2), (2,), 2),  # killed before the hidden states were dropped
        ((0, 1, 2), (), 3),
    ],
)
def test_it_goes_on_from_the_last_layer_with_all_before_it_and_its_hidden_states(
    layers, hidden, first, tmp_path
):
    for number in layers:
        (tmp_path / layer_file(number)).touch()
    for number in hidden:
        save_file(
            {"hidden": np.full((1, 1, 2), number, np.float32)},
            writer._hidden_file(tmp_path, number),
        )
    found, states = writer._resume(tmp_path, 3)
    assert found == first
    assert (states is None) == (first in (0, 3))
    assert states is None or np.all(states == first)


def test_one_process_writes_a_directory_and_removes_what_none_is_writing(tmp_path):
    left = tmp_path / ".tmpabcdef"
    for path in (tmp_path / "quantization.json", left):
        path.touch()
    with writer.only_writer(tmp_path):
        assert not left.exists()
        left.touch()
        with pytest.raises(ValueError, match="by another process"):
            writer.only_writer(tmp_path).__enter__()
        assert left.exists()


class Killed(BaseException):
    """In place of a signal: nothing after it runs, not even what tidies up."""


def killed_at(moment, patch):
    """Makes the `moment`-th step of writing files the last: some write half a file first."""
    count = [0]

    def dies(real, half):
        def step(*arguments, **options):
            count[0] += 1
            if count[0] > moment:
                raise Killed
            if count[0] == moment:
                if half:
                    real(*arguments, **options)
                raise Killed
            return real(*arguments, **options)

        return step

    patch.setattr(os, "replace", dies(os.replace, half=moment % 2 == 0))
    patch.setattr("duquantpp_jax.files.os.fsync", dies(os.fsync, half=False))
    # A process that is gone unlinks no temporary file.
    unlink = type(files.Path()).unlink
    patch.setattr(
        "pathlib.Path.unlink",
        lambda path, **more: None if count[0] >= moment else unlink(path, **more),
    )


def test_killed_before_anything_has_its_name_it_begins_anew(three_layers, quantized, tmp_path):
    options = options_of(three_layers, tmp_path / "q", recipe="smooth_hadamard", rounding="gptq")
    with pytest.MonkeyPatch.context() as patch:
        killed_at(1, patch)
        with pytest.raises(Killed):
            quantize(options)
    (left,) = options.out.iterdir()
    assert left.name.startswith(".quantization.json.")
    quantize(options)
    assert contents(options.out) == contents(quantized)


def test_killed_before_it_drops_old_hidden_states_it_drops_them_later(
    three_layers, quantized, tmp_path
):
    options = options_of(three_layers, tmp_path / "q", recipe="smooth_hadamard", rounding="gptq")
    unlink = type(files.Path()).unlink

    def dies(path, **more):
        if path.name == "hidden-00001.safetensors":
            raise Killed
        unlink(path, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pathlib.Path.unlink", dies)
        with pytest.raises(Killed):
            quantize(options)
    assert len(list(options.out.glob("hidden-*"))) == 2
    finished = {path: path.stat().st_ino for path in options.out.glob("layer-*")}
    assert len(finished) == 2
    quantize(options)
    assert {path: path.stat().st_ino for path in finished} == finished  # none is done again
    assert contents(options.out) == contents(quantized)


@pytest.mark.slow
def test_killed_sequential_goes_on_from_what_the_quantized_layers_gave(three_layers, tmp_path):
    """Ten times, at random steps of writing; once without the hidden states that it had stored."""
    whole = options_of(three_layers, tmp_path / "whole", sequential=True, rounding="asymmetric")
    quantize(whole)
    options = dataclasses.replace(whole, out=tmp_path / "q")
    kills, moments, dropped = 0, random.Random(0), []
    while kills < 10:
        with pytest.MonkeyPatch.context() as patch:
            killed_at(moments.randint(1, 12), patch)
            try:
                quantize(options)
            except Killed:
                kills += 1
            else:
                assert contents(options.out) == contents(whole.out)
                shutil.rmtree(options.out)
        if not dropped:  # finished layers without hidden states are done again
            dropped = list(options.out.glob("hidden-*"))
            for path in dropped:
                path.unlink()
    assert dropped
    quantize(options)
    assert contents(options.out) == contents(whole.out)


@pytest.fixture
def in_process(tmp_path):
    """Quantizes in a process that is killed a while after so many of its steps.

    Gives the steps that were seen and the process's exit code: 0 if it was done before.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["duquantpp_jax.commands.quantize"])

    def run(options, steps=10**9, pause=0.0):
        reader, writer = context.Pipe(duplex=False)
        arguments = (options, tmp_path / "programs", writer)
        process = context.Process(target=quantize_worker.run, args=arguments)
        process.start()
        writer.close()
        seen = 0
        with reader, contextlib.suppress(EOFError):  # it has ended
            while seen < steps:
                reader.recv_bytes()
                seen += 1
            time.sleep(pause)
        process.kill()
        process.join()
        return seen, process.exitcode

    return run


@pytest.mark.slow
def test_twenty_processes_killed_at_random_leave_what_one_writes_and_exports(
    three_layers, tmp_path, in_process
):
    """SIGKILL, after a step drawn from the first half of a whole run's, and up to 50 ms later."""
    few = {"include": ("*.o_proj", "*.down_proj")}  # a process has less to trace
    whole, options = (
        options_of(three_layers, tmp_path / name, **few) for name in ("whole", "killed")
    )
    steps, code = in_process(whole)
    assert code == 0
    kills, moments, left = 0, random.Random(1), set()
    while kills < 20:
        _, code = in_process(options, moments.randint(1, steps // 2), moments.uniform(0, 0.05))
        if code == 0:
            assert contents(options.out) == contents(whole.out)
            shutil.rmtree(options.out)
            continue
        assert code == -signal.SIGKILL
        kills += 1
        left.add(len(list(options.out.glob("layer-*"))))
        if not (options.out / "config.json").exists():
            with pytest.raises(ValueError, match=r"is no quantized model|is not finished"):
                load_quantized(options.out)
    assert len(left) > 1
    assert in_process(options)[1] == 0
    assert contents(options.out) == contents(whole.out)
    for format in ("compressed-tensors", "dequantized"):
        exported = [tmp_path / f"{format} of {job.out.name}" for job in (whole, options)]
        for job, place in zip((whole, options), exported, strict=True):
            export(ExportOptions(job.out, format, place))
        assert contents(exported[0]) == contents(exported[1])
        if format == "compressed-tensors":
            assert_equal(by_numpy(exported[1]), dequantized(whole.out))
            if importlib.util.find_spec("compressed_tensors"):  # the extra `interop`
                assert_equal(by_library(exported[1]), dequantized(whole.out))


def test_another_job_is_not_mixed_into_a_directory_unless_it_is_overwritten(
    three_layers, tmp_path, capsys
):
    out = tmp_path / "q"
    quantize(options_of(three_layers, out))
    before = contents(out)
    arguments = ["quantize", "--model", str(three_layers), "--out", str(out), "--rows", "4"]
    assert_one_line(cli.main([*arguments, "--seed", "1"]), capsys, "was begun with seed 0, not 1")
    assert contents(out) == before
    (out / "notes").write_text("mine")
    assert cli.main([*arguments, "--seed", "1", "--overwrite"]) == 0
    assert Quantized(out).job.seed == 1
    assert (out / "notes").read_text() == "mine"


def test_a_dry_run_writes_nothing_and_knows_the_sizes(three_layers, tmp_path, capsys):
    arguments = ["quantize", "--model", str(three_layers), "--out", str(tmp_path / "q")]
    assert cli.main([*arguments, "--dry-run"]) == 0
    assert "Nothing was written" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


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
    arguments += ["--rows", "4"]
    says = "model.layers.0.mlp.down_proj has input width 88"
    assert_one_line(cli.main(arguments), capsys, says)
    assert cli.main([*arguments, "--pad"]) == 0
    decoder, linear, state = load_quantized(tmp_path / "q")
    assert np.isfinite(RUN(decoder, TOKENS, state, linear)).all()


def test_a_quantized_model_is_refused_where_a_float_one_is_wanted(quantized, tmp_path, capsys):
    text = tmp_path / "text"
    text.write_text("a" * 9999)
    for command in (
        ["quantize", "--model", str(quantized), "--out", str(tmp_path / "q")],
        ["compare", "--model", str(quantized), "--text", str(text), "--calibration-text", str(text),
         "--out", str(tmp_path / "c")],
    ):  # fmt: skip
        assert_one_line(cli.main(command), capsys, "already quantized")


def test_activations_that_overflow_name_the_layer_and_give_no_text(tmp_path, capsys):
    model = tiny_decoder(num_hidden_layers=1, max_position_embeddings=32)
    grown = {n: 1e30 * a if "mlp" in n else a for n, a in model.parameters().items()}
    save(Decoder(model.config, grown), byte_tokenizer().to_str(), tmp_path / "m")
    command = ["--model", str(tmp_path / "m")]
    more = ["--recipe", "identity", "--rows", "1", "--out", str(tmp_path / "q")]
    assert cli.main(["quantize", *command, *more]) == 2
    assert "layer 1 of 1 gives NaN or Inf" in capsys.readouterr().err
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
    arguments += ["--rows", "4", "--recipe", "smooth_hadamard", "--rounding", "gptq"]

    def full(tensors, path, metadata):
        if "layer-00001" in str(path):
            raise OSError(28, "No space left on device", str(path))
        save_file(tensors, path, metadata)

    with monkeypatch.context() as patch:
        patch.setattr("duquantpp_jax.checkpoints.writer.save_file", full)
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
