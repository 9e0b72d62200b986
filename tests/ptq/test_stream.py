"""Rotations of the residual stream and of value heads leave the float function as it is."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duquantpp_jax.checkpoints import load
from duquantpp_jax.checkpoints.lazy import Checkpoint
from duquantpp_jax.models import Decoder, DecoderConfig
from duquantpp_jax.models.parameters import input_norms
from duquantpp_jax.ptq.stream import Turn, rotation
from tests.goldens import families
from tests.models.test_families import directory_of, golden

TURNS = [
    Turn("hadamard"),
    Turn(values="random_hadamard", seed=1),
    Turn("random_orthogonal", "hadamard", 2),
    Turn("random_hadamard", "random_orthogonal", 3),
]
RUN = jax.jit(lambda model, tokens: model(tokens)[0])


def parameters_of(name):
    """The parameters of a family's case in float64, and its configuration."""
    shapes = {n: tuple(s) for n, s in json.loads(str(golden()[f"{name}: shapes"]))}
    arrays = families.weights(shapes)
    return {n.removesuffix(".weight"): a.astype(np.float64) for n, a in arrays.items()}, (
        DecoderConfig.from_dict(families.CASES[name])
    )


def layer_of(parameters, number):
    prefix = f"model.layers.{number}."
    return {n.removeprefix(prefix): a for n, a in parameters.items() if n.startswith(prefix)}


def turned(turn, config, parameters):
    """The turned model by the names of the given one."""
    outside = {n: a for n, a in parameters.items() if ".layers." not in n}
    embedding, norm = outside["model.embed_tokens"], outside["model.norm"]
    plain = np.full_like(norm, 1 - config.norm_offset)
    made = {"model.embed_tokens": turn.outside(config, embedding),
            "lm_head": turn.outside(config, outside.get("lm_head", embedding), norm),
            "model.norm": norm if turn.stream is None else plain}  # fmt: skip
    for number in range(config.num_hidden_layers):
        layer = turn.layer(config, number, layer_of(parameters, number))
        made |= {f"model.layers.{number}.{n}": a for n, a in layer.items()}
    return made


def logits(config, parameters, tokens):
    """The decoder in float64, but for positions and windows, which move queries and keys alone."""
    side, groups = config.head_dim, config.num_key_value_heads

    def norm(x, weight):
        gain = weight + config.norm_offset
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.rms_norm_eps) * gain

    def added(y, w, name):
        return norm(y, w[name]) if config.post_norms else y

    def linear(x, w, name):
        return x @ w[name].T + w.get(f"{name}.bias", 0.0)

    before = input_norms(config)
    x = parameters["model.embed_tokens"][tokens] * config.embedding_scale
    mask = np.where(np.tri(len(tokens), dtype=bool), 0.0, -np.inf)
    for number in range(config.num_hidden_layers):
        w = layer_of(parameters, number)
        n = norm(x, w[before["attention_in"]])
        q, k, v = (linear(n, w, f"self_attn.{i}_proj").reshape(len(x), -1, side) for i in "qkv")
        if config.qk_norm:
            q, k = norm(q, w["self_attn.q_norm"]), norm(k, w["self_attn.k_norm"])
        q = q.reshape(len(x), groups, -1, side)
        scores = (
            np.einsum("tgid,sgd->gits", q, k) / np.sqrt(config.query_pre_attn_scalar or side) + mask
        )
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        mixed = np.einsum("gits,sgd->tgid", weights, v).reshape(len(x), -1)
        x = x + added(linear(mixed, w, "self_attn.o_proj"), w, "post_attention_layernorm")
        n = norm(x, w[before["mlp_in"]])
        gate = linear(n, w, "mlp.gate_proj")
        slope = 2 * np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)  # GELU by tanh
        slope = gate if config.activation == "silu" else slope
        hidden = gate / (1 + np.exp(-slope)) * linear(n, w, "mlp.up_proj")
        x = x + added(linear(hidden, w, "mlp.down_proj"), w, "post_feedforward_layernorm")
    head = parameters.get("lm_head", parameters["model.embed_tokens"])
    return norm(x, parameters["model.norm"]) @ head.T


def error(got, wanted):
    return np.max(np.abs(np.asarray(got, np.float64) - wanted)) / np.max(np.abs(wanted))


@pytest.mark.parametrize("name", [n for n, c in families.CASES.items() if "experts" not in str(c)])
def test_the_float_function_of_every_dense_family_is_unchanged_in_float64(name):
    parameters, config = parameters_of(name)
    (tokens,) = families.tokens()
    for turn in TURNS:
        if turn.stream is not None and config.post_norms:
            with pytest.raises(
                ValueError, match="Gemma3ForCausalLM cannot be rotated: norms after"
            ):
                turn.config(config)
            config = dataclasses.replace(config, post_norms=False)
        wanted = logits(config, parameters, tokens)
        made = turned(turn, config, parameters)
        assert all(a.dtype == np.float64 for a in made.values())
        assert error(logits(config, made, tokens), wanted) < 1e-12
        down, value = (f"model.layers.1.{n}" for n in ("mlp.down_proj", "self_attn.v_proj.bias"))
        assert (turn.stream is None) == np.array_equal(made[down], parameters[down])
        if value in made:
            assert (turn.values is None) == np.array_equal(made[value], parameters[value])


def test_values_of_a_mixture_are_turned_and_its_stream_is_not(tmp_path):
    directory = directory_of("gpt-oss", families.CASES["gpt-oss"], tmp_path / "model")
    tokens = jnp.asarray(families.tokens())
    run = jax.jit(lambda model: model(tokens)[0])
    model = Checkpoint(directory, Turn(values="hadamard")).decoder()
    assert error(run(model), np.asarray(run(load(directory)), np.float64)) < 1e-5
    with pytest.raises(ValueError, match="routers read it too"):
        Checkpoint(directory, Turn(stream="hadamard"))


@pytest.mark.parametrize("name", ["llama with biases", "qwen 3, windows and biases",
                                  "llama 3, tied, one key head"])  # fmt: skip
def test_a_checkpoint_is_turned_as_it_is_read(name, tmp_path):
    directory = directory_of(name, families.CASES[name], tmp_path / "model")
    float_model, tokens = load(directory), jnp.asarray(families.tokens())
    checkpoint = Checkpoint(directory, TURNS[-1])
    model = checkpoint.decoder()
    assert not model.config.tie_word_embeddings
    assert error(RUN(model, tokens), RUN(float_model, tokens)) < 1e-5
    np.testing.assert_array_equal(model.layers["input_layernorm"][...], 1.0)
    embedded = checkpoint.embed(np.asarray(tokens))
    np.testing.assert_array_equal(embedded, model.embedding[...][tokens])
    plain = Checkpoint(directory).decoder()
    assert isinstance(plain, Decoder)
    for key, array in float_model.parameters().items():
        np.testing.assert_array_equal(plain.parameters()[key], array)


@pytest.mark.parametrize("name", ["hadamard", "random_hadamard", "random_orthogonal"])
@pytest.mark.parametrize("size", [1, 12, 48, 576])
def test_rotations_are_orthogonal_and_hadamards_spread_every_channel_evenly(name, size):
    matrix = rotation(name, size, 5)(np.eye(size))
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=1e-12)
    if name != "random_orthogonal":
        np.testing.assert_allclose(np.abs(matrix), size**-0.5, rtol=1e-12)
    again, other, there = (
        rotation(name, size, *place)(np.eye(size)) for place in ((5,), (6,), (5, 1))
    )
    np.testing.assert_array_equal(again, matrix)
    if size > 1 and name != "hadamard":
        assert np.any(other != matrix)
        assert np.any(there != matrix)


def test_a_size_without_a_hadamard_matrix_names_what_has_it(tmp_path):
    config = {**families.CASES["llama 2"], "hidden_size": 46, "head_dim": 12}
    with pytest.raises(ValueError, match=r"side 46 .* random_orthogonal has every side"):
        Turn("hadamard").config(DecoderConfig.from_dict(config))
    with pytest.raises(ValueError, match="unknown rotation 'hadamrd'"):
        Turn("hadamrd")


def test_turned_tensors_keep_the_type_of_the_checkpoint():
    parameters, config = parameters_of("llama with biases")
    layer = {n: a.astype(jnp.bfloat16) for n, a in layer_of(parameters, 0).items()}
    made = Turn("hadamard", "hadamard").layer(config, 0, layer)
    assert {a.dtype for a in made.values()} == {jnp.dtype(jnp.bfloat16)}
    exact = Turn("hadamard", "hadamard").layer(
        config, 0, {n: a.astype(np.float64) for n, a in layer.items()}
    )
    for name, array in made.items():  # rounded once, however many products
        np.testing.assert_array_equal(array, exact[name].astype(jnp.bfloat16))
