"""SQNR of each linear alone, on the inputs that the float model gives it.

SQNR = 10 log10( sum y^2 / sum (y - y^)^2 )  dB,   y = x @ w.T,   y^ its quantized twin
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from duquantpp_jax.core import Format
from duquantpp_jax.models import Decoder, dense
from duquantpp_jax.ptq.site import QuantizedLinear, QuantizedSite


def linear_sqnr(
    model: Decoder,
    state: Mapping[str, QuantizedSite],
    tokens: Integer[Array, "rows 512"],
    *,
    format: Format,
) -> dict[str, Float[np.ndarray, "layers linears"]]:
    """SQNR in dB of every linear, by site."""
    energies = _energies(model, state, tokens, format=format)
    return {
        site: 10 * np.log10(np.asarray(signal, np.float64) / np.asarray(error, np.float64))
        for site, (signal, error) in energies.items()
    }


@functools.partial(jax.jit, static_argnames="format")
def _energies(
    model: Decoder,
    state: Mapping[str, QuantizedSite],
    tokens: Integer[Array, "rows 512"],
    *,
    format: Format,
) -> dict[str, tuple[Float[Array, "layers linears"], Float[Array, "layers linears"]]]:
    quantized = QuantizedLinear(format)

    def both(site: str, x: Array, weights: tuple[Array, ...], state: QuantizedSite):
        ys, _ = dense(site, x, weights, None)
        rounded, _ = quantized(site, x, weights, state)
        signal = jnp.stack([jnp.sum(jnp.square(y)) for y in ys])
        error = [jnp.sum(jnp.square(y - z)) for y, z in zip(ys, rounded, strict=True)]
        return ys, (signal, jnp.stack(error))

    _, energies = model(tokens[:, :-1], both, state)
    return energies
