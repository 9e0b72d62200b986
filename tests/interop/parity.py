"""A model here beside the same in transformers: logits and texts."""

import jax
import jax.numpy as jnp
import numpy as np

from duquantpp_jax.checkpoints import load_any
from duquantpp_jax.evaluation.predict import kl_divergence

TOKENS = np.asarray(jax.random.randint(jax.random.key(4), (2, 24), 0, 257))


def logits_of(directory):
    """Of a quantized model here."""
    decoder, linear, state = load_any(directory)
    return jax.jit(lambda tokens: decoder(tokens, linear, state)[0])


def logits_in_transformers(model, tokens):
    import torch

    with torch.no_grad():
        logits = model(torch.from_numpy(np.asarray(tokens, np.int64))).logits
        return jnp.asarray(logits.float().numpy())


def kl(logits, other):
    return float(kl_divergence(*map(jax.nn.log_softmax, (logits, other))).mean())


def assert_writes(model, ours):
    """The likeliest 20 tokens after four are the same in transformers."""
    import torch

    tokens = np.array(TOKENS)
    for place in range(4, 24):
        tokens[:, place] = ours(tokens)[:, place - 1].argmax(-1)
    start = torch.from_numpy(TOKENS[:, :4].astype(np.int64))
    written = model.generate(start, max_new_tokens=20, min_new_tokens=20, do_sample=False)
    np.testing.assert_array_equal(written.numpy(), tokens)
    assert len(np.unique(tokens[:, 4:])) > 4
