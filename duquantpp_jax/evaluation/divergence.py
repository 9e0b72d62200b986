"""How far a quantized model's next-token distribution is from the float model's.

    KL  = mean over targets of sum_v p_v (log p_v - log q_v)      nats, p float, q quantized
    NLL = mean over targets of -log q_target                      nats; PPL = exp(NLL)

Both are summed over the targets of a row in float32, over rows in float64.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from duquantpp_jax.core import Format
from duquantpp_jax.models import Decoder, Store, dense
from duquantpp_jax.ptq.site import QuantizedLinear, QuantizedSite


@jax.jit
def float_log_probabilities(
    model: Decoder, tokens: Integer[Array, "rows 512"]
) -> tuple[Float[Array, "rows 511 vocab"], Float[Array, " rows"]]:
    """log p of the float model at every target, and the sum of -log p_target over each row."""
    logits, _ = model(tokens[:, :-1])
    log_p = jax.nn.log_softmax(logits)
    return log_p, _row_nll(log_p, tokens)


@functools.partial(jax.jit, static_argnames=("format", "store"))
def row_divergence(
    model: Decoder,
    state: Mapping[str, QuantizedSite] | None,
    tokens: Integer[Array, "rows 512"],
    log_p: Float[Array, "rows 511 vocab"],
    *,
    format: Format | None,
    store: Store | None = None,
) -> tuple[Float[Array, " rows"], Float[Array, " rows"]]:
    """Sums over each row's targets of KL(float || quantized) and of -log q_target, in nats.

    Args:
      state: The quantized sites, stacked over layers.
      log_p: As `float_log_probabilities` gives it.
      format: Of the activations; None leaves all linears in float.
      store: How keys and values are kept; None keeps them as they are.
    """
    linear = dense if format is None else QuantizedLinear(format)
    logits, _ = model(tokens[:, :-1], linear, state, store=store)
    log_q = jax.nn.log_softmax(logits)
    kl = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=(1, 2))
    return kl, _row_nll(log_q, tokens)


def _row_nll(
    log_p: Float[Array, "rows 511 vocab"], tokens: Integer[Array, "rows 512"]
) -> Float[Array, " rows"]:
    targets = tokens[:, 1:, None]
    return -jnp.sum(jnp.take_along_axis(log_p, targets, axis=-1), axis=(1, 2))
