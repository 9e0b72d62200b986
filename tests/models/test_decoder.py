"""The decoder against its equations in float64 NumPy, and what a `linear` may rely on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from duquantpp_jax.models import (
    SITE_WEIGHTS,
    SITES,
    Decoder,
    DecoderConfig,
    dense,
    linear_names,
    parameter_shapes,
)
from duquantpp_jax.models.attention import product

HEADS = {"grouped": (4, 2), "one key head": (4, 1), "as many key heads": (2, 2)}


def a_config(heads=4, kv_heads=2, tied=True, layers=3) -> DecoderConfig:
    return DecoderConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=8,
        vocab_size=50,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
    )


def a_model(config: DecoderConfig, **options) -> Decoder:
    """Random weights and gains, so large that every term of the equations shows."""
    rng = np.random.default_rng(0)
    return Decoder(
        config,
        {
            name: jnp.asarray(
                rng.normal(size=shape) / shape[-1] ** 0.5 + name.endswith("norm")
            ).astype(jnp.float32)
            for name, shape in parameter_shapes(config).items()
        },
        **options,
    )


def some_tokens(rows=2, length=9, seed=1):
    return np.random.default_rng(seed).integers(0, 50, (rows, length))


def numpy_llama(model: Decoder, tokens: np.ndarray):
    """Logits and every site's inputs of one row, position by position and head by head."""
    config = model.config
    p = {name: np.asarray(a, np.float64) for name, a in model.parameters().items()}
    d, group = config.head_dim, config.num_attention_heads // config.num_key_value_heads

    def norm(x, gain):
        return x / np.sqrt((x**2).mean() + config.rms_norm_eps) * gain

    def rotate(x, position):
        out = np.empty(d)
        for i in range(d // 2):
            angle = position * config.rope_theta ** (-2 * i / d)
            a, b = x[i], x[i + d // 2]
            out[i] = a * np.cos(angle) - b * np.sin(angle)
            out[i + d // 2] = b * np.cos(angle) + a * np.sin(angle)
        return out

    inputs = {site: [] for site in SITES}
    xs = [p["model.embed_tokens"][t] for t in tokens]
    for layer in range(config.num_hidden_layers):
        w = {n.removeprefix("model.layers.*."): a[layer] for n, a in p.items() if "*" in n}
        normed = [norm(x, w["input_layernorm"]) for x in xs]
        qs = [(w["self_attn.q_proj"] @ n).reshape(-1, d) for n in normed]
        ks = [(w["self_attn.k_proj"] @ n).reshape(-1, d) for n in normed]
        vs = [(w["self_attn.v_proj"] @ n).reshape(-1, d) for n in normed]
        mixed = []
        for t, q in enumerate(qs):
            heads = []
            for h in range(config.num_attention_heads):
                scores = [
                    rotate(q[h], t) @ rotate(ks[s][h // group], s) / np.sqrt(d)
                    for s in range(t + 1)
                ]
                weights = np.exp(scores) / np.exp(scores).sum()
                heads.append(sum(a * vs[s][h // group] for s, a in enumerate(weights)))
            mixed.append(np.concatenate(heads))
        xs = [x + w["self_attn.o_proj"] @ m for x, m in zip(xs, mixed, strict=True)]
        after = [norm(x, w["post_attention_layernorm"]) for x in xs]
        gates = [w["mlp.gate_proj"] @ n for n in after]
        hidden = [
            g / (1 + np.exp(-g)) * (w["mlp.up_proj"] @ n) for g, n in zip(gates, after, strict=True)
        ]
        xs = [x + w["mlp.down_proj"] @ h for x, h in zip(xs, hidden, strict=True)]
        for site, x in zip(SITES, (normed, mixed, after, hidden), strict=True):
            inputs[site].append(np.stack(x))
    head = p["model.embed_tokens" if config.tie_word_embeddings else "lm_head"]
    logits = np.stack([head @ norm(x, p["model.norm"]) for x in xs])
    return logits, {site: np.stack(x) for site, x in inputs.items()}


def error(got, wanted) -> float:
    return float(np.max(np.abs(np.asarray(got, np.float64) - wanted)) / np.max(np.abs(wanted)))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_logits_are_those_of_the_equations_in_float64(heads, tied):
    model, tokens = a_model(a_config(*heads, tied)), some_tokens()
    logits, _ = jax.jit(Decoder.__call__)(model, jnp.asarray(tokens))
    assert logits.dtype == jnp.float32
    for row, got in zip(tokens, logits, strict=True):
        assert error(got, numpy_llama(model, row)[0]) < 3e-6


def test_a_linear_sees_the_inputs_that_the_equations_give_each_site():
    model, tokens = a_model(a_config()), some_tokens()

    def recording(site, x, weights, state):
        return dense(site, x, weights, state)[0], x

    _, seen = jax.jit(lambda m, t: m(t, recording))(model, jnp.asarray(tokens))
    assert tuple(seen) == SITES
    for row, sequence in enumerate(tokens):
        for site, wanted in numpy_llama(model, sequence)[1].items():
            assert error(seen[site][:, row], wanted) < 3e-6


def test_a_linear_is_called_once_a_site_in_order_with_the_weights_in_order():
    model, calls = a_model(a_config()), []

    def giving_weights(site, x, weights, state):
        calls.append((site, state))
        return dense(site, x, weights, state)[0], weights

    _, out = jax.jit(lambda m, t: m(t, giving_weights))(model, jnp.asarray(some_tokens()))
    assert calls == [(site, None) for site in SITES]  # one trace: the layers share one body
    for site in SITES:
        for got, stored, name in zip(
            out[site], model.weights(site), linear_names(site, 2), strict=True
        ):
            np.testing.assert_array_equal(got, stored)
            np.testing.assert_array_equal(
                stored[2], model.parameters()[name.replace(".2.", ".*.")][2]
            )


def test_state_is_sliced_by_layer_and_outs_are_stacked():
    model, layers = a_model(a_config()), 3
    factor = jnp.asarray([[0.5, 2.0], [1.0, -1.0], [3.0, 0.25]], jnp.float32)

    def scaling(site, x, weights, state):
        ys, _ = dense(site, x, weights, None)
        if site != "mlp_in":
            assert state is None
            return ys, None
        return (ys[0] * state["by"][0], ys[1] * state["by"][1]), {"twice": 2 * state["by"]}

    logits, out = jax.jit(lambda m, t, s: m(t, scaling, s))(
        model, jnp.asarray(some_tokens()), {"mlp_in": {"by": factor}}
    )
    np.testing.assert_array_equal(out["mlp_in"]["twice"], 2 * factor)
    assert out["mlp_out"] is None
    parameters = model.parameters()
    for i, name in enumerate(SITE_WEIGHTS["mlp_in"]):
        key = f"model.layers.*.{name}"
        parameters[key] = parameters[key] * factor[:, i].reshape(layers, 1, 1)
    wanted, _ = Decoder(model.config, parameters)(jnp.asarray(some_tokens()))
    assert error(logits, np.asarray(wanted)) < 1e-6


def test_state_for_an_unknown_site_is_refused():
    with pytest.raises(ValueError, match=r"'mlp'.*attention_in"):
        a_model(a_config())(jnp.asarray(some_tokens()), dense, {"mlp": None})


def test_a_later_token_and_another_row_leave_logits_alone():
    model, forward = a_model(a_config()), jax.jit(Decoder.__call__)
    tokens = some_tokens()
    changed = tokens.copy()
    changed[0, 5] = (changed[0, 5] + 1) % 50
    before, after = (forward(model, jnp.asarray(t))[0] for t in (tokens, changed))
    np.testing.assert_array_equal(before[0, :5], after[0, :5])
    np.testing.assert_array_equal(before[1], after[1])
    assert (jnp.abs(before[0, 5:] - after[0, 5:]).max(axis=-1) > 1e-3).all()


@pytest.mark.parametrize("kind", [np.uint16, np.int32])
def test_any_integer_tokens_do(kind):
    model, tokens = a_model(a_config()), some_tokens()
    wanted = model(jnp.asarray(tokens))[0]
    np.testing.assert_array_equal(model(jnp.asarray(tokens.astype(kind)))[0], wanted)


@pytest.mark.slow
def test_the_gradient_is_the_slope_along_every_parameter():
    graph, state = nnx.split(a_model(a_config(tied=False)))
    tokens = jnp.asarray(some_tokens())

    @jax.jit
    def loss(state):
        logits = jax.nn.log_softmax(nnx.merge(graph, state)(tokens)[0])
        return -jnp.mean(jnp.take_along_axis(logits[:, :-1], tokens[:, 1:, None], axis=-1))

    leaves, tree = jax.tree.flatten(state)
    gradient = [np.asarray(g) for g in jax.tree.leaves(jax.jit(jax.grad(loss))(state))]
    for i, slope in enumerate(gradient):
        norm = np.linalg.norm(slope)
        ends = [
            float(loss(jax.tree.unflatten(tree, [*leaves[:i], leaf, *leaves[i + 1 :]])))
            for leaf in (leaves[i] + slope * (0.01 / norm), leaves[i] - slope * (0.01 / norm))
        ]
        assert (ends[0] - ends[1]) / 0.02 == pytest.approx(norm, rel=0.02)


def test_the_gradient_of_a_bfloat16_product_is_rounded_before_it_is_multiplied():
    rng = np.random.default_rng(3)
    a, b, g = (rng.standard_normal(shape) for shape in ((3, 4), (5, 4), (3, 5)))
    a, b = (jnp.asarray(x, jnp.bfloat16) for x in (a, b))
    y, pull = jax.vjp(functools.partial(product, "tk,nk->tn"), a, b)
    wide = [np.asarray(x, np.float64) for x in (a, b, jnp.asarray(g, jnp.bfloat16))]
    np.testing.assert_allclose(y, wide[0] @ wide[1].T, rtol=1e-6)
    to_a, to_b = pull(jnp.asarray(g, jnp.float32))
    assert to_a.dtype == to_b.dtype == jnp.bfloat16
    for found, wanted in ((to_a, wide[2] @ wide[1]), (to_b, wide[2].T @ wide[0])):
        np.testing.assert_allclose(np.asarray(found, np.float64), wanted, rtol=2**-8, atol=2**-10)


def test_bfloat16_rounds_the_products_and_nothing_else_changes():
    config, tokens = a_config(), jnp.asarray(some_tokens())
    wanted, _ = a_model(config)(tokens)
    seen = []

    def recording(site, x, weights, state):
        seen.extend([x.dtype, *(w.dtype for w in weights)])
        return dense(site, x, weights, state)

    logits, _ = a_model(config, dtype=jnp.bfloat16)(tokens, recording)
    assert set(seen) == {jnp.dtype(jnp.bfloat16)}
    assert logits.dtype == jnp.float32
    assert 1e-5 < error(logits, np.asarray(wanted)) < 3e-2


def test_the_program_is_no_longer_for_more_layers():
    def products(layers):
        model = a_model(a_config(layers=layers))
        return str(jax.make_jaxpr(model)(jnp.asarray(some_tokens()))).count("dot_general")

    assert products(2) == products(12) > 0


@pytest.mark.skipif(
    jax.__version_info__ < (0, 11),
    reason="XLA on a CPU widens bfloat16 before the loop",
)
def test_parameters_stay_in_their_types_and_are_widened_a_layer_at_a_time():
    def halved(layers: int) -> Decoder:
        model = a_model(a_config(tied=False, layers=layers))
        kinds = {name: "bfloat16" if "mlp" in name else "float16" for name in model.parameters()}
        return Decoder(model.config, {n: a.astype(kinds[n]) for n, a in model.parameters().items()})

    def bytes_of(model: Decoder) -> tuple[int, int, int]:
        compiled = run.lower(model, tokens).compile().memory_analysis()
        count = sum(array.size for array in model.parameters().values())
        return count, compiled.argument_size_in_bytes - tokens.nbytes, compiled.temp_size_in_bytes

    run = jax.jit(lambda model, tokens: model(tokens)[0])
    tokens, model = jnp.asarray(some_tokens(), jnp.int32), halved(3)
    wide = {name: array.astype(jnp.float32) for name, array in model.parameters().items()}
    np.testing.assert_array_equal(
        run(model, tokens), run(Decoder(model.config, wide), tokens), strict=True
    )
    (few, held, working), (many, more_held, more_working) = bytes_of(model), bytes_of(halved(24))
    assert more_held - held == 2 * (many - few)
    assert more_working - working < (many - few) / 4  # widening all would take 4 bytes for each


def test_parameters_make_the_same_decoder_again():
    model = a_model(a_config(tied=False))
    again = Decoder(model.config, model.parameters())
    assert jax.tree.all(jax.tree.map(np.array_equal, model, again))


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_parameters_that_do_not_fit_are_refused_by_name(change):
    config = a_config()
    parameters = a_model(config).parameters()
    name = "model.layers.*.mlp.up_proj"
    if change == "missing":
        del parameters[name]
    elif change == "shape":
        parameters[name] = parameters[name][:, 1:]
    else:
        name = "lm_head"
        parameters[name] = jnp.zeros((50, 24))
    with pytest.raises(ValueError, match=f"{name.replace('*', '.')} has shape"):
        Decoder(config, parameters)
