"""flash_attention by Triton, interpreted, against float64; and what of the package runs by it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duquantpp_jax.evaluation import Predictor, Reference
from duquantpp_jax.kernels.decode_attention.api import EVERYTHING
from duquantpp_jax.kernels.flash_attention import api, triton
from duquantpp_jax.kernels.flash_attention.api import flash_attention, why_not
from duquantpp_jax.models.attention import causal_attention
from duquantpp_jax.models.cache import empty_cache
from duquantpp_jax.ptq import calibration
from duquantpp_jax.ptq.sharding import mesh_of
from duquantpp_jax.ptq.stores import store
from tests.conftest import tiny_decoder

on_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
SMALL = triton.Tiling(queries=32, keys=16, warps=4, stages=1)


def drawn(length=50, keys=50, groups=3, d=32, dtype=jnp.float32):
    """Queries of two rows and two heads of keys, the keys and the values."""
    draw = np.random.default_rng(0)
    shapes = (2, length, 2, groups, d), (2, keys, 2, d), (2, keys, 2, d)
    return [jnp.asarray(draw.standard_normal(shape), jnp.float32).astype(dtype) for shape in shapes]


def in_float64(q, k, v, first, window, sinks):
    """Attention, the same of |v|, and a bound on what sums in float32 move: errors of as many
    terms as a sum has grow as the square root of their number (Higham and Mary, 2019)."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    d, keys = q.shape[-1], k.shape[1]
    scores = np.einsum("rqhgd,rkhd->rhgqk", q, k) * d**-0.5
    sizes = np.einsum("rqhgd,rkhd->rhgqk", abs(q), abs(k)) * d**-0.5
    at = np.asarray(first)[:, None, None] + np.arange(q.shape[1])[:, None]
    seen = (np.arange(keys) <= at) & (np.arange(keys) > at - window)
    weights = np.where(seen[:, None, None], np.exp(scores), 0)
    total = weights.sum(axis=-1, keepdims=True)
    if sinks is not None:
        total += np.exp(np.asarray(sinks, np.float64))[..., None, None]
    y, size = (np.einsum("rhgqk,rkhd->rqhgd", weights / total, x) for x in (v, abs(v)))
    return y, size * 2.0**-24 * (2 * np.sqrt(d) * sizes.max() + np.sqrt(keys))


@pytest.mark.parametrize(
    ("length", "keys", "first", "window", "sinks", "groups"),
    [
        (50, 50, (0, 0), EVERYTHING, False, 3),  # neither blocks of queries nor of keys end there
        (64, 64, (0, 0), 17, True, 1),
        (50, 50, (0, 12), EVERYTHING, False, 1),  # positions after the last key
        (50, 50, (0, 0), 1, True, 2),
        (33, 90, (0, 57), 20, False, 2),  # rows that go on, and keys after a row's own
    ],
)
def test_it_is_attention_in_float64_but_for_sums_in_float32(
    length, keys, first, window, sinks, groups
):
    q, k, v = drawn(length, keys, groups)
    first, given = jnp.asarray(first, jnp.int32), jnp.int32(window)
    sinks = jnp.asarray(np.random.default_rng(1).standard_normal((2, groups))) if sinks else None
    run = jax.jit(functools.partial(triton.flash_attention, interpret=True), static_argnums=(6, 7))
    later = jnp.arange(keys)[None, :, None, None] >= length + first[:, None, None, None]
    stale = [jnp.where(later, jnp.float32(1e30), x) for x in (k, v)]
    found = np.asarray(run(q, *stale, first, given, sinks, 32**-0.5, SMALL), np.float64)
    law, bound = in_float64(q, k, v, first, window, sinks)
    assert (np.abs(found - law) <= bound).all()
    # A mask that is off by one is seen, and so are factors of fewer parts.
    for moved, more in ((1, 0), (0, 1))[: 1 + (window < EVERYTHING)]:
        wrong, _ = in_float64(q, k, v, first + moved, window + more, sinks)
        assert (np.abs(found - wrong) > 100 * bound).any()
    halves = [x.astype(jnp.bfloat16).astype(jnp.float32) for x in (q, k, v)]
    wrong, _ = in_float64(*halves, first, window, sinks)
    assert (np.abs(found - wrong) > 10 * bound).any()


def test_in_bfloat16_it_is_as_near_as_attention_in_bfloat16():
    q, k, v = drawn(dtype=jnp.bfloat16)
    first = jnp.zeros(2, jnp.int32)
    law, _ = in_float64(q, k, v, first, EVERYTHING, None)
    plain = causal_attention(q, k, v, jnp.arange(50), None, 32.0)
    given = q, k, v, first, jnp.int32(EVERYTHING), None, 32**-0.5, SMALL
    mine = triton.flash_attention(*given, interpret=True)
    errors = [np.abs(np.asarray(y, np.float64) - law).max() for y in (mine, plain)]
    assert mine.dtype == jnp.bfloat16
    assert errors[0] <= 1.5 * errors[1]


@pytest.fixture
def interpreted(monkeypatch):
    """The kernel is chosen, and interpreted; what it was called with."""
    calls, run = [], triton.flash_attention

    def small(*given):
        calls.append(given)
        return run(*given[:-1], SMALL, interpret=True)

    monkeypatch.setattr(api, "why_not_nvidia", lambda: None)
    monkeypatch.setattr(triton, "flash_attention", small)
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *given, cuda, default: cuda(*given))
    return calls


def test_its_derivatives_are_those_of_attention(interpreted):
    given, at = drawn(20, 20, d=16), jnp.arange(20, dtype=jnp.int32)
    sinks = jnp.ones((2, 3))

    def pulled(attention):
        def run(q, k, v, sinks):
            return attention(q, k, v, at, jnp.int32(9), 16.0, sinks)

        y, pull = jax.vjp(run, *given, sinks)
        return y, *pull(jnp.cos(y))

    for mine, law in zip(pulled(flash_attention), pulled(causal_attention), strict=True):
        np.testing.assert_allclose(mine, law, atol=1e-5)
    assert interpreted


def test_evaluation_calibration_and_prompts_run_by_it(interpreted, monkeypatch):
    model = tiny_decoder()
    tokens = jax.random.randint(jax.random.key(0), (2, 21), 0, model.config.vocab_size)

    def how(kernels):
        return None if kernels else "xla"

    def near(run):
        """Whether run(True) calls it, and run(False) not, with the same results."""
        mine = np.asarray(run(True))
        assert interpreted
        interpreted.clear()
        law = np.asarray(run(False))
        assert not interpreted
        np.testing.assert_allclose(mine, law, atol=1e-4 * np.abs(law).max())

    def maxima(kernels):
        if not kernels:
            monkeypatch.setattr(calibration, "flash_attention", causal_attention)
        jax.clear_caches()  # else the program stays
        return calibration.calibrate(model, np.asarray(tokens))["mlp_out"].absmax

    def prompt(kernels):
        kind = store("bf16", model.config.head_dim, implementation=how(kernels))
        cache = empty_cache(model.config, kind, 2, 64)
        return model.extend(tokens[:, :20], cache)[0]

    near(lambda kernels: Predictor(model, attention=how(kernels)).log_probabilities(tokens))
    near(maxima)
    near(prompt)
    Reference(Predictor(model), np.asarray(tokens), mesh=mesh_of("model=1")).nll()
    assert not interpreted  # weights that are cut


def test_unasked_it_runs_where_it_was_measured(interpreted, monkeypatch):
    monkeypatch.setattr(api, "_capability", lambda: 8)
    given = *drawn(20, 20, d=16), jnp.arange(20, dtype=jnp.int32), None, 16.0
    flash_attention(*given)
    assert not interpreted
    assert "compute capability 9.x, and this is 8.x" in (api.why_not_by_default() or "")
    flash_attention(*given, implementation="triton")
    assert interpreted


@on_gpu
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("d", "window"), [(64, 100), (128, None)])
def test_a_gpu_gives_what_attention_gives(dtype, d, window):
    given = *drawn(511, 511, groups=4, d=d, dtype=dtype), jnp.arange(511), window, float(d)
    mine, law = (flash_attention(*given, implementation=n) for n in ("triton", "reference"))
    bound = 1e-5 if dtype == jnp.float32 else 2e-2
    np.testing.assert_allclose(mine.astype(jnp.float32), law.astype(jnp.float32), atol=bound)


def test_what_it_is_not_for_is_said():
    assert why_not(*drawn()) is None
    q, k, v = drawn(d=48)
    assert "heads of 48" in (why_not(q, k, v) or "")
    assert "heads of 256" in (why_not(*drawn(d=256)) or "")
    assert why_not(*drawn(d=256, dtype=jnp.bfloat16)) is None
    assert "the same of all" in (why_not(q, k, v.astype(jnp.bfloat16)) or "")
    assert "16 queries and more: got 5" in (why_not(*drawn(length=5)) or "")
    if jax.default_backend() != "gpu":
        given = *drawn(), jnp.arange(50), None, 32.0
        with pytest.raises(RuntimeError, match="needs an NVIDIA GPU, and this is cpu"):
            flash_attention(*given, implementation="triton")
