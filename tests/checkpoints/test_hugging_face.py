"""Hugging Face directories: what is written is read back, and what is wrong is said in a line."""

import json
import re
import shutil
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from duquantpp_jax.checkpoints import hugging_face as checkpoint
from duquantpp_jax.checkpoints import load, load_tokenizer, save, sha256
from duquantpp_jax.models import Decoder
from tests.checkpoints.spoiling import refusal, retensor, rewrite, shard, write_index
from tests.conftest import byte_tokenizer, tiny_decoder

UP = "model.layers.1.mlp.up_proj.weight"


def equal(model, other) -> bool:
    return model.config == other.config and jax.tree.all(jax.tree.map(np.array_equal, model, other))


# What is written is read back.


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_what_is_saved_is_loaded_rounded_to_bfloat16(tied, tmp_path):
    model = tiny_decoder(tie_word_embeddings=tied, eos_token_id=(3, 5), rope_theta=5e5)
    save(model, byte_tokenizer().to_str(), tmp_path / "new" / "model")
    loaded = load(tmp_path / "new" / "model")
    assert loaded.config == model.config
    for name, array in loaded.parameters().items():
        wanted = np.asarray(model.parameters()[name]).astype(ml_dtypes.bfloat16)
        assert array.dtype == jnp.bfloat16
        np.testing.assert_array_equal(array, wanted)
    tokenizer = load_tokenizer(tmp_path / "new" / "model")
    assert tokenizer.to_str() == byte_tokenizer().to_str()
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["model"]


def test_shards_with_an_index_and_one_file_are_the_same_model(directory, tiny_directory):
    shard(directory)
    assert equal(load(directory), load(tiny_directory))


@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_float32_and_float16_are_read_exactly(directory, kind):
    tensor = np.random.default_rng(0).normal(size=(96, 64)).astype(kind)
    retensor(directory, **{UP: tensor})
    up = load(directory).parameters()["model.layers.*.mlp.up_proj"]
    assert up.dtype == np.float32  # that of the other layer is bfloat16
    np.testing.assert_array_equal(up[1], tensor.astype(np.float32))


def test_every_tensor_lands_in_its_own_layer(directory):
    tensors = load_file(directory / "model.safetensors")
    parameters = load(directory).parameters()
    for name, tensor in tensors.items():
        key = re.sub(r"layers\.(\d+)", "layers.*", name).removesuffix(".weight")
        layer = re.search(r"layers\.(\d+)", name)
        got = parameters[key][int(layer[1])] if layer else parameters[key]
        np.testing.assert_array_equal(got, tensor.astype(np.float32))


def test_stored_rotary_frequencies_and_a_tied_head_do_no_harm(directory, tiny_directory):
    head = load_file(directory / "model.safetensors")["model.embed_tokens.weight"]
    frequency = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}
    retensor(directory, lm_head__weight=head, **frequency)
    assert equal(load(directory), load(tiny_directory))


def test_a_snapshot_of_the_hub_cache_may_link_to_its_blobs(tiny_directory, tmp_path):
    snapshot = shutil.copytree(tiny_directory, tmp_path / "snapshots" / "abc")
    where = shard(snapshot)
    (tmp_path / "blobs").mkdir()
    for i, file in enumerate(sorted(set(where.values()))):
        (snapshot / file).rename(tmp_path / "blobs" / f"{i}")
        (snapshot / file).symlink_to(f"../../blobs/{i}")
    assert equal(load(snapshot), load(tiny_directory))


def test_a_save_that_breaks_leaves_nothing(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(checkpoint, "serialize", full)
    with pytest.raises(OSError, match="no space"):
        save(tiny_decoder(), "{}", tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_saving_over_something_is_refused(directory):
    assert "already exists" in refusal(lambda: save(tiny_decoder(), "{}", directory))


def test_the_hash_is_of_the_bytes_and_not_of_the_place(directory, tiny_directory):
    assert sha256(directory) == sha256(tiny_directory)
    path = directory / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert sha256(directory) != sha256(tiny_directory)
    assert re.fullmatch("[0-9a-f]{64}", sha256(directory))


# Shards and their index.


def test_a_directory_without_weights_is_refused(directory):
    (directory / "model.safetensors").unlink()
    assert "has no model.safetensors" in refusal(lambda: load(directory))


def test_a_missing_shard_is_named(directory):
    file = shard(directory)[UP]
    (directory / file).unlink()
    assert f"shard {file!r} is missing" in refusal(lambda: load(directory))


@pytest.mark.parametrize("keep", [0, 4, 100, -1], ids=["empty", "length", "header", "data"])
def test_a_truncated_shard_is_named(directory, keep):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    message = refusal(lambda: load(directory))
    assert str(path) in message
    assert "truncated" in message


@pytest.mark.parametrize("link", [False, True], ids=["path", "link"])
@pytest.mark.parametrize("kind", ["parent", "absolute", "below"])
def test_an_index_that_names_a_file_outside_the_directory_is_refused(directory, kind, link):
    where = shard(directory, 1)
    outside = directory.parent / "outside"
    outside.mkdir()
    (directory / where[UP]).rename(outside / "x.safetensors")
    name = {
        "parent": "../outside/x.safetensors",
        "absolute": str(outside / "x.safetensors"),
        "below": "here/x.safetensors",
    }[kind]
    if kind == "below":
        (directory / "here").symlink_to(outside)
    elif link:
        (directory / "link.safetensors").symlink_to(name)
        name = "link.safetensors"
    write_index(directory, dict.fromkeys(where, name))
    for call in (load, sha256):
        message = refusal(lambda call=call: call(directory))
        assert f"{name!r}, which is outside the directory" in message


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": [1]}'])
def test_an_index_that_is_none_is_refused(directory, content):
    shard(directory)
    (directory / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json" in refusal(lambda: load(directory))


def test_an_index_and_shards_that_disagree_are_refused(directory):
    where = shard(directory)
    write_index(directory, {name: file for name, file in where.items() if name != UP})
    assert f"tensor {UP!r} is in {where[UP]} but not in" in refusal(lambda: load(directory))
    write_index(directory, where | {"extra": where[UP]})
    assert "tensor 'extra' is in model.safetensors.index.json" in refusal(lambda: load(directory))


# Tensors.

TENSORS = {
    "missing": ({UP: ...}, [f"tensor {UP} is missing", "[96, 64]"]),
    "no norm": ({"model.norm.weight": ...}, ["model.norm.weight is missing", "[64]"]),
    "unknown": ({"model.vision.weight": np.zeros(3)}, ["'model.vision.weight' has no place"]),
    "two lines": ({"a\nb": np.zeros(3, np.float32)}, ["has no place"]),
    "a bias": (
        {"model.layers.0.self_attn.q_proj.bias": np.zeros(64, np.float32)},
        ["q_proj.bias' has no place"],
    ),
    "a layer too many": (
        {"model.layers.2.mlp.up_proj.weight": np.zeros((96, 64), np.float32)},
        ["layers.2.mlp.up_proj.weight' has no place", "2 layers"],
    ),
    "transposed": ({UP: np.zeros((64, 96), np.float32)}, [UP, "[64, 96]", "asks for [96, 64]"]),
    "flat": ({UP: np.zeros(96 * 64, np.float32)}, [UP, "[6144]", "[96, 64]"]),
    "integers": ({UP: np.zeros((96, 64), np.int8)}, [UP, "I8", "BF16, F16, F32"]),
    "doubles": ({UP: np.zeros((96, 64), np.float64)}, [UP, "F64", "BF16, F16, F32"]),
    "NaN": ({UP: np.full((96, 64), np.nan, np.float16)}, [UP, "has NaN", "finite"]),
    "Inf": ({UP: np.full((96, 64), -np.inf, np.float32)}, [UP, "has Inf", "finite"]),
    "a tied head of its own": (
        {"lm_head.weight": np.zeros((257, 64), np.float32)},
        ["lm_head.weight differs", "tie_word_embeddings"],
    ),
}


@pytest.mark.parametrize(("changes", "words"), TENSORS.values(), ids=TENSORS)
def test_a_wrong_tensor_is_refused_by_name(directory, changes, words):
    retensor(directory, **changes)
    message = refusal(lambda: load(directory))
    for word in words:
        assert word in message


def test_one_nan_among_all_weights_is_found(directory):
    tensor = load_file(directory / "model.safetensors")[UP]
    tensor[95, 63] = np.nan
    retensor(directory, **{UP: tensor})
    assert f"tensor {UP}" in refusal(lambda: load(directory))


def test_a_config_of_a_huge_model_is_refused_before_memory_is_taken(directory):
    rewrite(directory, hidden_size=2**30, vocab_size=2**30)
    assert "asks for" in refusal(lambda: load(directory))


# What transformers honours.


@pytest.mark.parametrize("ends", [7, [7, 9]])
def test_ends_of_sequence_are_those_of_generation_config(ends, directory):
    rewrite(directory, eos_token_id=3)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    assert load(directory).config.eos_token_id == (tuple(ends) if ends != 7 else 7)
    (directory / "generation_config.json").write_text("{}")
    assert load(directory).config.eos_token_id == 3


def test_a_tied_head_alone_is_the_embedding(directory, tiny_directory):
    head = load_file(directory / "model.safetensors")["model.embed_tokens.weight"]
    retensor(directory, model__embed_tokens__weight=..., lm_head__weight=head)
    assert equal(load(directory), load(tiny_directory))


@pytest.mark.parametrize("prefix", ["", "base_model.model.model.", "model.language_model."])
def test_another_prefix_is_named(prefix, directory):
    tensors = load_file(directory / "model.safetensors")
    renamed = {prefix + name.removeprefix("model."): array for name, array in tensors.items()}
    retensor(directory, **dict.fromkeys(tensors, ...), **renamed)
    assert f"(found {prefix}embed_tokens.weight)" in refusal(lambda: load(directory))


# The tokenizer.


def test_padding_and_truncation_of_a_tokenizer_file_are_not_for_text(directory):
    tokenizer = byte_tokenizer()
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(pad_id=0)
    tokenizer.save(str(directory / "tokenizer.json"))
    long, short = load_tokenizer(directory).encode_batch(["a" * 9, "b"])
    assert (len(long.ids), len(short.ids)) == (9, 1)


def test_a_missing_or_broken_tokenizer_is_refused(directory):
    (directory / "tokenizer.json").write_text("{}")
    assert "is not a tokenizer" in refusal(lambda: load_tokenizer(directory))
    (directory / "tokenizer.json").unlink()
    assert "has no tokenizer.json" in refusal(lambda: load_tokenizer(directory))


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(directory):
    rewrite(directory, vocab_size=256, bos_token_id=0)
    message = refusal(lambda: load_tokenizer(directory))
    assert "token 256" in message
    assert "vocab_size 256" in message


# A real checkpoint.


@pytest.mark.slow
def test_gutenberg_27m_has_its_known_perplexity(data):
    """The first 16 rows of 128, whose perplexity is 24.545 in three implementations."""
    place = data / "models" / "gutenberg-27m"
    model, tokenizer = load(place), load_tokenizer(place)
    text = (data / "text" / "gutenberg_valid.txt").read_bytes().decode()
    first = [tokenizer.encode(book).ids[:511] for book in text.split("<|endoftext|>")]
    rows = jnp.asarray([[0, *row] for row in first], jnp.int32)

    @jax.jit
    def nll(model: Decoder, rows):
        logits = jax.nn.log_softmax(model(rows)[0][:, :-1])
        return -jnp.mean(jnp.take_along_axis(logits, rows[:, 1:, None], axis=-1), axis=(1, 2))

    losses = np.asarray(nll(model, rows), np.float64)
    assert losses.shape == (16,)
    assert np.exp(losses.mean()) == pytest.approx(23.726, abs=0.005)
    assert np.exp(losses[:4].mean()) == pytest.approx(24.510, abs=0.005)  # for test_evaluate.py


# Chat templates.

TEMPLATE = """{%- for m in messages %}
  {%- if m.role not in ['user'] %}{{ raise_exception('no ' + m.role) }}{% endif %}
  {%- generation %}
  {{- bos_token ~ pad_token + '<' + m.role + '>' + m.content | trim + eos_token }}
  {%- endgeneration %}
  {%- continue %}
{%- endfor %}
{% if add_generation_prompt and tools is none %}
<answer>{{ {"é": documents} | tojson }}
{% endif %}"""
WRITTEN = '<s><user>a "b"</s><answer>{"é": null}\n'
"""What transformers 5.24 makes of it."""
BASE = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, "pad_token": None}


@pytest.mark.parametrize("place", ["config", "several", "file"])
def test_a_message_is_written_as_transformers_writes_it(place, directory):
    given = {"config": TEMPLATE, "several": [{"name": "default", "template": TEMPLATE}]}
    fields = BASE | {"chat_template": given.get(place, "another")}
    (directory / "tokenizer_config.json").write_text(json.dumps(fields))
    if place == "file":
        (directory / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    assert checkpoint.chat_prompt(directory, ' a "b"\n') == WRITTEN


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (None, "no chat_template.jinja, and no chat_template in tokenizer_config.json"),
        ("{{ raise_exception('no\nsystem') }}", r"\(no system\): give plain text"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% for %}", "no chat template that works"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("\ud800", "surrogates not allowed"),
    ],
)
def test_a_template_that_does_not_work_is_refused_in_a_line(template, says, directory):
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    with pytest.raises(ValueError, match=says) as found:
        checkpoint.chat_prompt(directory, "a")
    assert "\n" not in str(found.value)


def test_a_chat_without_jinja_names_the_extra(directory, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2.sandbox", None)
    with pytest.raises(ValueError, match=r"pip install 'duquantpp_jax\[chat\]'"):
        checkpoint.chat_prompt(directory, "a")
