"""The same command writes the same bytes, and what would mix with other numbers is refused.

`compare` and `inspect` are tried in tests/test_cli.py and test_inspect.py, `quantize` and `learn`
where they are killed and resumed, `ablate` in tests/lab/test_running.py.
"""

import dataclasses
import json

import pytest

from duquantpp_jax import cli
from duquantpp_jax.checkpoints.directory import JOB
from duquantpp_jax.commands import quantize as quantizing
from duquantpp_jax.commands.export import ExportOptions, export
from duquantpp_jax.evaluation.subject import check_unchanged, environment, model_and_hash
from duquantpp_jax.files.processes import only_process
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


def test_a_model_that_is_changed_while_it_is_quantized_gives_none(directory, tmp_path, monkeypatch):
    def changes(out, *_):
        (out / "layer-00000.safetensors").write_bytes(b"perhaps of another model")
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()), indent=3))

    monkeypatch.setattr(quantizing, "write_layers", changes)
    with pytest.raises(ValueError, match=r"model was changed while it was read .SHA-256"):
        quantizing.quantize(options_of(directory, tmp_path / "q"))
    assert not (tmp_path / "q").exists()


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
