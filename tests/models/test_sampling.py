"""Decoding with a cache against the full forward pass, and tokens drawn as they should be."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duquantpp_jax.models import Decoder, dense, empty_cache
from duquantpp_jax.models.sampling import Draws, Sampling, begin, bucket, draw, generate, proceed
from duquantpp_jax.ptq import stores as cache
from tests.conftest import tiny_decoder

LENGTH, PROMPT = 12, 5
STORES = pytest.mark.parametrize(
    ("name", "rotated"), [*((name, False) for name in cache.FORMATS), ("mxfp4", True)]
)
ROTATED = pytest.mark.parametrize("rotated", [False, True], ids=["plain", "rotated"])


@pytest.fixture(scope="module")
def model():
    """With all that layers may differ in: windows, rotary bases."""
    changes = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    changes |= {"sliding_window": 6, "layer_types": ("full_attention", "sliding_attention")}
    changes |= {"rope_local_base_freq": 100.0}
    return tiny_decoder(**changes)


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(3), (2, LENGTH), 0, 256)


def full(model, tokens, store):
    logits, _ = jax.jit(lambda m, t: m(t, store=store))(model, tokens)
    return np.asarray(logits)


def decoded(model, tokens, store):
    """Logits of a prompt read at once and then token by token, in a cache with room to spare."""
    extend = jax.jit(Decoder.extend)
    kept = empty_cache(model.config, store, 2, LENGTH + 3)
    logits, kept = extend(model, tokens[:, :PROMPT], kept)
    parts = [logits]
    for position in range(PROMPT, LENGTH):
        logits, kept = extend(model, tokens[:, position : position + 1], kept)
        parts.append(logits)
    assert int(kept.length) == LENGTH
    return np.concatenate(parts, axis=1), kept


def error(got, wanted):
    return np.abs(got - wanted).max() / np.abs(wanted).max()


@pytest.mark.slow
@STORES
def test_decoding_gives_the_logits_of_the_full_forward_pass(name, rotated, model, tokens):
    """Both sum the same products in another order: about sqrt(n) 2^-24 for sums of n terms, n at
    most 96, in some ten sums one after another: 6e-6. A key or value that close to a tie could be
    rounded the other way, which would show; none of these 3,072 is.
    """
    store = cache.store(name, 32, rotate_keys=rotated)
    got, _ = decoded(model, tokens, store)
    assert error(got, full(model, tokens, store)) < 6e-6


@ROTATED
def test_a_float32_cache_changes_nothing_and_rotation_leaves_scores_alone(rotated, model, tokens):
    store = cache.store("float32", 32, rotate_keys=rotated)
    assert error(full(model, tokens, store), full(model, tokens, None)) < 6e-6
    q, k = jax.random.normal(jax.random.key(0), (2, 3, 8, 32))
    moved = jnp.einsum("hqd,hkd->hqk", store.move(q), store.move(k))
    np.testing.assert_allclose(moved, jnp.einsum("hqd,hkd->hqk", q, k), atol=1e-5)
    assert (np.abs(store.move(k) - k).max() > 1) == rotated


@pytest.mark.parametrize(("finer", "coarser"), [("bf16", "mxfp8"), ("mxfp8", "mxfp4")])
def test_fewer_bits_err_more(finer, coarser, model, tokens):
    exact = full(model, tokens, None)
    errors = [error(full(model, tokens, cache.store(n, 32)), exact) for n in (finer, coarser)]
    assert 1e-4 < errors[0] < errors[1] / 2


@pytest.mark.parametrize(
    ("name", "bits"), [("float32", 32), ("bf16", 16), ("mxfp8", 8.25), ("mxfp4", 4.25)]
)
def test_a_cache_takes_the_bits_of_its_format(name, bits, model):
    entries = empty_cache(model.config, cache.store(name, 32), 2, 7).entries
    numbers = 2 * 2 * 2 * 7 * 32  # keys and values, layers, rows, positions, channels
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(entries)) * 8 == numbers * bits


def test_a_token_is_encoded_the_same_alone_and_among_others():
    x = jax.random.normal(jax.random.key(1), (2, 6, 3, 64))
    for name in cache.FORMATS:
        store = cache.store(name, 64)
        together = jax.tree.leaves(store.encode(x))
        alone = jax.tree.leaves(store.encode(x[1:, 4:5]))
        for part, other in zip(together, alone, strict=True):
            assert np.asarray(part[1:, 4:5]).tobytes() == np.asarray(other).tobytes()


# Generating.


def test_greedy_tokens_are_the_likeliest_of_the_full_forward_pass(model, tokens):
    store = cache.store("mxfp4", 32)
    prompts = tokens[0, :PROMPT].tolist(), tokens[1, : PROMPT - 2].tolist()
    new = generate(model, prompts, jax.random.key(0), store=store, new=6, linear=dense)
    for prompt, answer in zip(prompts, new, strict=True):
        assert len(answer) == 6
        whole = np.asarray([prompt + answer + [0] * (11 - len(prompt) - 6)] * 2)
        likeliest = full(model, whole, store).argmax(axis=-1)[0, : len(prompt) + 5]
        assert likeliest[len(prompt) - 1 :].tolist() == answer


def test_a_row_ends_with_the_first_end_token_and_others_go_on(model, tokens):
    store = cache.store("float32", 32)

    def run(model):
        prompts = tokens[:, :PROMPT].tolist()
        return generate(model, prompts, jax.random.key(0), store=store, new=6, linear=dense)

    free = run(model)
    end = next(token for token in free[0][1:] if token not in free[1])
    last = free[0].index(end) + 1
    ids = (end, 255)
    ending = Decoder(dataclasses.replace(model.config, eos_token_id=ids), model.parameters())
    assert run(ending) == [free[0][:last], free[1]]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_whose_logits_are_nan_draws_no_token(temperature):
    logits = jnp.zeros((2, 5)).at[1, 3].set(jnp.nan)
    drawn = draw(logits, Draws.of([Sampling(temperature)] * 2), jax.random.key(0))
    assert drawn[0] >= 0
    assert drawn[1] == -1


def test_a_key_decides_what_is_sampled(model, tokens):
    def run(seed):
        return generate(
            model,
            tokens[:, :PROMPT].tolist(),
            jax.random.key(seed),
            store=cache.store("bf16", 32),
            new=6,
            linear=dense,
            sampling=Sampling(temperature=1.0),
        )

    assert run(0) == run(0) != run(1)


def test_lengths_up_to_a_power_of_two_and_samplings_of_a_kind_share_two_programs(model, tokens):
    programs = begin._cache_size(), proceed._cache_size()
    how = {"store": cache.store("bf16", 32), "linear": dense, "ready": lambda: None}
    for length, new, temperature in ((3, 6, 0.9), (7, 2, 0.8), (9, 7, 1.1)):
        prompts = [row[:length].tolist() for row in tokens]
        generate(model, prompts, jax.random.key(0), new=new, sampling=Sampling(temperature), **how)
    assert (begin._cache_size() - programs[0], proceed._cache_size() - programs[1]) <= (1, 1)
    assert [bucket(length) for length in (1, 16, 17, 32, 33)] == [16, 16, 32, 32, 64]


PROBABILITIES = np.array([0.05, 0.4, 0.1, 0.25, 0.2], np.float32)


@pytest.mark.parametrize(
    ("sampling", "wanted"),
    [
        (Sampling(temperature=1.0), PROBABILITIES),
        (Sampling(temperature=0.5), PROBABILITIES**2 / (PROBABILITIES**2).sum()),
        (Sampling(temperature=1.0, top_k=2), [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
        (Sampling(temperature=1.0, top_p=0.8), [0, 0.4 / 0.85, 0, 0.25 / 0.85, 0.2 / 0.85]),
        (Sampling(temperature=1.0, top_p=0.3), [0, 1, 0, 0, 0]),
        (Sampling(temperature=1.0, top_k=3, top_p=0.6), [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
        (Sampling(), [0, 1, 0, 0, 0]),
    ],
    ids=str,
)
def test_tokens_are_drawn_with_the_probabilities_that_are_left(sampling, wanted):
    """20,000 draws: each share lies within 5 standard errors, of .0036 at most."""
    logits = jnp.broadcast_to(jnp.log(PROBABILITIES), (20_000, 5))
    drawn = np.asarray(draw(logits, Draws.of([sampling] * len(logits)), jax.random.key(0)))
    shares = np.bincount(drawn, minlength=5) / len(drawn)
    np.testing.assert_allclose(shares, wanted, atol=0.018)
    assert not shares[np.asarray(wanted) == 0].any()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [({"temperature": -1.0}, "temperature of -1"), ({"top_k": -2}, "top_k of -2"),
     ({"top_p": 0.0}, "top_p of 0")],
)  # fmt: skip
def test_a_sampling_that_makes_no_sense_is_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        Sampling(**wrong)
