"""A single layer of the decoder, for a model whose layers are in memory one at a time.

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
    """The hidden states after a layer, and what `linear` gave out.

    Args:
      x: The hidden states before the layer, from position 0 on.
      parameters: By their names inside the layer.
      linear, state: As in `Decoder.__call__`, for a single layer.
    """
    # Matrices become float32 where they are used, to save memory.
    own = {n: a if a.ndim > 1 else a.astype(jnp.float32) for n, a in parameters.items()}
    positions = jnp.arange(x.shape[1], dtype=jnp.int32)
    layer = outline(config)._layer
    x, (outs, _) = layer(x, own, linear, state, window, None, positions, None)
    return x, outs


def window(config: DecoderConfig, number: int) -> Int32[Array, ""] | None:
    """Positions that a layer sees, its own among them; None where all layers see everything."""
    windows = layer_windows(config)
    return None if windows is None else jnp.asarray(windows[number])


@functools.cache
def outline(config: DecoderConfig) -> Decoder:
    """A decoder with shapes in place of parameters."""
    shapes = parameter_shapes(config)
    return nnx.eval_shape(lambda: Decoder(config, {n: jnp.zeros(s) for n, s in shapes.items()}))


def without_linears(
    config: DecoderConfig, parameters: Mapping[str, Float[Array, "..."]]
) -> Decoder:
    """A decoder for a `linear` with weights of its own: those of the decoder are empty arrays."""
    model = nnx.clone(outline(config))
    given = {name: nnx.Param(array) for name, array in parameters.items()}
    model.embedding, model.norm = given[EMBEDDING], given["model.norm"]
    if model.head is not None:
        model.head = given["lm_head"]
    empty = jnp.zeros((config.num_hidden_layers, 0), jnp.float32)
    for name in model.layers:
        model.layers[name] = given.get(LAYER + name, nnx.Param(empty))
    return model
