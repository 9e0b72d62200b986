"""Routing, products by groups, and that the golden cases of mixtures exercise what they claim."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duquantpp_jax.checkpoints import load
from duquantpp_jax.models import Decoder, DecoderConfig, empty_cache, experts
from duquantpp_jax.models.experts import route
from duquantpp_jax.models.families.gpt_oss import LIMIT
from duquantpp_jax.models.products import matmul
from duquantpp_jax.models.rope import Yarn
from duquantpp_jax.ptq.stores import store
from tests.conftest import mixture
from tests.goldens import families
from tests.models.test_families import RUN, directory_of

MIXTURES = [name for name, case in families.CASES.items() if "num_experts_per_tok" in case]


@pytest.mark.slow
@pytest.mark.parametrize("name", MIXTURES)
def test_golden_cases_send_several_tokens_to_every_expert(name, tmp_path):
    model = load(directory_of(name, families.CASES[name], tmp_path / "model"))
    outs = RUN(model, jnp.asarray(families.tokens()))[1]
    experts = np.asarray(outs["mlp_in"][0].expert)
    counts = [np.bincount(layer.ravel(), minlength=model.config.num_experts) for layer in experts]
    assert np.min(counts) >= 2
    if "gpt" in name:  # the clamps of both halves are reached
        biases = [model.layers[f"mlp.{half}_proj.bias"][...] for half in ("up", "gate")]
        layer = np.arange(len(experts))[:, None, None, None]
        for y, bias in zip(outs["mlp_in"][1], biases, strict=True):
            clamped = np.abs(y + np.asarray(bias)[layer, experts]) > LIMIT
            assert np.mean(clamped) > 0.01


def routed(key=0, tokens=9, experts=4, chosen=2, k=8):
    rng = np.random.default_rng(key)
    h = jnp.asarray(rng.standard_normal((1, tokens, k)), jnp.float32)
    w = jnp.asarray(rng.standard_normal((experts, k)), jnp.float32)
    return h, w, *route(h, w, None, chosen, renormalized=True)


@pytest.mark.parametrize("tile", [1, 4, 128])
def test_each_input_meets_the_weight_of_its_expert(tile, monkeypatch):
    """Tiles that experts fill, leave room in, or have none of."""
    monkeypatch.setattr(experts, "TILE", tile)
    h, _, x, _ = routed()
    x = x.replace(expert=jnp.where(x.expert == 2, 1, x.expert))  # the third expert is never met
    w = jnp.asarray(np.random.default_rng(1).standard_normal((4, 5, 8)), jnp.float32)
    wanted = np.einsum("rlk,rlcnk->rlcn", h, np.asarray(w)[np.asarray(x.expert)])
    np.testing.assert_allclose(jax.jit(matmul)(x, w), wanted, rtol=1e-4, atol=1e-5)


def test_each_input_is_moved_by_the_part_of_its_expert():
    _, _, x, _ = routed()
    scales = jnp.asarray([1.0, 2.0, 4.0, 8.0], jnp.float32)
    moved = x.each(lambda scale, tokens: scale * tokens[..., :3], scales)
    wanted = np.asarray(x.x)[..., :3] * np.asarray(scales)[np.asarray(x.expert)][..., None]
    np.testing.assert_array_equal(moved.x, wanted)


def test_the_inputs_of_the_experts_are_all_inputs():
    h, _, x, _ = routed()
    parts = [x.of(jnp.int32(e)) for e in range(4)]
    assert sum(int(own.sum()) for _, own in parts) == x.expert.size
    for inputs, own in parts:
        np.testing.assert_array_equal(inputs, np.where(np.asarray(own)[..., None], h, 0))


@pytest.mark.parametrize("renormalized", [True, False])
def test_weights_are_probabilities_of_the_largest_logits(renormalized):
    h, w, *_ = routed()
    x, scores = route(h, w, jnp.arange(4, dtype=jnp.float32), 2, renormalized=renormalized)
    p = np.asarray(jax.nn.softmax(jnp.asarray(h @ w.T + np.arange(4, dtype=np.float32))))
    wanted = np.take_along_axis(p, np.asarray(x.expert), axis=-1)
    assert np.all(wanted.min(axis=-1) >= np.sort(p)[..., -2])
    total = wanted.sum(axis=-1, keepdims=True) if renormalized else 1
    np.testing.assert_allclose(scores, wanted / total, rtol=1e-5)


def config(name, **changes):
    return DecoderConfig.from_dict({**json.loads(json.dumps(families.CASES[name])), **changes})


def test_more_experts_a_token_than_there_are_and_null_for_a_truth_value_are_refused():
    with pytest.raises(ValueError, match="num_experts_per_tok = 5 is out of place"):
        config("mixtral", num_experts_per_tok=5)
    with pytest.raises(ValueError, match="norm_topk_prob is null: it must be true or false"):
        config("qwen 3 moe", norm_topk_prob=None)


@pytest.mark.parametrize(
    "field", [{"decoder_sparse_step": 2}, {"mlp_only_layers": [0]}, {"hidden_act": "gelu"}]
)
def test_layers_without_experts_and_other_activations_are_refused(field):
    with pytest.raises(ValueError, match="is not supported for Qwen3MoeForCausalLM"):
        config("qwen 3 moe", **field)


def test_a_gpt_oss_that_does_not_say_has_yarn_and_a_window_in_every_other_layer():
    case = {n: v for n, v in families.CASES["gpt-oss"].items() if "rope" not in n}
    found = DecoderConfig.from_dict(case)
    assert found.rope_scaling == Yarn(32.0, 4096, None, 32.0, 1.0, truncate=False)
    assert found.rope_theta == 150000
    assert found.layer_types == ("sliding_attention", "full_attention", "sliding_attention")
    plain = config("gpt-oss", rope_scaling=None, rope_parameters={"rope_type": "default"})
    assert plain.rope_scaling is None
    assert DecoderConfig.from_dict(plain.to_dict()) == plain


@pytest.mark.slow
def test_a_cache_gives_what_all_positions_at_once_give():
    model = mixture("GptOssForCausalLM", sliding_window=5)
    tokens = jnp.asarray(np.arange(24).reshape(2, 12) * 7 % 257)
    wanted, _ = jax.jit(Decoder.__call__)(model, tokens)
    cache = empty_cache(model.config, store("float32", 16), 2, 12)
    extend = jax.jit(Decoder.extend)
    first, cache = extend(model, tokens[:, :8], cache)
    rest, cache = extend(model, tokens[:, 8:], cache)
    np.testing.assert_allclose(jnp.concatenate([first, rest], 1), wanted, rtol=1e-4, atol=1e-4)
