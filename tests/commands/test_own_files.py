"""A quantized directory is read as a stranger's: a change is one line, and never a number.

`write_seal` writes SHA256SUMS anew, as whoever meant to change a file would.
"""

import contextlib
import json
import random
import shutil

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from duquantpp_jax.checkpoints import Quantized, load_tokenizer, writer
from duquantpp_jax.checkpoints.directory import read_job
from duquantpp_jax.checkpoints.layouts import write_export
from duquantpp_jax.checkpoints.seal import SUMS, write_seal
from duquantpp_jax.files import ABOUT

LAYERS = [f"layer-0000{number}.safetensors" for number in range(3)]
NORM = "model.layers.0.input_layernorm.weight"


def read(directory):
    """Reads every file of a quantized directory."""
    model = Quantized(directory)
    for number in range(model.config.num_hidden_layers):
        model.layer(number)
    model.outside()
    model.report()
    load_tokenizer(directory, model.config)


@pytest.fixture
def copy(quantized, tmp_path):
    return shutil.copytree(quantized, tmp_path / "q")


def edit(directory, file, **changes):
    """Changes fields of a JSON file."""
    fields = json.loads((directory / file).read_text())
    (directory / file).write_text(json.dumps(fields | changes))


def retensor(directory, change, file=LAYERS[0]):
    """Changes the tensors of a file, and what it says of them."""
    path, tensors = directory / file, load_file(directory / file)
    with safe_open(path, framework="numpy") as opened:
        about = json.loads((opened.metadata() or {}).get(ABOUT, "{}"))
    change(tensors, about)
    save_file(tensors, path, {ABOUT: json.dumps(about)})


def swap(directory):
    first, second = (directory / name for name in LAYERS[:2])
    first.rename(directory / ".other")
    second.rename(first)
    (directory / ".other").rename(second)


def set_to(name, value):
    def change(tensors, about):
        place = next(key for key in tensors if key.endswith(name))
        tensors[place] = tensors[place].copy()
        tensors[place].ravel()[0] = value

    return change


CHANGES = {
    "layers swapped": (swap, f"{LAYERS[0]} holds what {LAYERS[1]} must hold"),
    "a layer copied": (
        lambda d: shutil.copy(d / LAYERS[0], d / LAYERS[2]),
        f"{LAYERS[2]} holds what {LAYERS[0]} must hold",
    ),
    "fewer layers": (lambda d: edit(d, "config.json", num_hidden_layers=2), "config.json has SHA"),
    "a tied head": (lambda d: edit(d, "config.json", tie_word_embeddings=False), "config.json has"),
    "another base": (lambda d: edit(d, "config.json", rope_theta=5e5), "config.json has SHA-256"),
    "another epsilon": (lambda d: edit(d, "config.json", rms_norm_eps=1e-3), "config.json has"),
    "other ends": (lambda d: edit(d, "generation_config.json", eos_token_id=3), "config.json has"),
    "another job": (
        lambda d: edit(d, "quantization.json", note=1),
        "quantization.json has SHA-256",
    ),
    "a NaN": (
        lambda d: retensor(d, set_to("layernorm.weight", np.nan)),
        f"{LAYERS[0]} has SHA-256",
    ),
    "another tokenizer": (lambda d: edit(d, "tokenizer.json", version="2"), "tokenizer.json has"),
    "no report": (lambda d: (d / "report.json").unlink(), "report.json is missing"),
    "no outside": (lambda d: (d / "outside-0.safetensors").unlink(), "ensors is missing, and SHA"),
    "no ends": (
        lambda d: (d / "generation_config.json").unlink(),
        "generation_config.json is missing, and SHA256SUMS names it",
    ),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "tokenizer.json is missing, and"),
    "no seal": (
        lambda d: (d / SUMS).unlink(),
        r"has no SHA256SUMS.* run in it: sha256sum \* >",
    ),
    "a seal of another kind": (lambda d: (d / SUMS).write_text("?"), "SHA256SUMS cannot be read"),
}
"""What is done to a directory, and what is said then."""


@pytest.mark.parametrize("name", CHANGES)
def test_a_file_that_is_not_what_was_written_is_named_with_what_it_holds(name, copy):
    change, says = CHANGES[name]
    change(copy)
    with pytest.raises(ValueError, match=says) as caught:
        read(copy)
    assert "\n" not in str(caught.value)
    # Quantizing again does not take the directory for finished either.
    job = read_job(copy)
    if name == "no seal":
        assert not writer.begin(copy, job, overwrite=False)
    else:
        with pytest.raises(ValueError, match=says):
            writer.begin(copy, job, overwrite=False)


def test_an_export_is_not_written_into_the_model(copy):
    with pytest.raises(ValueError, match="is inside the model: give another directory"):
        write_export(copy, "compressed-tensors", copy / "packed")
    assert not (copy / "packed").exists()


def one_element(tensors, about):
    tensors[NORM] = tensors[NORM][:1]


def job_of(directory):
    return json.loads((directory / "quantization.json").read_text())["job"]


def nowhere(tensors, about):
    for key in about["sites"]:
        about["sites"][key] = '{"value": 3}'


MEANT = {
    "layers swapped": (swap, "layer-00000.safetensors holds layer 1, and not 0"),
    "fewer layers": (
        lambda d: edit(d, "config.json", num_hidden_layers=2),
        "has 3 files of layers",
    ),
    "a head that is not there": (
        lambda d: edit(d, "config.json", tie_word_embeddings=False),
        "outside-.* hold .* and config.json says .*lm_head",
    ),
    "a norm of one element": (lambda d: retensor(d, one_element), r"shape \(1,\), .* says \(64,\)"),
    "NaN in a norm": (
        lambda d: retensor(d, set_to("layernorm.weight", np.nan)),
        "layernorm has NaN or Inf in 1 of 64 numbers",
    ),
    "NaN in a transform": (
        lambda d: retensor(d, set_to("attention_in/transform.links.0.scale", np.nan)),
        "attention_in has NaN or Inf in 1 of 64",
    ),
    "a scale that is NaN": (
        lambda d: retensor(d, set_to("q_proj.scales", 255)),
        "q_proj has NaN or Inf in 1 scales",
    ),
    "NaN in the embedding": (
        lambda d: retensor(d, set_to("embed_tokens.weight", np.nan), "outside-0.safetensors"),
        "embed_tokens.weight has NaN",
    ),
    "a layer of another job": (
        lambda d: retensor(d, lambda _, about: about["job"].update(seed=1)),
        "layer-00000.safetensors is of a job with seed 1, not 0",
    ),
    "no layer": (lambda d: retensor(d, lambda _, about: about.clear()), "layer-00000.* has schema"),
    "no sites": (
        lambda d: retensor(d, lambda _, about: about.pop("sites")),
        "layer-00000.* cannot be read .it lacks 'sites'",
    ),
    "no transform": (lambda d: retensor(d, nowhere), "layer-00000.* cannot be read .*structure"),
    "no linear": (
        lambda d: retensor(d, lambda tensors, _: tensors.pop("model.layers.0.mlp.up_proj.codes")),
        "layer-00000.* cannot be read .*up_proj has no codes",
    ),
    "a job of numbers": (
        lambda d: edit(d, "quantization.json", job=3),
        "quantization.json cannot be read",
    ),
    "a job without formats": (
        lambda d: edit(d, "quantization.json", job=job_of(d) | {"weight_formats": {}}),
        "quantization.json cannot be read .*weight_formats of attention_in",
    ),
    "a job whose seed is a text": (
        lambda d: edit(d, "quantization.json", job=job_of(d) | {"seed": "0"}),
        "quantization.json cannot be read .*no seed '0'",
    ),
    "brackets": (
        lambda d: (d / "quantization.json").write_text("[" * 10**5),
        "quantization.json is not JSON",
    ),
    "a report of nothing": (
        lambda d: (d / "report.json").write_text("{}"),
        "report.json cannot",
    ),
    "half a file": (
        lambda d: (d / LAYERS[2]).write_bytes((d / LAYERS[2]).read_bytes()[:4000]),
        "layer-00002.safetensors cannot be read",
    ),
    "half of what is outside": (
        lambda d: (d / "outside-0.safetensors").write_bytes(b"1234567"),
        "outside-0.safetensors cannot be read",
    ),
}
"""The same for directories whose SHA256SUMS was written anew."""


@pytest.mark.parametrize("name", MEANT)
def test_a_directory_that_does_not_fit_its_job_is_refused_though_its_hashes_are_right(name, copy):
    change, says = MEANT[name]
    change(copy)
    write_seal(copy, {})
    with pytest.raises(ValueError, match=says) as caught:
        read(copy)
    assert "\n" not in str(caught.value)


def test_any_other_bytes_are_read_or_refused_in_a_line_that_names_the_file(copy):
    """Sixty mutations of bytes that JSON is made of, where the headers are."""
    path, numbers = copy / LAYERS[0], random.Random(0)
    whole = path.read_bytes()
    refused = 0
    for _ in range(60):
        content = bytearray(whole)
        for _ in range(numbers.randint(1, 3)):
            content[numbers.randrange(5000)] = numbers.choice(b'[]{}":,0123456789nulltrue.\x00\xff')
        path.write_bytes(content)
        write_seal(copy, {})
        with contextlib.suppress(ValueError):
            Quantized(copy).layer(0)
            continue
        with pytest.raises(ValueError, match=r"^[^\n]*layer-00000[^\n]*$"):
            Quantized(copy).layer(0)
        refused += 1
    assert refused > 30


def test_the_seal_is_what_sha256sum_checks_and_hashes_a_file_once(copy, monkeypatch):
    if shutil.which("sha256sum"):
        import subprocess

        done = subprocess.run(["sha256sum", "-c", SUMS], cwd=copy, capture_output=True, check=True)
        assert done.stdout.count(b": OK") == len(list(copy.iterdir())) - 1
    read(copy)
    monkeypatch.setattr("hashlib.file_digest", None)
    read(copy)
