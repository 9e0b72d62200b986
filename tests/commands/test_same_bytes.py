"""The same command writes the same bytes, and what would mix with other numbers is refused.

`compare` is tried in tests/test_cli.py, `quantize` and `learn` where they are killed and resumed,
`ablate` in tests/lab/test_running.py, `inspect` in test_inspect.py, `generate` in
test_evaluate.py, packed exports in tests/checkpoints/test_serving.py.
"""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from duquantpp_jax import cli
from duquantpp_jax.checkpoints.directory import JOB
from duquantpp_jax.commands import compare
from duquantpp_jax.commands import quantize as quantizing
from duquantpp_jax.commands.compare import CompareOptions
from duquantpp_jax.commands.export import ExportOptions, export
from duquantpp_jax.evaluation import RowSums
from duquantpp_jax.evaluation.subject import check_unchanged, environment, model_and_hash
from duquantpp_jax.files.processes import only_process
from duquantpp_jax.lab.bench import Found
from duquantpp_jax.ptq.walk import QuantizedLayer
from tests.commands.conftest import contents, options_of


def test_export_writes_the_same_bytes_again(quantized, tmp_path):
    for name in "ab":
        export(ExportOptions(quantized, "dequantized", out=tmp_path / name))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_evaluate_writes_the_same_bytes_again(three_layers, tiny_text, tmp_path):
    words = ["evaluate", "--model", three_layers, "--text", tiny_text, "--window", 60]
    for name in "ab":
        out = tmp_path / name
        assert cli.main([*map(str, words), "--tokens", "1200", "--out", str(out)]) == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_quantized_model_of_another_number_of_threads_is_not_mixed_with_this(
    three_layers, quantized, monkeypatch
):
    monkeypatch.setenv("PJRT_NPROC", "99")
    with pytest.raises(ValueError, match=r"was begun with environment\.threads\.xla \d+, not 99"):
        quantizing.quantize(
            options_of(three_layers, quantized, recipe="smooth_hadamard", rounding="gptq")
        )


def test_two_processes_do_not_quantize_into_one_directory(three_layers, tmp_path):
    with (
        only_process(tmp_path / "q"),
        pytest.raises(ValueError, match="q is being written by another process: wait for it"),
    ):
        quantizing.quantize(options_of(three_layers, tmp_path / "q"))


def test_a_model_that_is_changed_while_it_is_quantized_gives_no_layer(
    directory, tmp_path, monkeypatch
):
    def changes(*arguments):
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()), indent=3))
        *_, check = arguments
        check(0, QuantizedLayer({}, {}, {}, {}))  # as before a layer is written

    monkeypatch.setattr(quantizing, "write_layers", changes)
    with pytest.raises(ValueError, match=r"model was changed while it was read .SHA-256"):
        quantizing.quantize(options_of(directory, tmp_path / "q"))
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("config.json", None, r"config\.json cannot be read"),
        ("config.json", b"{}", "three was changed while it was read"),
        ("tokenizer.json", None, "tokenizer.json of the model was changed, added or removed"),
        ("generation_config.json", b"{}", "generation_config.json of the model was changed"),
        ("tokenizer_config.json", b"{}", "tokenizer_config.json of the model was changed"),
        ("README.md", b"for people", None),
    ],
)
def test_a_file_of_the_model_that_is_changed_under_way_is_noticed_and_a_text_for_people_is_not(
    name, content, says, three_layers, quantized, tmp_path, monkeypatch
):
    model = shutil.copytree(three_layers, tmp_path / "three")
    out = shutil.copytree(quantized, tmp_path / "q")
    (out / "config.json").unlink()  # killed when its layers were finished
    options = options_of(model, out, recipe="smooth_hadamard", rounding="gptq")

    def changes(*_):
        (model / name).unlink(missing_ok=True)
        if content is not None:
            (model / name).write_bytes(content)

    with monkeypatch.context() as patch:
        patch.setattr(quantizing, "write_layers", changes)
        if says is None:
            quantizing.quantize(options)
            assert (out / name).read_bytes() == content
            return
        with pytest.raises(ValueError, match=says):
            quantizing.quantize(options)
    assert not (out / "config.json").exists()
    shutil.rmtree(model)
    shutil.copytree(three_layers, model)
    quantizing.quantize(options)
    assert contents(out) == contents(quantized)


def test_a_file_that_is_removed_while_a_model_is_exported_is_noticed(quantized, tmp_path):
    model = shutil.copytree(quantized, tmp_path / "q")

    def remove(*_):
        (model / "tokenizer.json").unlink(missing_ok=True)

    with pytest.raises(ValueError, match=r"^tokenizer\.json of the model was changed, added or"):
        export(ExportOptions(model, "dequantized", out=tmp_path / "out"), remove)
    assert [path.name for path in tmp_path.iterdir()] == ["q"]


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_model_that_is_changed_while_it_is_compared_gives_no_result(
    name, directory, tiny_text, tmp_path, monkeypatch
):
    def changes(*_):
        (directory / name).write_text((directory / name).read_text() + " ")
        sums = RowSums(*[np.zeros(1, np.float32)] * 4)
        return Found(sums, np.zeros(1, np.int32), None, None, {})

    monkeypatch.setattr("duquantpp_jax.lab.bench.Bench.run", changes)
    given = {"model": directory, "text": tiny_text, "calibration_text": tiny_text}
    with pytest.raises(ValueError, match="model, texts or fits were changed while they were read"):
        compare.compare(CompareOptions(**given, tokens=511, recipes=("rtn",), out=tmp_path / "out"))


@pytest.mark.parametrize("command", ["compare", "evaluate"])
def test_two_processes_do_not_write_one_result(command, tmp_path, capsys):
    out, words = tmp_path / "out", [command, "--out", str(tmp_path / "out")]
    words += ["--model", "m", "--text", "t"] if command == "evaluate" else []
    with only_process(out, single=command == "evaluate"):
        assert cli.main(words) == 2
    assert "out is being written by another process: wait for it" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_removed_under_way_is_not_finished(directory, tmp_path, monkeypatch):
    monkeypatch.setattr(quantizing, "write_layers", lambda out, *_: (out / JOB).unlink())
    with pytest.raises(ValueError, match=r"quantization.json was removed while the layers were"):
        quantizing.quantize(options_of(directory, tmp_path / "q"))
    assert not (tmp_path / "q" / "SHA256SUMS").exists()


def test_a_model_that_is_removed_while_it_is_read_is_one_line(directory):
    before = model_and_hash(directory)
    check_unchanged(directory, before)
    (directory / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"^[^\n]*model[^\n]*has no model.safetensors[^\n]*$"):
        check_unchanged(directory, before)


def test_what_runs_a_gpu_stands_in_the_environment(monkeypatch):
    class Client:
        platform_version = "PJRT C API\ncuda 12090"

    @dataclasses.dataclass
    class Device:
        device_kind: str = "NVIDIA H200"
        platform: str = "gpu"
        client: type = Client

    assert "runtime" not in environment()
    monkeypatch.setattr("jax.devices", lambda: [Device()])
    assert environment()["runtime"] == "PJRT C API cuda 12090"
