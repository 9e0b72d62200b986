"""Attention in one call of JAX is that of the equation; cuDNN runs it on a GPU alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duquantpp_jax.models import decoder as decoders
from duquantpp_jax.models.attention import causal_attention, fused_attention, fused_attention_runs
from tests.conftest import tiny_decoder


@pytest.mark.parametrize("groups", [1, 3])
def test_in_one_call_it_is_the_equation_and_has_its_gradients(groups):
    draw = np.random.default_rng(0)
    q = jnp.asarray(draw.standard_normal((2, 7, 2, groups, 8)), jnp.float32)
    k, v = (jnp.asarray(draw.standard_normal((2, 7, 2, 8)), jnp.float32) for _ in range(2))
    g = jnp.asarray(draw.standard_normal(q.shape), jnp.float32)

    def pulled(attention, **how):
        def run(*x):
            return attention(*x, jnp.arange(7, dtype=jnp.int32), None, 5.0, None, **how)

        y, pull = jax.vjp(run, q, k, v)
        return y, *pull(g)

    pairs = pulled(fused_attention, implementation="xla"), pulled(causal_attention)
    for found, wanted in zip(*pairs, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_decoder_has_it_in_bfloat16_without_windows_and_where_it_runs(monkeypatch):
    model = tiny_decoder()
    assert jax.default_backend() == "gpu" or not fused_attention_runs(16)
    monkeypatch.setattr(decoders, "fused_attention_runs", lambda _: True)
    narrow = model.computing(jnp.bfloat16)
    assert narrow.with_fused_attention().attention is fused_attention
    assert model.with_fused_attention() is model
    narrow.config = dataclasses.replace(narrow.config, sliding_window=4)
    assert narrow.with_fused_attention() is narrow
    monkeypatch.setattr(decoders, "fused_attention_runs", lambda _: False)
    assert model.computing(jnp.bfloat16).with_fused_attention().attention is causal_attention
