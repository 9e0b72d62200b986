"""A model whose ffn of 172 no block divides: it is converted, and padding changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duquantpp_jax.checkpoints import load, load_tokenizer
from duquantpp_jax.models import dense
from duquantpp_jax.ptq.plan import Plan
from duquantpp_jax.ptq.site import pad_channels
from duquantpp_jax.ptq.walk import quantize_decoder
from duquantpp_jax.recipes import recipe
from tests.stories import BOS, convert


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("stories") / "model"


@pytest.fixture
def stories(data, directory):
    """The model, and 60 stories in rows of 512, which zeros fill up."""
    if not directory.exists():
        convert(data / "models" / "stories260K", directory)
    tokenizer = load_tokenizer(directory)
    texts = (data / "text" / "tinystories_head.txt").read_text().split("<|endoftext|>")
    rows = np.zeros((60, 512), np.int32)
    for row, text in zip(rows, texts, strict=False):
        ids = [BOS, *tokenizer.encode(text.strip()).ids][:512]
        row[: len(ids)] = ids
    return load(directory), jnp.asarray(rows)


@pytest.mark.slow
def test_the_converted_model_has_its_known_perplexity(stories):
    """About 3.65 in other implementations."""
    model, tokens = stories

    @jax.jit
    def nll(model, tokens):
        logits = jax.nn.log_softmax(model(tokens[:, :-1])[0])
        return -jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]

    losses = np.concatenate([nll(model, tokens[i : i + 10]) for i in range(0, 60, 10)])
    targets = np.asarray(tokens)[:, 1:] > 0
    assert np.exp(losses[targets].mean(dtype=np.float64)) == pytest.approx(3.654, abs=0.005)


def test_the_tokenizer_gives_a_story_back(stories, directory):
    tokenizer = load_tokenizer(directory)
    text = "Once upon a time, there was\na dog 🙂."
    encoded = tokenizer.encode(text)
    assert encoded.tokens[:4] == ["▁Once", "▁upon", "▁a", "▁time"]
    assert tokenizer.decode(encoded.ids) == text


def test_padding_leaves_logits_unchanged(stories):
    """Sums with twenty zeros more may be taken in another order: a few 2^-24 of the largest logit
    at each of ten sums one after another."""
    model, tokens = stories[0], stories[1][:8, :128]

    def padded(site, x, weights, state):
        width = -(-x.shape[-1] // 32) * 32
        return dense(
            site, pad_channels(x, width), tuple(pad_channels(w, width) for w in weights), state
        )

    run = jax.jit(lambda m, t, linear: m(t, linear)[0], static_argnums=2)
    plain, wide = (np.asarray(run(model, tokens, linear)) for linear in (dense, padded))
    assert np.abs(wide - plain).max() < 3e-6 * np.abs(plain).max()


@pytest.mark.slow
def test_quantized_weights_of_a_padded_linear_are_zero_beyond_its_width(stories):
    model, tokens = stories
    plan = Plan.of(model.config, recipe("rtn", "floor"), pad=True)
    assert plan.widths(0)["mlp_out"] == 192
    *_, state = quantize_decoder(plan, model, np.asarray(tokens[:4, :128]))
    (down,) = (w.dequantize() for w in state["mlp_out"].weights)
    assert down.shape == (5, 64, 192)
    assert not down[..., 172:].any()
