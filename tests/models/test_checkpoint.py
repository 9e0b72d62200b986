"""Hugging Face directories: what is written is read back, and what is wrong is said in a line."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from duquantpp_jax.models import (
    Decoder,
    DecoderConfig,
    checkpoint,
    load,
    load_tokenizer,
    save,
    sha256,
)
from tests.conftest import TINY, byte_tokenizer, tiny_decoder

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def directory(tiny_directory, tmp_path):
    """A copy of the tiny model that a test may spoil."""
    return shutil.copytree(tiny_directory, tmp_path / "model")


def rewrite(directory, **changes):
    """Changes fields of config.json; None removes one."""
    path = directory / "config.json"
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in fields.items() if v is not ...}))


def retensor(directory, **changes):
    """Changes tensors of model.safetensors; `...` removes one. Dots are written `__`."""
    path = directory / "model.safetensors"
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    tensors = load_file(path) | changes
    save_file({n: t for n, t in tensors.items() if t is not ...}, path, {"format": "pt"})


def shard(directory, parts=3):
    """Splits model.safetensors into shards with an index; returns the index's weight_map."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    files = [f"model-{i + 1:05}-of-{parts:05}.safetensors" for i in range(parts)]
    where = {name: files[i % parts] for i, name in enumerate(tensors)}
    for file in files:
        save_file({n: t for n, t in tensors.items() if where[n] == file}, directory / file)
    write_index(directory, where)
    return where


def write_index(directory, where):
    index = {"metadata": {}, "weight_map": where}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def refusal(call) -> str:
    """The message of the ValueError that `call` raises, which must be one line."""
    with pytest.raises(ValueError, match=": ") as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


def equal(one, other) -> bool:
    return one.config == other.config and jax.tree.all(jax.tree.map(np.array_equal, one, other))


# What is written is read back.


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_what_is_saved_is_loaded_rounded_to_bfloat16(tied, tmp_path):
    model = tiny_decoder(tie_word_embeddings=tied, eos_token_id=(3, 5), rope_theta=5e5)
    save(model, byte_tokenizer().to_str(), tmp_path / "new" / "model")
    loaded = load(tmp_path / "new" / "model")
    assert loaded.config == model.config
    for name, array in loaded.parameters().items():
        wanted = np.asarray(model.parameters()[name]).astype(ml_dtypes.bfloat16)
        assert array.dtype == jnp.float32
        np.testing.assert_array_equal(array, wanted.astype(np.float32))
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


# config.json.

CONFIGS = {
    "another architecture": (
        {"architectures": ["GPT2LMHeadModel"]},
        ["GPT2LMHeadModel", "use LlamaForCausalLM"],
    ),
    "experts": (
        {"architectures": ["MixtralForCausalLM"]},
        ["MixtralForCausalLM", "a mixture of experts", "use LlamaForCausalLM"],
    ),
    "more experts": (
        {"architectures": ["Qwen3MoeForCausalLM"]},
        ["Qwen3MoeForCausalLM", "a mixture of experts"],
    ),
    "Gemma": ({"architectures": ["Gemma2ForCausalLM"]}, ["Gemma2ForCausalLM", "softcapping"]),
    "no architecture": ({"architectures": ...}, ["architectures", "LlamaForCausalLM"]),
    "two architectures": ({"architectures": ["A", "B"]}, ["architectures"]),
    "unknown rope scaling": (
        {"rope_scaling": {"type": "dynamic", "factor": 8.0}},
        ["rope_scaling 'dynamic'", "linear, llama3, yarn"],
    ),
    "rope scaling as transformers 5 writes it": (
        {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e6}},
        ["rope_scaling 'longrope'", "llama3"],
    ),
    "rope scaling of another type": ({"rope_scaling": "yarn"}, ["rope_scaling 'yarn'"]),
    "rope scaling without a factor": (
        {"rope_scaling": {"rope_type": "linear"}},
        ["factor is missing"],
    ),
    "rope scaling with more than is known": (
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7}},
        ["mscale = 0.7", "beta_fast"],
    ),
    "rope scaling out of order": (
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 4.0,
                "high_freq_factor": 1.0,
            }
        },
        ["low_freq_factor 4.0", "high_freq_factor 1.0"],
    ),
    "rope_parameters of another type": ({"rope_parameters": [1]}, ["rope_parameters"]),
    "partial rotary in rope_parameters": (
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        ["partial_rotary_factor = 0.5", "1.0"],
    ),
    "biases that are missing": ({"attention_bias": True}, ["self_attn.q_proj.bias is missing"]),
    "bias of another type": ({"mlp_bias": 1}, ["mlp_bias = 1", "true or false"]),
    "a bias that a family lacks": (
        {"architectures": ["MistralForCausalLM"], "mlp_bias": True},
        ["mlp_bias = True", "MistralForCausalLM", "must be false"],
    ),
    "layers of unknown attention": (
        {"architectures": ["Qwen2ForCausalLM"], "layer_types": ["full_attention", "linear"]},
        ["layer_types", "'linear'", "sliding_attention"],
    ),
    "a sliding layer without a window": (
        {"architectures": ["Qwen3ForCausalLM"], "layer_types": 2 * ["sliding_attention"]},
        ["layer_types", "use_sliding_window"],
    ),
    "too few layer types": (
        {"architectures": ["Qwen3ForCausalLM"], "layer_types": ["full_attention"]},
        ["layer_types", "2 layers"],
    ),
    "a window of nothing": (
        {"architectures": ["MistralForCausalLM"], "sliding_window": 0},
        ["sliding_window = 0", "above 0"],
    ),
    "another activation": ({"hidden_act": "gelu"}, ["hidden_act = 'gelu'", "silu"]),
    "partial rotary": ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "1.0"]),
    "already quantized": (
        {"quantization_config": {"quant_method": "gptq"}},
        ["quantization_config", "already quantized", "float"],
    ),
    "missing": ({"hidden_size": ...}, ["hidden_size is missing"]),
    "misspelt": ({"hidden_size": ..., "hiden_size": 64}, ["hidden_size is missing", "hiden_size"]),
    "text": ({"hidden_size": "64"}, ["hidden_size = '64'", "integer"]),
    "a truth value": ({"vocab_size": True}, ["vocab_size = True", "integer"]),
    "a fraction": ({"num_hidden_layers": 1.5}, ["num_hidden_layers = 1.5"]),
    "zero": ({"num_attention_heads": 0}, ["num_attention_heads = 0", "above 0"]),
    "too large": ({"vocab_size": 2**40}, ["vocab_size", "below 2147483648"]),
    "endless": ({"num_hidden_layers": 2**30}, ["num_hidden_layers", "below 10000"]),
    "negative": ({"rms_norm_eps": -1e-5}, ["rms_norm_eps = -1e-05"]),
    "no epsilon": ({"rms_norm_eps": ...}, ["rms_norm_eps is missing"]),
    "not finite": ({"rope_theta": float("inf")}, ["rope_theta = inf", "finite"]),
    "tied by a number": ({"tie_word_embeddings": 1}, ["tie_word_embeddings", "true or false"]),
    "key heads that do not divide": ({"num_key_value_heads": 3}, ["num_key_value_heads 3"]),
    "odd heads": ({"head_dim": 15}, ["head_dim 15", "even"]),
    "heads that do not divide": (
        {"head_dim": ..., "num_attention_heads": 6, "num_key_value_heads": 2},
        ["hidden_size 64", "num_attention_heads 6"],
    ),
    "token beyond the vocabulary": ({"bos_token_id": 257}, ["bos_token_id = 257", "257"]),
    "end token of another type": ({"eos_token_id": [1, "2"]}, ["eos_token_id = '2'"]),
}


@pytest.mark.parametrize(("changes", "words"), CONFIGS.values(), ids=CONFIGS)
def test_an_unsupported_or_wrong_config_is_refused_by_name(directory, changes, words):
    rewrite(directory, **changes)
    message = refusal(lambda: load(directory))
    assert str(directory) in message
    for word in words:
        assert word in message


def test_the_defaults_of_the_format_are_used_for_fields_that_older_files_lack():
    fields = TINY.to_dict()
    for name in ("rope_theta", "num_key_value_heads", "head_dim", "attention_bias", "bos_token_id"):
        del fields[name]
    config = DecoderConfig.from_dict(fields | {"rope_scaling": {"type": "default"}})
    assert (config.rope_theta, config.num_key_value_heads, config.head_dim) == (10000.0, 4, 16)


def test_rope_theta_is_found_where_transformers_5_puts_it():
    fields = TINY.to_dict() | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    del fields["rope_theta"]
    assert DecoderConfig.from_dict(fields).rope_theta == 5e5


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[1]", b"null", b"[" * 100_000])
def test_a_config_that_is_no_json_object_is_refused(directory, content):
    (directory / "config.json").write_bytes(content)
    assert "config.json" in refusal(lambda: load(directory))


def test_a_directory_without_config_is_refused(tmp_path):
    assert "has no config.json" in refusal(lambda: load(tmp_path))
    assert "is not a directory" in refusal(lambda: load(tmp_path / "absent"))
    assert "has no config.json" in refusal(lambda: sha256(tmp_path))


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


# The tokenizer.


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
        return -jnp.mean(jnp.take_along_axis(logits, rows[:, 1:, None], axis=-1))

    assert rows.shape == (16, 512)
    assert np.exp(nll(model, rows)) == pytest.approx(23.726, abs=0.005)
