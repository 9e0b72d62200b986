"""A checkpoint read a layer at a time, and the decoder's layer over what was read.

    hidden_0 = embedding[tokens],    hidden_(l+1) = layer(hidden_l, parameters of layer l)

So a model far larger than memory can be walked through from its first layer to its last.
"""

import functools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32, Integer

from duquantpp_jax.models.checkpoint import Headers, headers
from duquantpp_jax.models.config import DecoderConfig
from duquantpp_jax.models.decoder import Decoder, Linear, layer_windows, parameter_shapes
from duquantpp_jax.models.shards import read_stored

LAYER = "model.layers.*."
EMBEDDING = "model.embed_tokens"


class Checkpoint:
    """A float checkpoint whose headers have been checked and whose weights are still on disk.

    Attributes:
      directory: Where it is.
      config: What its config.json says.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        """Args:
          directory: As for `load`.

        Raises:
          ValueError: As `load`, but for what only the weights themselves show.
        """
        self.directory = Path(directory)
        self._headers: Headers = headers(directory)
        self.config = self._headers.config

    def layer_tensors(self, number: int) -> dict[str, str]:
        """Tensor names of a layer, and the parameter inside the layer that each fills."""
        return {
            name: place.key.removeprefix(LAYER)
            for name, place in self._headers.places.items()
            if place.key.startswith(LAYER) and place.index == number
        }

    def layer(self, number: int) -> dict[str, Float[np.ndarray, "..."]]:
        """The parameters of a layer, in the type that they are stored in.

        Raises:
          ValueError: A tensor has NaN or Inf, or a shard is truncated.
        """
        names = self.layer_tensors(number)
        return {names[name]: array for name, array in read_stored(self._headers.found, names)}

    def outside(self) -> Iterator[tuple[str, Float[np.ndarray, "..."]]]:
        """What belongs to no layer, tensor by tensor: embedding, last norm, head."""
        places = self._headers.places
        names = [name for name, place in places.items() if not place.key.startswith(LAYER)]
        for name in names:
            yield from read_stored(self._headers.found, [name])  # one at a time in memory

    def embed(
        self, tokens: Integer[np.ndarray, "rows length"]
    ) -> Float32[np.ndarray, "rows length k"]:
        """The hidden states before the first layer."""
        ((_, embedding),) = read_stored(self._headers.found, [f"{EMBEDDING}.weight"])
        return embedding[tokens].astype(np.float32)


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
