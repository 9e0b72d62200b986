"""SQNR of each linear alone, on its inputs in the float model.

    SQNR = 10 log10( sum y^2 / sum (y - y^)^2 )  dB,   y = x @ w.T,   y^ from the quantized linear

A linear without signal or without error has no SQNR; it is masked.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from duquantpp_jax.evaluation.predict import Predictor
from duquantpp_jax.models import dense


def linear_sqnr(
    predictor: Predictor, tokens: Integer[np.ndarray, "rows length"]
) -> dict[str, Float[np.ma.MaskedArray, "layers linears"]]:
    """SQNR in dB of every linear, by site; all tokens of a row but the last are inputs.

    >>> from duquantpp_jax import Plan, Predictor, quantize_decoder, recipe
    >>> from duquantpp_jax.checkpoints import testbed
    >>> model, tokens = testbed.load(), testbed.calibration_rows()[:2, :64]
    >>> plan = Plan.of(model.config, recipe("block_hadamard"))
    >>> quantized = Predictor(*quantize_decoder(plan, model, tokens))
    >>> linear_sqnr(quantized, tokens)["mlp_in"].shape  # of up_proj and gate_proj in 4 layers
    (4, 2)
    """
    energies = _energies(predictor, jnp.asarray(tokens)).items()
    return {site: decibels(*map(np.asarray, energy)) for site, energy in energies}


def decibels(
    signal: Float[np.ndarray, "*linears"], error: Float[np.ndarray, "*linears"]
) -> Float[np.ma.MaskedArray, "*linears"]:
    """10 log10(signal / error), masked where either is zero."""
    none = (signal == 0) | (error == 0)
    signal, error = (np.where(none, 1.0, energy.astype(np.float64)) for energy in (signal, error))
    return np.ma.masked_array(10 * np.log10(signal / error), mask=none)


def mean_sqnr(predictor: Predictor, tokens: Integer[np.ndarray, "rows length"]) -> float | None:
    """Mean SQNR in dB over the linears that have an SQNR; None if none has.

    >>> from duquantpp_jax import Plan, Predictor, quantize_decoder, recipe
    >>> from duquantpp_jax.checkpoints import testbed
    >>> model, tokens = testbed.load(), testbed.calibration_rows()[:2, :64]
    >>> plan = Plan.of(model.config, recipe("block_hadamard"))
    >>> quantized = Predictor(*quantize_decoder(plan, model, tokens))
    >>> 10 < mean_sqnr(quantized, tokens) < 30
    True
    """
    by_site = linear_sqnr(predictor, tokens).values()
    found = np.ma.concatenate([sqnr.ravel() for sqnr in by_site]).compressed()
    return float(np.mean(found)) if found.size else None


@jax.jit
def _energies(
    predictor: Predictor, tokens: Integer[Array, "rows length"]
) -> dict[str, tuple[Float[Array, "layers linears"], Float[Array, "layers linears"]]]:
    def both(site: str, x: Array, weights: tuple[Array, ...], state: object):
        ys, _ = dense(site, x, weights, None)
        rounded, _ = predictor.linear(site, x, weights, state)
        signal = jnp.stack([jnp.sum(jnp.square(y)) for y in ys])
        error = [jnp.sum(jnp.square(y - z)) for y, z in zip(ys, rounded, strict=True)]
        return ys, (signal, jnp.stack(error))

    return predictor.model(tokens[:, :-1], both, predictor.state)[1]
