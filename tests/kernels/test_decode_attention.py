"""decode_attention by Triton, interpreted, against attention over all of the cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duquantpp_jax.kernels.decode_attention import reference, triton
from duquantpp_jax.kernels.decode_attention.api import EVERYTHING, decode_attention, why_not
from duquantpp_jax.models.cache import Store, empty_cache
from duquantpp_jax.ptq import store, stores
from tests.conftest import tiny_decoder

on_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")


def drawn(capacity=320, groups=3, d=32):
    """A query of two rows, and the cache of two layers; what is not filled is large."""
    draw = np.random.default_rng(0)
    cached = draw.standard_normal((2, 2, 2, capacity, 2, d)).astype(np.float32)
    q = draw.standard_normal((2, 2, groups, d)).astype(np.float32)
    return jnp.asarray(q), jnp.asarray(cached, jnp.bfloat16)


@pytest.mark.parametrize("window", [EVERYTHING, 70, 1])
def test_it_sees_the_positions_up_to_its_own_and_no_other(window):
    """Ends of tiles (64) and of runs (256), rows of other lengths, runs that see nothing."""
    q, (keys, values) = drawn()
    run = jax.jit(functools.partial(triton.decode_attention, scale=32**-0.5, interpret=True))
    for places in ([0, 5], [63, 64], [255, 256], [300, 319]):
        at = jnp.asarray(places, jnp.int32)
        # What comes later than a row's own position may be anything.
        later = jnp.arange(320)[None, None, :, None, None] > at[None, :, None, None, None]
        stale = [jnp.where(later, jnp.bfloat16(1e30), cached) for cached in (keys, values)]
        given = (jnp.int32(1), at, jnp.int32(window))
        law = reference.decode_attention(q, keys, values, *given, 32**-0.5)
        np.testing.assert_allclose(run(q, *stale, *given), law, atol=2e-6)


def test_a_query_in_bfloat16_is_as_near_as_attention_in_bfloat16():
    q, (keys, values) = drawn(capacity=64)
    given = (jnp.int32(0), jnp.array([40, 63]), jnp.int32(EVERYTHING), 32**-0.5)
    law = reference.decode_attention(
        q.astype(jnp.bfloat16).astype(jnp.float32), keys, values, *given
    )
    plain = reference.decode_attention(q.astype(jnp.bfloat16), keys, values, *given)
    mine = triton.decode_attention(q.astype(jnp.bfloat16), keys, values, *given, interpret=True)
    errors = [np.abs(np.asarray(a, np.float32) - law).max() for a in (mine, plain)]
    assert mine.dtype == jnp.bfloat16
    assert errors[0] <= 1.5 * errors[1]


def test_a_model_writes_by_it_what_it_writes_without(monkeypatch):
    """Logits of a token after a prompt, each row at a position of its own."""
    model = tiny_decoder()
    d = model.config.head_dim
    tokens = jax.random.randint(jax.random.key(0), (2, 9), 0, model.config.vocab_size)

    def last(kind: Store) -> np.ndarray:
        _, cache = model.extend(tokens[:, :8], empty_cache(model.config, kind, 2, 16))
        cache = cache.replace(length=jnp.array([8, 5]))
        return np.asarray(model.extend(tokens[:, 8:], cache)[0])

    plain = last(store("bf16", d, implementation="xla"))
    calls = []

    monkeypatch.setattr(stores, "why_not_nvidia", lambda: None)
    monkeypatch.setattr(
        stores,
        "decode_attention",
        lambda *given, window, scale: triton.decode_attention(
            *given, jnp.asarray(window, jnp.int32), scale, interpret=not calls.append(given)
        ),
    )
    mine = last(store("bf16", d))
    assert calls
    np.testing.assert_allclose(mine, plain, atol=1e-4 * np.abs(plain).max())
    calls.clear()
    last(store("bf16", d, implementation="xla"))
    assert not calls


@on_gpu
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_gpu_gives_what_attention_gives(dtype):
    q, (keys, values) = drawn(capacity=1024, groups=4, d=128)
    at = jnp.array([700, 1023])
    run = functools.partial(decode_attention, q.astype(dtype), keys, values, 1, at, scale=128**-0.5)
    mine, law = (run(implementation=name) for name in ("triton", "reference"))
    bound = 1e-5 if dtype == jnp.float32 else 2e-2
    np.testing.assert_allclose(mine.astype(jnp.float32), law.astype(jnp.float32), atol=bound)


def test_what_it_is_not_for_is_said():
    q, (keys, _) = drawn()
    assert why_not(q, keys) is None
    assert "keys in bfloat16" in (why_not(q, keys.astype(jnp.float32)) or "")
    assert "heads of 24" in (why_not(q[..., :24], keys[..., :24]) or "")
    if jax.default_backend() != "gpu":
        with pytest.raises(RuntimeError, match="needs an NVIDIA GPU, and this is cpu"):
            decode_attention(
                q, keys, keys, 0, jnp.array([0, 1]), scale=1.0, implementation="triton"
            )
