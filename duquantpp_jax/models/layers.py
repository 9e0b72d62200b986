"""One layer of the decoder by itself, over parameters that are given.

hidden_0 = embedding[tokens],    hidden_(l+1) = layer(hidden_l, parameters of layer l)
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32

from duquantpp_jax.models.config import DecoderConfig
from duquantpp_jax.models.decoder import Decoder, Linear, layer_windows
from duquantpp_jax.models.parameters import EMBEDDING, LAYER, parameter_shapes


def layer(
    config: DecoderConfig,
    x: Float32[Array, "rows length k"],
    parameters: Mapping[str, Float[Array, "..."]],
    window: Int32[Array, ""] | None,
    linear: Linear,
    state: Mapping[str, Any],
) -> tuple[Float32[Array, "rows length k"], dict[str, Any]]:
    """One layer of the decoder: the hidden states after it, and what `linear` gave out.

    Args:
      config: Of the model.
      x: The hidden states before it, from position 0 on.
      parameters: Of this layer, by name inside it.
      window: As `window` gives it.
      linear, state: As in `Decoder.__call__`, for one layer.
    """
    model = outline(config)
    parameters = {  # the weights are widened where they are used, one site at a time
        name: array if array.ndim > 1 else array.astype(jnp.float32)
        for name, array in parameters.items()
    }
    positions = jnp.arange(x.shape[1], dtype=jnp.int32)
    attend = functools.partial(
        model._attend, layer=parameters, positions=positions, window=window, store=None
    )
    x, (outs, _) = model._layer(x, parameters, linear, state, attend, None)
    return x, outs


def window(config: DecoderConfig, number: int) -> Int32[Array, ""] | None:
    """How far a layer sees back; None where all layers see everything."""
    windows = layer_windows(config)
    return None if windows is None else jnp.asarray(windows[number])


@functools.cache
def outline(config: DecoderConfig) -> Decoder:
    """A decoder whose parameters are shapes alone."""
    shapes = parameter_shapes(config)
    return nnx.eval_shape(
        lambda: Decoder(config, {name: jnp.zeros(shape) for name, shape in shapes.items()})
    )


def without_linears(
    config: DecoderConfig, parameters: Mapping[str, Float[Array, "..."]]
) -> Decoder:
    """A decoder for a `linear` that brings its own weights: those not given are empty arrays.

    Args:
      parameters: Named as in `parameter_shapes`, layers stacked; all but weights of linears.
    """
    model = nnx.clone(outline(config))
    given = {name: nnx.Param(array) for name, array in parameters.items()}
    model.embedding, model.norm = given[EMBEDDING], given["model.norm"]
    if model.head is not None:
        model.head = given["lm_head"]
    empty = jnp.zeros((config.num_hidden_layers, 0), jnp.float32)
    for name in model.layers:
        model.layers[name] = given.get(LAYER + name, nnx.Param(empty))
    return model
